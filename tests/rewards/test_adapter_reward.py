"""A reward on the policy's base model, against the same reward with a model of its own; and runs with both."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from preference_folders import PROMPTS, RESPONSES, close
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from elastic_lightning.algorithms import PPO, PPOConfig
from elastic_lightning.callbacks import ElasticReset
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource, Prompts, Sampling, as_policy, load_policy, load_tokenizer
from elastic_lightning.policies.adapters import add_lora
from elastic_lightning.policies.loading import from_path
from elastic_lightning.policies.saving import save_model
from elastic_lightning.rewards import AdapterReward, PreferenceReward, Reward, ScoreNormalization, WeightedReward

BASES = pytest.mark.parametrize("base", ["gpt2_folder", "llama_folder"])


def reward_adapter(folder, base, lora=LoRA(rank=2, alpha=6), labels=1, move="lora_B"):  # noqa: B008 (frozen)
    """A LoRA adapter of a classifier with everything in it away from its start."""
    torch.manual_seed(3)
    model = from_path(AutoModelForSequenceClassification, ModelSource(base), new_head=True, num_labels=labels)
    model = add_lora(model, lora, "SEQ_CLS")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if move in name or "score" in name:
                parameter.normal_()
    save_model(model, load_tokenizer(base), folder, adapter="adapter")
    return str(folder)


def policy(base, **lora):
    """A LoRA policy that has moved."""
    torch.manual_seed(4)
    lm = as_policy(load_policy(base, lora=LoRA(rank=3, **lora)).model)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return lm


@pytest.mark.parametrize("targets", [None, "all-linear"])
@BASES
def test_scores_are_those_of_a_model_of_its_own(tmp_path, base, targets, request):
    base = request.getfixturevalue(base)
    if targets is not None:  # layers that the policy has no adapter on, and GPT-2's Conv1D of every shape
        gpt2 = ["c_attn", "c_proj", "c_fc"]
        targets = gpt2 if "gpt2" in base else ["q_proj", "o_proj", "down_proj", "gate_proj"]
    folder = reward_adapter(tmp_path / "reward", base, LoRA(rank=2, alpha=6, targets=targets))
    ScoreNormalization(0.3, 2.0).write(folder)
    own, shared = PreferenceReward(folder, batch_size=2), AdapterReward(folder, batch_size=2)
    shared.bind(policy(base))
    expected = own(PROMPTS, RESPONSES)
    close(shared(PROMPTS, RESPONSES), expected)
    assert expected.std() > 0.1
    raw = AdapterReward(folder, normalise=False)
    raw.bind(policy(base))
    close(raw(PROMPTS, RESPONSES), PreferenceReward(folder, normalise=False)(PROMPTS, RESPONSES))
    without = PreferenceReward(reward_adapter(tmp_path / "still", base, move="score"))
    assert (without(PROMPTS, RESPONSES) - raw(PROMPTS, RESPONSES)).abs().max() > 0.01, "the adapter matters"


def test_rank_stabilised_scales(tmp_path, llama_folder):
    folder = reward_adapter(tmp_path / "reward", llama_folder, LoRA(rank=4, alpha=4))
    config = Path(folder, "adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": True}))
    shared = AdapterReward(folder)
    shared.bind(policy(llama_folder))
    close(shared(PROMPTS, RESPONSES), PreferenceReward(folder)(PROMPTS, RESPONSES))


@BASES
def test_scoring_leaves_the_policy_as_it_was(tmp_path, base, request):
    base = request.getfixturevalue(base)
    lm, reward = policy(base), AdapterReward(reward_adapter(tmp_path / "reward", base))
    tokens = torch.tensor([[3, 4, 5, 20]])

    def state():
        names = [(name, parameter.requires_grad) for name, parameter in lm.named_parameters()]
        hooks = [hook for module in lm.modules() for hook in module._forward_hooks]
        weights = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
        return names, list(lm.model.peft_config), lm.model.active_adapter, hooks, weights, lm.model(tokens).logits

    before = state()
    reward.bind(lm)
    reward(PROMPTS, RESPONSES)
    after = state()
    assert before[:4] == after[:4] and before[4].keys() == after[4].keys()
    assert all(torch.equal(before[4][name], after[4][name]) for name in before[4])
    assert torch.equal(before[5], after[5])
    # Nor does the reward hold what is the policy's: its adapter and its head alone.
    adapter = sum(parameter.numel() for name, parameter in reward.named_parameters())
    assert adapter < 0.2 * sum(parameter.numel() for parameter in lm.model.get_base_model().parameters())
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_a_failure_while_scoring_leaves_no_hook(tmp_path, llama_folder, monkeypatch):
    lm, reward = policy(llama_folder), AdapterReward(reward_adapter(tmp_path / "reward", llama_folder))
    reward.bind(lm)
    monkeypatch.setattr(lm.backbone.norm, "forward", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reward(PROMPTS, RESPONSES)
    assert not any(module._forward_hooks for module in lm.modules())


def run(tmp_path, base, reward, name):
    """Two PPO batches with a reset after the first; returns the module, its callback and the checkpoint."""
    torch.manual_seed(0)
    options = PPOConfig(epochs=1, mini_batches=2, learning_rate=1e-2, missing_eos_penalty=0.5)
    module = PPO(ModelSource(base, lora=LoRA(rank=2)), reward, options, Sampling(6), seed=1)
    prompts = Prompts(torch.tensor([[5, 9], [7, 3], [11, 2], [4, 4]]), torch.ones(4, 2, dtype=torch.bool))
    callback = ElasticReset(decay=0.5, every=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_checkpointing=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(module, DataLoader([prompts] * 3, batch_size=None))
    trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    module.save_pretrained(tmp_path / name / "merged")
    module.save_pretrained(tmp_path / name / "adapter", adapter="adapter")
    return module, callback, torch.load(tmp_path / f"{name}.ckpt", weights_only=True)


@BASES
def test_a_run_is_the_run_with_a_reward_model_of_its_own(tmp_path, base, request):
    """Training, trained and shadowed parameters, checkpoint and saved folders: nothing knows of the reward."""
    base = request.getfixturevalue(base)
    folder = reward_adapter(tmp_path / "reward", base)
    own, own_reset, own_checkpoint = run(tmp_path, base, PreferenceReward(folder), "own")
    shared, reset, checkpoint = run(tmp_path, base, WeightedReward({"score": AdapterReward(folder)}), "shared")
    trained = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (own, shared)]
    assert trained[0].keys() == trained[1].keys() and all("lora_" in n or "value_head" in n for n in trained[1])
    assert own.shadowed_parameters().keys() == shared.shadowed_parameters().keys()
    assert own_checkpoint["state_dict"].keys() == checkpoint["state_dict"].keys() == trained[0].keys()
    start = load_policy(base, lora=LoRA(rank=2)).model.state_dict()
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, atol=1e-4, rtol=1e-4)
    moved = [n for n in trained[1] if "lora_B" in n and trained[1][n].any()]
    assert moved and not any(tensor.any() for name, tensor in start.items() if "lora_B" in name)
    states = own_reset.state_dict(), reset.state_dict()
    assert str(sorted(states[0])) == str(sorted(states[1]))
    for kind in ("merged", "adapter"):
        files = [sorted(path.name for path in (tmp_path / name / kind).iterdir()) for name in ("own", "shared")]
        assert files[0] == files[1]
    tokens = torch.tensor([[3, 4, 5, 20]])
    saved = [AutoModelForCausalLM.from_pretrained(tmp_path / n / "merged")(tokens).logits for n in ("own", "shared")]
    torch.testing.assert_close(*saved, atol=1e-3, rtol=1e-3)
    restored = PPO.load_from_checkpoint(tmp_path / "shared.ckpt", reward=AdapterReward(folder))
    torch.testing.assert_close(restored.actor.lm.model(tokens).logits, shared.actor.lm.model(tokens).logits)


def test_another_base_model_is_refused(tmp_path, llama_folder, gpt2_folder):
    folder = reward_adapter(tmp_path / "reward", llama_folder)
    copy = shutil.copytree(llama_folder, tmp_path / "copy")
    for base in (gpt2_folder, str(copy)):
        with pytest.raises(UserError, match="was trained on") as error:
            AdapterReward(folder).bind(policy(base))
        assert llama_folder in str(error.value) and base in str(error.value) and "\n" not in str(error.value)
    link = tmp_path / "link"
    link.symlink_to(llama_folder)
    AdapterReward(folder).bind(policy(str(link)))  # the same folder by another name


def test_a_policy_that_trains_its_base_is_refused(tmp_path, llama_folder, t5_folder):
    reward = AdapterReward(reward_adapter(tmp_path / "reward", llama_folder))
    for other in (llama_folder, t5_folder):
        with pytest.raises(UserError, match=r"policy\.lora"):
            reward.bind(as_policy(load_policy(other).model))
    with pytest.raises(UserError, match="works with a policy"):
        reward(PROMPTS, RESPONSES)
    with pytest.raises(UserError, match=r"policy\.lora"):
        PPO(ModelSource(llama_folder), reward)


def test_folders_that_are_no_plain_adapter_of_a_reward(tmp_path, llama_folder):
    with pytest.raises(UserError, match="holds no adapter"):
        AdapterReward(llama_folder)
    with pytest.raises(UserError, match="2 labels"):
        AdapterReward(reward_adapter(tmp_path / "two", llama_folder, labels=2))
    folder = reward_adapter(tmp_path / "reward", llama_folder)
    config = Path(folder, "adapter_config.json")
    for name, value in (("use_dora", True), ("alpha_pattern", {"q_proj": 3}), ("peft_type", "LOHA")):
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, name: value}))
        with pytest.raises(UserError, match=name):
            AdapterReward(folder)
        config.write_text(json.dumps(settings))
    of_policy = load_policy(llama_folder, lora=LoRA(rank=2))
    save_model(of_policy.model, of_policy.tokenizer, tmp_path / "policy", adapter="adapter")
    with pytest.raises(UserError, match="head"):
        AdapterReward(str(tmp_path / "policy"))


def test_every_part_of_a_reward_is_told(llama_folder):
    class Told(Reward):
        def bind(self, lm):
            self.lm = (lm,)

    inner, lm = Told(), policy(llama_folder)
    WeightedReward({"outer": WeightedReward({"inner": inner})}).bind(lm)
    assert inner.lm == (lm,)
