"""Adapters merged into their base models, against the adapter models themselves and plain transformers."""

import json
from pathlib import Path

import pytest
import torch
from policy_cases import CAUSAL, adapter_folder, one_line
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from elastic_lightning.cli import main
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource, load_tokenizer
from elastic_lightning.policies.adapters import add_lora
from elastic_lightning.policies.loading import from_path
from elastic_lightning.policies.merging import merge_adapter
from elastic_lightning.policies.saving import save_model

TOKENS = torch.tensor([[3, 4, 5, 20, 9, 28]])
LABELS = {"id2label": {0: "poor", 1: "fair", 2: "good"}, "label2id": {"poor": 0, "fair": 1, "good": 2}}


@pytest.fixture
def classifier_adapter(tmp_path, request):
    """A function that makes an adapter folder of a classifier with three labels, on a causal base model."""

    def make(base, **names):
        torch.manual_seed(0)
        model = from_path(AutoModelForSequenceClassification, ModelSource(base), new_head=True, **(names or LABELS))
        model = add_lora(model, LoRA(rank=2), "SEQ_CLS").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "score" in name:
                    parameter.normal_()
        save_model(model, load_tokenizer(base), tmp_path / "classifier_adapter", adapter="adapter")
        return model, tmp_path / "classifier_adapter"

    return make


@pytest.mark.parametrize("base", CAUSAL)
def test_a_merged_policy_is_the_adapter_model(tmp_path, base, request, capsys):
    model, folder = adapter_folder(tmp_path, request.getfixturevalue(base))
    Path(folder, "value_head.safetensors").write_bytes(b"values")
    Path(folder, "README.md").write_text("a card of the adapter")
    output = tmp_path / "deep" / "merged"
    assert main(["merge", folder, f"--output={output}"]) == 0
    assert str(output) in capsys.readouterr().out
    merged, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (output, request.getfixturevalue(base)))
    expected = model(input_ids=TOKENS).logits
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, expected, atol=1e-4, rtol=0)
    assert (plain(input_ids=TOKENS).logits - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(output).get_vocab() == load_tokenizer(folder).get_vocab()
    assert (output / "value_head.safetensors").read_bytes() == b"values"
    assert not list(output.glob("adapter_*")) and not (output / "README.md").exists()
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


@pytest.mark.parametrize("base", CAUSAL)
@pytest.mark.parametrize("with_config", [True, False])
def test_a_merged_classifier_is_the_adapter_model(tmp_path, base, with_config, classifier_adapter, request):
    model, folder = classifier_adapter(request.getfixturevalue(base))
    if not with_config:  # as peft alone writes the folder
        (folder / "config.json").unlink()
    (folder / "normalisation.json").write_text('{"mean": 1}')
    merge_adapter(folder, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, atol=1e-4, rtol=0)
    assert merged.config.id2label == (LABELS["id2label"] if with_config else {i: f"LABEL_{i}" for i in range(3)})
    assert json.loads((tmp_path / "merged" / "normalisation.json").read_text()) == {"mean": 1}


def test_the_type_of_the_weights_is_the_base_models(tmp_path, llama_folder):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16).save_pretrained(half)
    load_tokenizer(llama_folder).save_pretrained(half)
    _, folder = adapter_folder(tmp_path, str(half))
    merge_adapter(folder, tmp_path / "merged")
    merge_adapter(folder, tmp_path / "whole", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").dtype == torch.float32


def test_the_base_model_may_have_moved(tmp_path, llama_folder):
    model, folder = adapter_folder(tmp_path, llama_folder)
    config = Path(folder, "adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone"}))
    with pytest.raises(UserError) as error:
        merge_adapter(folder, tmp_path / "merged")
    one_line(error, "no such folder: /gone")
    merge_adapter(folder, tmp_path / "merged", base=llama_folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits, atol=1e-4, rtol=0)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path, llama_folder, gpt2_folder):
    _, folder = adapter_folder(tmp_path, llama_folder)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    for source, output, base, part in [
        (llama_folder, "new", None, "holds no adapter"),
        (folder, "taken", None, "already exists"),
        (folder, "new", gpt2_folder, "does not fit its base model"),
    ]:
        with pytest.raises(UserError) as error:
            merge_adapter(source, tmp_path / output, base=base)
        one_line(error, part)
    assert not (tmp_path / "new").exists() and [path.name for path in taken.iterdir()] == ["file"]
