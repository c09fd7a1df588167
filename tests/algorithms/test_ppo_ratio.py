"""The policy that is updated is the policy that sampled: the ratio of the first mini-batch is 1."""

import pytest
import torch

from elastic_lightning.errors import UserError
from elastic_lightning.policies import draw_lengths


@pytest.mark.parametrize(
    ("module", "batch"),
    [
        pytest.param({}, {"ragged": False}, id="plain"),
        pytest.param({}, {}, id="left padding"),
        pytest.param({"lora": True}, {}, id="lora"),
        pytest.param({"lora": True, "separate_value_trunk": True}, {}, id="lora and value trunk"),
        pytest.param({"sampling": {"temperature": 0.7}}, {}, id="temperature"),
        pytest.param({"separate_value_trunk": True}, {}, id="value trunk"),
        pytest.param({"sampling": {"top_k": 3}}, {}, id="top_k"),
        pytest.param({"sampling": {"top_p": 0.6, "min_new_tokens": 4}}, {}, id="top_p and min_new_tokens"),
        pytest.param({"sampling": {"random_length": (2, 6), "eos": False}}, {}, id="random length without an end"),
        pytest.param({"sampling": {"random_length": (2, 6)}, "missing_eos_penalty": 1.0}, {}, id="random length"),
        pytest.param({"micro_batch_size": 1}, {}, id="micro-batches"),
        pytest.param({"sampling": {"max_new_tokens": 1}}, {}, id="one token"),
    ],
)
def test_first_ratio_is_one(any_toy, tmp_path, module, batch):
    model = any_toy.ppo(**module)
    any_toy.perturb(model)
    trainer = any_toy.fit(model, tmp_path, [any_toy.prompts(rows=8, **batch)])
    assert trainer.callback_metrics["train/first_ratio_deviation"] < 1e-5
    assert trainer.callback_metrics["train/first_ratio"] == pytest.approx(1, abs=1e-5)


def test_cut_responses_are_learned_from_and_pay_for_their_missing_end(toy, tmp_path):
    model = toy.ppo(sampling={"random_length": (2, 6)}, missing_eos_penalty=10.0, reward=toy.reward_class("none"))
    toy.fit(model, tmp_path, [toy.prompts(rows=16)])
    (batch,) = model.seen
    mask, rows = batch.rollout.mask, torch.arange(16)
    lengths = draw_lengths(0, 0, rows, model.sampling)
    last = mask.sum(dim=1) - 1
    ended = batch.rollout.tokens[rows, last] == toy.eos
    assert torch.equal(last[~ended] + 1, lengths[~ended]) and (last[ended] + 1 <= lengths[ended]).all()
    assert ended.any() and (~ended).any()
    torch.testing.assert_close(batch.experience.rewards[rows, last], torch.where(ended, 0.0, -10.0))


def test_a_missing_end_is_not_to_be_paid_for_where_there_is_none(toy):
    with pytest.raises(UserError, match=r"sampling\.eos"):
        toy.ppo(sampling={"eos": False}, missing_eos_penalty=1.0)


def test_the_case_holds_early_ends_and_padding(any_toy, tmp_path):
    model = any_toy.ppo()
    any_toy.fit(model, tmp_path, [any_toy.prompts(rows=8)])
    (batch,) = model.seen
    lengths = batch.rollout.mask.sum(1)
    assert lengths.min() < lengths.max() and not batch.prompts.mask.all()
    ended_early = lengths < 6
    assert (batch.rollout.tokens[ended_early, lengths[ended_early] - 1] == any_toy.eos).all()
    assert (batch.rollout.tokens[~batch.rollout.mask] == any_toy.pad).all()


def test_dropout_in_the_update_alone_would_be_seen(toy, tmp_path):
    model = toy.ppo()
    reference_logprobs = model.reference_logprobs

    def with_dropout(*inputs):  # from the last step before the update on
        for module in model.actor.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        model.actor.train()
        return reference_logprobs(*inputs)

    model.reference_logprobs = with_dropout
    with pytest.warns(UserWarning, match="ratio deviates"):
        trainer = toy.fit(model, tmp_path)
    assert trainer.callback_metrics["train/first_ratio_deviation"] > 0.05


def test_another_temperature_in_the_update_would_be_seen(toy, tmp_path):
    model = toy.ppo()
    forward = model.actor.forward
    model.actor.forward = lambda prompts, responses, loss, temperature, trunk: forward(prompts, responses, loss, 0.7)
    with pytest.warns(UserWarning, match="ratio deviates"):
        trainer = toy.fit(model, tmp_path)
    assert trainer.callback_metrics["train/first_ratio_deviation"] > 0.05


def test_a_config_with_dropout_runs_without(toy, tmp_path):
    model = toy.ppo()
    assert model.actor.lm.config.resid_pdrop == 0.1  # the checkpoint asks for dropout
    for part in (model.actor, model.reference.lm):
        assert not any(child.training for child in part.modules())
        assert all(child.p == 0 for child in part.modules() if isinstance(child, torch.nn.Dropout))
    batch = toy.prompts(rows=8)
    trainer = toy.trainer(tmp_path)
    trainer.fit(model, toy.loader([batch]), toy.loader([batch]))
    assert not model.actor.training
    (seen,) = model.seen
    first, second = (model.actor.evaluate(seen.prompts, seen.rollout.responses).logprobs for _ in range(2))
    assert torch.equal(first, second)


def test_lora_dropout_is_not_used(toy):
    from elastic_lightning.algorithms import PPO
    from elastic_lightning.policies import LoRA, ModelSource

    with pytest.warns(UserWarning, match=r"lora\.dropout"):
        model = PPO(ModelSource(toy.folder, lora=LoRA(rank=2, dropout=0.5)), toy.reward_class())
    assert all(child.p == 0 for child in model.actor.modules() if isinstance(child, torch.nn.Dropout))
