"""From scores to advantages: what a PPO batch learns from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elastic_lightning.algorithms.ppo_config import PPOConfig
from elastic_lightning.functional import gae, kl_k1, kl_k2, kl_k3, whiten
from elastic_lightning.policies import Rollout, ended
from elastic_lightning.policies.special_tokens import Ends

KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class Experience(NamedTuple):
    """Per-token training signal, each [B, T] float32 and 0 at padding."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def without_unscored(rollout: Rollout, valid: Tensor | None) -> Rollout:
    """The rollout in which responses that have no score (`valid` [B] bool, all where it is None) hold no valid token,
    so that nothing is learned from them."""
    if valid is None:
        return rollout
    mask = rollout.mask & valid[:, None]
    return Rollout(rollout.tokens, mask, *(part.masked_fill(~mask, 0) for part in rollout[2:]))


def shape_scores(scores: Tensor, rollout: Rollout, config: PPOConfig, eos_token_id: Ends) -> Tensor:
    """Scores [B] after the baseline, the clip and the penalty for responses that did not end."""
    scores = scores - config.reward_baseline
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    if config.missing_eos_penalty:
        scores = scores - config.missing_eos_penalty * (~ended(rollout.responses, eos_token_id)).float()
    return scores


def make_experience(
    rollout: Rollout,
    scores: Tensor,
    reference_logprobs: Tensor,
    kl_coefficient: float,
    config: PPOConfig,
) -> Experience:
    """Per-token rewards (KL penalty everywhere, the score [B] at the last token), then GAE, then whitening.

    Returns use the advantages *before* whitening, as they are targets in units of reward.
    """
    penalty = KL_ESTIMATORS[config.kl_estimator](rollout.logprobs, reference_logprobs)
    rewards = -kl_coefficient * penalty
    last = (rollout.mask.sum(dim=1) - 1).clamp(min=0)  # a response that is left out has no valid token
    rewards = rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype)).masked_fill(~rollout.mask, 0)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollout.mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, rollout.mask)
    return Experience(rewards, advantages, returns)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of `returns` that `values` explain, over valid tokens: 1 is perfect, 0 is a constant."""
    returns, residuals = returns[mask], (returns - values)[mask]
    return 1 - residuals.var(unbiased=False) / returns.var(unbiased=False).clamp(min=torch.finfo(torch.float32).eps)
