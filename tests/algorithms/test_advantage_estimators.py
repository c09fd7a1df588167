"""Advantage estimators against tables worked out by hand, and PPO without a value function."""

import pytest
import torch

from elastic_lightning.algorithms import PPOConfig
from elastic_lightning.algorithms.ppo.advantages import ESTIMATORS, WITH_CRITIC
from elastic_lightning.algorithms.ppo.rollout import repeated
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.generate import load
from elastic_lightning.policies import Prompts
from elastic_lightning.rewards import Reward

# Three prompts of three responses each. Totals: 1, 2, 6 | 5, -, 1 (the second raised: it has no token) | 3, -, -.
REWARDS = torch.tensor(
    [[0.5, 0.5], [2.0, 9.0], [2.0, 4.0], [1.0, 4.0], [7.0, 7.0], [1.0, 9.0], [3.0, 9.0], [7.0, 7.0], [7.0, 7.0]]
)
MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [0, 0], [1, 0], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
BY_HAND = {
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2 | 5 - 1, 1 - 5 | no other
    "rloo": [-3.0, -1.5, 4.5, 4.0, 0.0, -4.0, 0.0, 0.0, 0.0],
    # means 3 | 3 | 3
    "dr_grpo": [-2.0, -1.0, 3.0, 2.0, 0.0, -2.0, 0.0, 0.0, 0.0],
    # unbiased std: sqrt((4 + 1 + 9) / 2) = 2.6457513 | sqrt((4 + 4) / 1) = 2.8284271
    "grpo": [-2 / 2.6458513, -1 / 2.6458513, 3 / 2.6458513, 2 / 2.8285271, 0.0, -2 / 2.8285271, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_groups_by_hand_and_cut_by_masks(name):
    config = PPOConfig(advantage=name, samples_per_prompt=3)
    advantages, returns = ESTIMATORS[name](REWARDS, None, MASK, config)
    torch.testing.assert_close(advantages, torch.where(MASK, torch.tensor(BY_HAND[name])[:, None], 0.0))
    assert returns is None


def test_reinforce_is_what_follows_minus_the_value():
    values = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    rewards, mask = torch.tensor([[0.5, 4.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    config = PPOConfig(advantage="reinforce", gamma=0.5)
    advantages, returns = ESTIMATORS["reinforce"](rewards, values, mask, config)
    torch.testing.assert_close(returns, torch.tensor([[0.5 + 0.5 * 4, 4.0], [6.0, 0.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[2.5 - 1, 4.0 - 2], [6.0 - 3, 0.0]]))


def test_rows_and_columns_of_a_batch_are_repeated_side_by_side():
    prompts = Prompts(torch.tensor([[1], [2]]), torch.ones(2, 1, dtype=torch.bool))
    batch = repeated({"prompts": prompts, "answers": ["a", "b"]}, 3)
    assert batch["prompts"].tokens.flatten().tolist() == [1, 1, 1, 2, 2, 2] and batch["prompts"].mask.all()
    assert batch["answers"] == ["a", "a", "a", "b", "b", "b"]


def test_groups_are_needed_where_nothing_else_is_a_baseline():
    with pytest.raises(UserError, match=r"ppo\.samples_per_prompt"):
        PPOConfig(advantage="rloo")


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in WITH_CRITIC])
def test_without_a_critic_none_is_built_logged_or_saved(toy, tmp_path, name):
    module = toy.ppo(advantage=name, samples_per_prompt=2, epochs=1)
    assert module.actor.value_head is None
    trainer = toy.fit(module, tmp_path, [toy.prompts(rows=4)])
    logged = {name.split("/")[-1] for name in trainer.callback_metrics}
    assert not {"value_loss", "value_clip_fraction", "explained_variance"} & logged
    assert trainer.callback_metrics["train/first_ratio_deviation"] < 1e-5
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["policy"]
    (batch,) = module.seen
    assert len(batch.prompts.tokens) == 8 and torch.equal(batch.prompts.tokens[0::2], batch.prompts.tokens[1::2])
    assert batch.rollout.values is None and batch.experience.returns is None
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    weights = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert weights and not any("value" in key for key in weights)
    loaded = load(str(tmp_path / "end.ckpt"))[0]  # what generate and evaluate do
    assert loaded.value_head is None
    for name_of, weight in module.actor.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name_of], weight)
    module.save_pretrained(tmp_path / "final")
    assert not (tmp_path / "final" / "value_head.safetensors").exists()


class RaisesOnFirst(Reward):
    """Number of words; raises on the first response that it is asked for alone, and on whole batches."""

    on_error = "mask"

    def forward(self, prompts, responses):
        if len(responses) > 1 or responses[0] == self.first:
            raise ValueError("no")
        return torch.tensor([float(len(responses[0].split()))])

    def components(self, prompts, responses):
        if len(responses) > 1:
            self.first = responses[0]
        return {}


def test_masked_responses_are_left_out_of_a_groups_mean(toy, tmp_path):
    module = toy.ppo(
        advantage="dr_grpo", samples_per_prompt=4, epochs=1, kl_penalty="none", reward=RaisesOnFirst(), mini_batches=1
    )
    toy.fit(module, tmp_path, [toy.prompts(rows=2)])
    (batch,) = module.seen
    mask, scores = batch.rollout.mask, batch.experience.rewards.sum(dim=1)
    assert not mask[0].any() and mask[4:].any(dim=1).all()
    for group in (range(4), range(4, 8)):
        learned = [row for row in group if mask[row].any()]
        mean = sum(scores[row].item() for row in learned) / len(learned)
        for row in learned:
            assert batch.experience.advantages[row, 0].item() == pytest.approx(scores[row].item() - mean, abs=1e-6)
