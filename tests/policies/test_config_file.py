"""A config.json decides neither how long loading takes nor whose code runs."""

import json
import shutil
import time

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource, load_policy
from elastic_lightning.policies.classifier import trained_classifier

KERNEL = "org/kernel"


@pytest.fixture
def changed(gpt2_folder, tmp_path):
    """A function that makes a copy of the model with other fields in its config.json."""

    def change(**fields):
        folder = shutil.copytree(gpt2_folder, tmp_path / "changed")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return str(folder)

    return change


@pytest.fixture
def fetched(monkeypatch):
    """The names of the kernels that transformers would fetch from the hub and run."""
    names = []
    monkeypatch.setattr(transformers.modeling_utils, "is_kernel", lambda name: "/" in (name or ""))
    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda name, **_: names.append(name)
    )
    return names


@pytest.mark.parametrize(
    "fields",
    [
        {"n_layer": 10**9},
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_experts": 10**9}},
        {"encoder_layers": [2, 10**9]},
        {"num_labels": 10**9},
        {"max_position_embeddings": 10**9},
    ],
    ids=str,
)
def test_sizes_are_held_against_the_weights_before_anything_is_built(changed, fields):
    folder, began = changed(**fields), time.monotonic()
    for load in (load_policy, lambda path: trained_classifier(ModelSource(path=path))):
        with pytest.raises(UserError, match=r"config.json says \w+: 1000000000, but (its weights are|there can be)"):
            load(folder)
    assert time.monotonic() - began < 5


def test_an_architecture_of_too_many_layers(tokenizer_folder):
    with pytest.raises(UserError, match="n_layer: 1000000000, but there can be 10000 at most"):
        load_policy(architecture={"model_type": "gpt2", "n_layer": 10**9}, tokenizer=tokenizer_folder)


def test_fields_of_parts_that_are_not_there_are_fine(changed):
    load_policy(changed(max_window_layers=80, num_experts=512, num_labels=30_000))


@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_attention_from_the_hub_is_not_followed(changed, fetched, gpt2_folder, attention, recwarn):
    loaded = load_policy(changed(attn_implementation=KERNEL), attention=attention).model
    assert loaded.config._attn_implementation == (attention or "eager") and not fetched
    assert any(KERNEL in str(one.message) and "trust_remote_code" in str(one.message) for one in recwarn) == (
        attention is None
    )
    tokens = torch.tensor([[5, 9, 20]])
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits)


def test_attention_from_the_hub_is_refused(changed, fetched, gpt2_folder):
    with pytest.raises(UserError, match=f"{KERNEL}.*trust_remote_code"):
        load_policy(changed(_attn_implementation=KERNEL))
    with pytest.raises(UserError, match=f"{KERNEL}.*trust_remote_code"):
        load_policy(gpt2_folder, attention=KERNEL)
    assert not fetched


def test_attention_from_the_hub_is_followed_where_remote_code_is_allowed(changed, fetched):
    load_policy(changed(attn_implementation=KERNEL), trust_remote_code=True)
    assert set(fetched) == {KERNEL}
