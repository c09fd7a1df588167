"""Quantised base models: refused with one line where they cannot be, near the whole model where they can."""

import pytest
import torch
from policy_cases import ROWS, left_padded, one_line
from transformers import AutoConfig, AutoModelForCausalLM

import elastic_lightning.policies.loading as loading
from elastic_lightning.algorithms import PPO, Execution
from elastic_lightning.callbacks import SavePretrained
from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    ActorCritic,
    LoRA,
    ModelSource,
    Responses,
    Sampling,
    as_policy,
    counter_uniforms,
    load_policy,
    load_tokenizer,
    sample,
)
from elastic_lightning.policies import quantization as module
from elastic_lightning.policies.quantization import quantization_config
from elastic_lightning.policies.saving import save_model
from elastic_lightning.rewards import FunctionReward

LORA = LoRA(rank=2)


@pytest.fixture
def nothing_loads(monkeypatch):
    for name in ("from_path", "load_tokenizer"):
        monkeypatch.setattr(loading, name, lambda *args, **options: pytest.fail("something was loaded"))


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_without_the_package(llama_folder, kind, monkeypatch, nothing_loads):
    monkeypatch.setattr(module, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError) as error:
        load_policy(llama_folder, lora=LORA, quantization=kind)
    one_line(error, kind, "pip install 'elastic-lightning[quantization]'")


@pytest.mark.parametrize(("kind", "supported"), [("8bit", False), ("4bit", True)])
def test_without_the_hardware(llama_folder, kind, supported, monkeypatch, nothing_loads):
    """No device that the package knows; or a CPU alone, on which 4 bits cannot be trained on."""
    monkeypatch.setattr(module, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    name = "transformers.integrations.validate_bnb_backend_availability"
    monkeypatch.setattr(name, lambda raise_exception: supported)
    with pytest.raises(UserError) as error:
        load_policy(llama_folder, lora=LORA, quantization=kind)
    one_line(error, kind, "no device here", "NVIDIA")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "x"}, "lora"),
        ({"architecture": {"model_type": "llama"}, "tokenizer": "x", "lora": LORA}, "architecture"),
        ({"path": "x", "gguf_file": "y.gguf", "lora": LORA}, "GGUF"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(UserError, match=message):
        ModelSource(**options, quantization="4bit")


def test_a_rollout_copy_is_refused():
    source = ModelSource("x", lora=LORA, quantization="8bit")
    with pytest.raises(UserError, match="rollout_dtype"):
        Execution(rollout_dtype="bfloat16").check(source, unmerged_adapter=False)


def test_what_transformers_is_told():
    four, eight = quantization_config("4bit", "bfloat16"), quantization_config("8bit", "float32")
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16 and eight.load_in_8bit and not eight.load_in_4bit


def test_merging_into_a_quantised_base_is_refused_before_training(tmp_path, llama_folder):
    loaded = load_policy(llama_folder, lora=LORA)
    ppo = PPO(ModelSource(llama_folder, lora=LORA), FunctionReward("math.fsum"))
    for model in (loaded.model, ppo.actor.lm.model):
        model.get_base_model().is_quantized = True  # as transformers marks it
    with pytest.raises(UserError, match="elastic-lightning merge"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_model(loaded.model, loaded.tokenizer, tmp_path / "adapter", adapter="adapter")
    with pytest.raises(UserError, match="elastic-lightning merge"):
        SavePretrained().setup(None, ppo, "fit")
    SavePretrained(adapter="adapter").setup(None, ppo, "fit")
    SavePretrained().setup(None, ppo, "validate")


@pytest.fixture
def wide_folder(tmp_path, llama_folder):
    """Wide enough for the blocks of four bits on a CPU."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    config = AutoConfig.from_pretrained(llama_folder, **size, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    load_tokenizer(llama_folder).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.mark.parametrize(("kind", "near"), [("8bit", 0.1), ("4bit", 0.5)])
def test_a_quantised_policy_samples_and_learns(tmp_path, wide_folder, kind, near, monkeypatch):
    """With bitsandbytes; without an accelerator 4 bits are tried in the form that they have on one."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not torch.accelerator.is_available():
        monkeypatch.setattr(loading, "check_quantization", lambda kind: None)
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    whole = load_policy(wide_folder).model
    loaded = load_policy(wide_folder, lora=LORA, quantization=kind)
    device = next(loaded.model.parameters()).device
    assert loaded.model.get_base_model().is_quantized
    actor, prompts = ActorCritic(as_policy(loaded.model)).to(device), left_padded(ROWS)
    prompts = type(prompts)(*(part.to(device) for part in prompts))
    with torch.no_grad():
        ours = actor.lm.model(input_ids=prompts.tokens).logits.cpu()
        expected = whole(input_ids=prompts.tokens.cpu()).logits
    assert 0 < (ours - expected).abs().mean() < near * expected.std()
    uniforms = counter_uniforms(0, 0, torch.arange(4), 6).to(device)
    rollout = sample(actor, prompts, Sampling(6), uniforms, 1, 0)
    assert torch.isfinite(rollout.logprobs).all()
    total, evaluation = actor(prompts, Responses(rollout.tokens, rollout.mask), lambda logprobs, *_: -logprobs.sum())
    total.backward()
    trained = {name: parameter for name, parameter in actor.lm.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
    scale = rollout.logprobs.abs().max()
    assert (evaluation.logprobs - rollout.logprobs).abs().max() < 0.05 * scale
    save_model(loaded.model, loaded.tokenizer, tmp_path / "adapter", adapter="adapter")
    assert load_policy(str(tmp_path / "adapter")).unmerged_adapter  # on the whole base
