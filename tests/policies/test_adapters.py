"""LoRA: fresh adapters, and folders that hold one."""

import json
from pathlib import Path

import pytest
import torch
from policy_cases import adapter_folder, one_line

import elastic_lightning.policies.loading as loading
from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    CausalLM,
    LoRA,
    load_policy,
    make_reference,
)
from elastic_lightning.policies.loading import disable_dropout


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_lora_trains_its_factors_alone(folder, request):
    plain = load_policy(request.getfixturevalue(folder)).model
    model = load_policy(request.getfixturevalue(folder), lora=LoRA(rank=3, alpha=6)).model
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_A" in name or "lora_B" in name for name in trainable)
    assert {min(parameter.shape) for parameter in trainable.values()} == {3}
    assert not any(p.any() for name, p in trainable.items() if "lora_B" in name)
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)  # it starts as it was
    assert model.peft_config["default"].lora_alpha == 6 and not model.training


def test_lora_targets_and_dropout(llama_folder):
    model = load_policy(llama_folder, lora=LoRA(rank=2, targets=["o_proj"], dropout=0.3)).model
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"o_proj"}
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert 0.3 in rates
    disable_dropout(model)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_wrong_lora_options(llama_folder):
    with pytest.raises(UserError, match="rank"):
        LoRA(rank=0)
    with pytest.raises(UserError, match="dropout"):
        LoRA(dropout=1.0)
    with pytest.raises(UserError) as error:
        load_policy(llama_folder, lora=LoRA(targets=["no_such_module"]))
    one_line(error, "no_such_module", "lora.targets")


def test_an_adapter_folder_loads_as_it_was_saved(tmp_path, llama_folder):
    model, folder = adapter_folder(tmp_path, llama_folder)
    assert not (Path(folder) / "model.safetensors").exists()
    loaded = load_policy(folder)
    assert loaded.unmerged_adapter
    tokens = torch.tensor([[3, 4, 5, 20]])
    torch.testing.assert_close(loaded.model(input_ids=tokens).logits, model(input_ids=tokens).logits)
    trainable = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_an_unmerged_adapter_has_no_adapter_off_reference(tmp_path, llama_folder):
    _, folder = adapter_folder(tmp_path, llama_folder)
    loaded = load_policy(folder)
    lm = CausalLM(loaded.model)
    with pytest.raises(UserError) as error:
        make_reference(lm, "adapter_off", loaded.unmerged_adapter)
    one_line(error, "unmerged adapter", "merge", "frozen_copy")
    for kind in ("frozen_copy", "auto"):
        assert type(make_reference(lm, kind, loaded.unmerged_adapter)).__name__ == "FrozenCopy"


def test_lora_on_an_unmerged_adapter_is_refused(tmp_path, llama_folder):
    _, folder = adapter_folder(tmp_path, llama_folder)
    with pytest.raises(UserError) as error:
        load_policy(folder, lora=LoRA(rank=2))
    one_line(error, "unmerged adapter", "merge")


def test_the_base_model_of_an_adapter_is_loaded_with_the_same_trust_and_dtype(tmp_path, llama_folder, monkeypatch):
    _, folder = adapter_folder(tmp_path, llama_folder)
    seen, original = [], loading.from_path
    monkeypatch.setattr(loading, "from_path", lambda kind, source: seen.append(source) or original(kind, source))
    load_policy(folder, trust_remote_code=True, dtype="bfloat16")
    assert [(source.path, source.dtype, source.trust_remote_code) for source in seen] == [
        (llama_folder, "bfloat16", True)
    ]


@pytest.mark.parametrize("base", [None, "/no/such/base"])
def test_an_adapter_without_its_base_model(tmp_path, llama_folder, base):
    _, folder = adapter_folder(tmp_path, llama_folder)
    config = Path(folder) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(UserError) as error:
        load_policy(folder)
    one_line(error, base or "base model")
