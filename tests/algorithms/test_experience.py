"""Scores and per-token rewards against numbers worked out by hand."""

import pytest
import torch

from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.algorithms.ppo.experience import make_experience, shape_scores
from elastic_lightning.algorithms.ppo.metrics import explained_variance
from elastic_lightning.policies import Rollout

EOS = 9


def rollout(values=None):
    """Two responses: three tokens without an end, and two tokens of which the second is eos."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.25, 0.0]])
    values = torch.zeros(2, 3) if values is None else torch.tensor(values)
    return Rollout(torch.tensor([[1, 2, 3], [4, EOS, EOS]]), mask, logprobs, values)


REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -0.75, -99.0]])  # the last is padding: whatever stands there


def test_scores_by_hand():
    scores = torch.tensor([3.0, -2.0])
    shaped = shape_scores(scores, rollout(), PPOConfig(), EOS)
    assert shaped.tolist() == [3.0, -2.0]
    shaped = shape_scores(scores, rollout(), PPOConfig(reward_baseline=0.5), EOS)
    assert shaped.tolist() == [2.5, -2.5]
    shaped = shape_scores(scores, rollout(), PPOConfig(reward_baseline=0.5, reward_clip=1.0), EOS)
    assert shaped.tolist() == [1.0, -1.0]
    shaped = shape_scores(scores, rollout(), PPOConfig(missing_eos_penalty=4.0), EOS)
    assert shaped.tolist() == [-1.0, -2.0]
    assert shape_scores(scores, rollout(), PPOConfig(missing_eos_penalty=4.0), (3, EOS)).tolist() == [3.0, -2.0]
    shaped = shape_scores(scores, rollout(), PPOConfig(reward_clip=1.0, missing_eos_penalty=4.0), EOS)
    assert shaped.tolist() == [-3.0, -1.0]  # the penalty is not clipped away
    assert scores.tolist() == [3.0, -2.0]


def test_an_eos_in_the_padding_ends_nothing():
    tokens, mask, *rest = rollout()
    cut = Rollout(tokens, mask & torch.tensor([[True] * 3, [True, False, False]]), *rest)
    assert shape_scores(torch.zeros(2), cut, PPOConfig(missing_eos_penalty=1.0), EOS).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("estimator", "penalties"),
    [
        ("k1", [[0.5, -1.0, 0.0], [-0.5, 0.5]]),
        ("k2", [[0.125, 0.5, 0.0], [0.125, 0.125]]),
        # k3 = q/p - 1 - log(q/p), with log(q/p) = -0.5, 1, 0 and 0.5, -0.5
        ("k3", [[0.6065307 - 1 + 0.5, 2.7182818 - 1 - 1, 0.0], [1.6487213 - 1 - 0.5, 0.6065307 - 1 + 0.5]]),
    ],
)
def test_rewards_by_hand(estimator, penalties):
    config = PPOConfig(kl_estimator=estimator, whiten_advantages=False)
    experience = make_experience(rollout(), torch.tensor([10.0, 20.0]), REFERENCE, 0.1, config)
    (a, b, c), (d, e) = penalties
    expected = torch.tensor([[-0.1 * a, -0.1 * b, 10 - 0.1 * c], [-0.1 * d, 20 - 0.1 * e, 0.0]])
    torch.testing.assert_close(experience.rewards, expected)


def test_advantages_and_returns_by_hand():
    config = PPOConfig(gamma=0.5, lam=0.5, whiten_advantages=False)
    values = [[1.0, 2.0, 4.0], [8.0, 2.0, 77.0]]  # the value at padding does not count
    experience = make_experience(rollout(values), torch.tensor([8.0, 4.0]), REFERENCE, 0.0, config)
    # deltas: 0+1-1=0, 0+2-2=0, 8+0-4=4; and 0+1-8=-7, 4+0-2=2; the sum weighs by 1/4
    advantages = torch.tensor([[0.25, 1.0, 4.0], [-6.5, 2.0, 0.0]])
    torch.testing.assert_close(experience.advantages, advantages)
    torch.testing.assert_close(experience.returns, torch.tensor([[1.25, 3.0, 8.0], [1.5, 4.0, 0.0]]))


def test_whitened_advantages_leave_the_returns_alone():
    values = [[1.0, 2.0, 4.0], [8.0, 2.0, 77.0]]
    arguments = (rollout(values), torch.tensor([8.0, 4.0]), REFERENCE, 0.1)
    plain = make_experience(*arguments, PPOConfig(whiten_advantages=False))
    white = make_experience(*arguments, PPOConfig())
    valid = plain.advantages[rollout().mask]
    expected = (valid - valid.mean()) / (valid.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(white.advantages[rollout().mask], expected)
    assert white.advantages[1, 2] == 0
    torch.testing.assert_close(white.returns, plain.returns)


def test_whitened_rewards_keep_their_mean():
    config = PPOConfig(whiten_rewards=True, whiten_advantages=False, gamma=1.0, lam=1.0)
    experience = make_experience(rollout(), torch.tensor([8.0, 4.0]), REFERENCE, 0.0, config)
    raw = torch.tensor([0.0, 0.0, 8.0, 0.0, 4.0])
    expected = (raw - raw.mean()) / (raw.var(unbiased=False) + 1e-8).sqrt() + raw.mean()
    torch.testing.assert_close(experience.rewards[rollout().mask], expected)
    assert experience.rewards[1, 2] == 0
    # with no values and lambda 1 an advantage is the sum of the rewards to come
    torch.testing.assert_close(experience.advantages[0, 0], expected[:3].sum())


def test_explained_variance():
    mask = torch.tensor([[True, True], [True, False]])
    returns = torch.tensor([[1.0, 2.0], [3.0, 50.0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.zeros(2, 2), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)


def test_reward_terms_reach_the_log(toy, tmp_path):
    module = toy.ppo(missing_eos_penalty=2.0, reward_baseline=0.25, kl_coefficient=0.3)
    toy.perturb(module)
    trainer = toy.fit(module, tmp_path)
    metrics = trainer.callback_metrics
    expected = metrics["train/reward"] - 0.25 - 2.0 * (1 - metrics["train/eos_rate"]) - 0.3 * metrics["train/kl"]
    assert metrics["train/return"] == pytest.approx(expected.item(), abs=1e-4)
    assert 0 < metrics["train/eos_rate"] < 1
    assert metrics["train/kl"].abs() > 0.01
