"""Step 5b: advantage estimators, from rewards per token to what each token's log-probability is pushed by.

An estimator is a callable ``(rewards [B, T], values [B, T] or None, mask [B, T], config) -> (advantages, returns)``,
both [B, T] and 0 at padding. Rows of one prompt stand side by side, `config.samples_per_prompt` of them. `returns` are
what values learn; None of an estimator without a critic, for which no value head is built, evaluated, logged or saved.
A response without any valid token (its reward raised) is left out of every mean.

To add one: write the function (here, or in a file of its own), and enter it in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic_lightning import functional

if TYPE_CHECKING:
    from elastic_lightning.algorithms.ppo.config import PPOConfig

Estimate = tuple[Tensor, Tensor | None]
Estimator = Callable[[Tensor, Tensor | None, Tensor, "PPOConfig"], Estimate]
GRPO_EPSILON = 1e-4  # added to the std of a group, as TRL does


def gae(rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig) -> Estimate:
    """Generalised advantage estimation, with `gamma` and `lam` (Schulman et al. 2015, arXiv:1506.02438)."""
    return functional.gae(rewards, values, mask, config.gamma, config.lam)


def reinforce(rewards: Tensor, values: Tensor, mask: Tensor, config: PPOConfig) -> Estimate:
    """What follows a token, discounted by `config.gamma`, minus the value before it: REINFORCE with a learned baseline
    (Williams 1992), which is GAE with lambda 1."""
    return functional.gae(rewards, values, mask, config.gamma, 1.0)


def rloo(rewards: Tensor, values: None, mask: Tensor, config: PPOConfig) -> Estimate:
    """The response's total minus the mean of the *other* responses to its prompt (REINFORCE leave-one-out, Ahmadian et
    al. 2024, arXiv:2402.14740); 0 where there is no other."""
    total, mean, count, _ = _groups(rewards, mask, config.samples_per_prompt)
    # total - (count * mean - total) / (count - 1), with the sum of the others in place of the difference of two sums
    return _for_each_token((total - mean) * count / (count - 1).clamp(min=1), mask), None


def grpo(rewards: Tensor, values: None, mask: Tensor, config: PPOConfig) -> Estimate:
    """The response's total, whitened within the responses to its prompt (group relative policy optimization, Shao et
    al. 2024, arXiv:2402.03300); the std is the unbiased one. The loss stays a mean over the batch's tokens, not over
    responses."""
    total, mean, _, std = _groups(rewards, mask, config.samples_per_prompt)
    return _for_each_token((total - mean) / (std + GRPO_EPSILON), mask), None


def dr_grpo(rewards: Tensor, values: None, mask: Tensor, config: PPOConfig) -> Estimate:
    """The response's total minus the mean of the responses to its prompt: GRPO without the division by the std, which
    favours prompts that are too easy or too hard (Liu et al. 2025, arXiv:2503.20783)."""
    total, mean, _, _ = _groups(rewards, mask, config.samples_per_prompt)
    return _for_each_token(total - mean, mask), None


def _groups(rewards: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each response the total reward, and of its group's valid responses mean, number and unbiased std, each [B]."""
    valid = mask.any(dim=1).view(-1, size)
    totals = rewards.masked_fill(~mask, 0).sum(dim=1).view(-1, size)
    count = valid.sum(dim=1, keepdim=True)
    mean = totals.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (totals - mean).masked_fill(~valid, 0)
    std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    mean, count, std = (one.expand(-1, size).flatten() for one in (mean, count, std))
    return totals.flatten(), mean, count, std


def _for_each_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages [B] of responses at each of their tokens [B, T]."""
    return torch.where(mask, advantages[:, None], 0.0)


ESTIMATORS: dict[str, Estimator] = {
    "gae": gae,
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
}
WITH_CRITIC = ("gae", "reinforce")
