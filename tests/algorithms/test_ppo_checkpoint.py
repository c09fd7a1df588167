"""What a PPO checkpoint holds, and that a resumed run is the run."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_lightning.algorithms import PPO
from elastic_lightning.errors import UserError


def save(toy, module, root, batches=2, **options):
    trainer = toy.fit(module, root, [toy.prompts(seed=seed) for seed in range(batches)], **options)
    trainer.save_checkpoint(root / "saved.ckpt")
    return root / "saved.ckpt"


def test_a_checkpoint_holds_the_policy_alone(toy, tmp_path):
    class Heavy(toy.reward_class):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

    path = save(toy, toy.ppo(reward=Heavy()), tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    names = set(checkpoint["state_dict"])
    assert all(name.startswith("actor.") for name in names)
    assert {"actor.value_head.weight", "actor.value_head.bias"} < names
    assert "actor.lm.model.lm_head.weight" in names and "actor.lm.model.transformer.wte.weight" in names
    assert checkpoint["ppo_step"] == 2


def test_a_lora_checkpoint_holds_adapter_and_head(toy, tmp_path):
    path = save(toy, toy.ppo(lora=True), tmp_path)
    names = set(torch.load(path, weights_only=True)["state_dict"])
    assert all("lora_" in name or "value_head" in name for name in names)
    assert any("lora_A" in name for name in names) and any("lora_B" in name for name in names)
    assert {"actor.value_head.weight", "actor.value_head.bias"} < names


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"separate_value_trunk": True}])
def test_a_resumed_run_is_the_run(toy, tmp_path, options):
    options |= {"kl_penalty": "adaptive", "kl_horizon": 60, "kl_target": 0.01, "schedule": "cosine"}
    batches = [toy.prompts(seed=seed) for seed in range(2)]
    whole = toy.ppo(**options)
    toy.fit(whole, tmp_path, batches, max_epochs=2)

    half = toy.ppo(**options)
    trainer = toy.trainer(tmp_path, max_epochs=2, limit_train_batches=2)
    half.on_train_epoch_end = lambda: setattr(trainer, "should_stop", True)
    trainer.fit(half, toy.loader(batches))
    assert half.ppo_step == 2
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    resumed = toy.ppo(**options, head_noise=0.9)
    trainer = toy.trainer(tmp_path, max_epochs=2)
    trainer.fit(resumed, toy.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.ppo_step == whole.ppo_step == 4
    assert len(resumed.seen) == 2
    assert resumed.kl_controller.coefficient == whole.kl_controller.coefficient != 0.05
    ours = dict(resumed.actor.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in whole.actor.named_parameters())


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({}, {"lora": True}),
        ({"lora": True}, {}),
        ({"separate_value_trunk": True}, {}),
        ({}, {"separate_value_trunk": True}),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(toy, tmp_path, saved, loaded):
    path = save(toy, toy.ppo(**saved), tmp_path, batches=1)
    with pytest.raises(UserError, match="another model") as raised:
        trainer = toy.trainer(tmp_path, max_epochs=2)
        trainer.fit(toy.ppo(**loaded), toy.loader([toy.prompts()]), ckpt_path=path, weights_only=True)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_another_width_is_refused(toy, tmp_path):
    path = save(toy, toy.ppo(), tmp_path, batches=1)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["actor.lm.model.transformer.wpe.weight"] = torch.zeros(64, 16)
    with pytest.raises(UserError, match=r"1 of another shape.*wpe"):
        toy.ppo().on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="weights missing"):
        toy.ppo().on_load_checkpoint({"state_dict": {"model.weight": torch.zeros(1)}})


@pytest.mark.parametrize("lora", [False, True])
def test_load_from_checkpoint(toy, tmp_path, lora):
    module = toy.ppo(lora=lora, sampling={"temperature": 0.7}, clip=0.11, adam_betas=(0.8, 0.9))
    path = save(toy, module, tmp_path)
    loaded = PPO.load_from_checkpoint(path, reward=toy.reward_class(), weights_only=True)
    assert loaded.config == module.config and loaded.sampling == module.sampling
    assert loaded.ppo_step == 2
    ours = dict(loaded.actor.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in module.actor.named_parameters())
    assert any("lora_" in name for name in ours) == lora
    batch = toy.prompts()
    assert torch.equal(loaded.sample(batch, 5).tokens, module.sample(batch, 5).tokens)


def test_hyperparameters_are_plain(toy):
    def check(value):
        assert isinstance(value, (dict, list, tuple, str, int, float, bool, type(None))), type(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            check(part)

    module = toy.ppo(lora=True)
    check(dict(module.hparams))
    assert "reward" not in module.hparams and module.hparams["policy"]["lora"]["rank"] == 4


def test_saved_folder_loads_in_transformers(toy, tmp_path):
    module = toy.ppo(learning_rate=1e-2)
    toy.fit(module, tmp_path)
    module.save_pretrained(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("w3 w5").input_ids == [3, 5] and tokenizer.pad_token_id == toy.pad
    tokens = torch.randint(0, 27, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, module.actor.lm.model(tokens).logits, atol=1e-6, rtol=0)
        assert not torch.allclose(model(tokens).logits, toy.plain_model()(tokens).logits, atol=1e-3)
    from safetensors.torch import load_file

    head = load_file(tmp_path / "folder" / "value_head.safetensors")
    assert torch.equal(head["weight"], module.actor.value_head.weight)
    assert torch.equal(head["bias"], module.actor.value_head.bias)


def test_a_lora_policy_is_saved_merged_or_as_adapter(toy, tmp_path):
    module = toy.ppo(lora=True, learning_rate=1e-2)
    toy.fit(module, tmp_path)
    before = {name: p.detach().clone() for name, p in module.actor.named_parameters()}
    module.save_pretrained(tmp_path / "merged")
    module.save_pretrained(tmp_path / "adapter", adapter="adapter")
    assert all(torch.equal(p, before[name]) for name, p in module.actor.named_parameters())
    tokens = torch.randint(0, 27, (2, 7))
    with torch.no_grad():
        expected = module.actor.lm.model(tokens).logits
        assert not torch.allclose(expected, toy.plain_model()(tokens).logits, atol=1e-3)
        for folder in ("merged", "adapter"):  # transformers loads an adapter through peft
            model = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
            torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    with pytest.raises(UserError, match="merged or adapter"):
        module.save_pretrained(tmp_path / "other", adapter="both")
