"""Step 5: from scores to advantages, what a PPO batch learns from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from elastic_lightning.algorithms.ppo.advantages import ESTIMATORS
from elastic_lightning.algorithms.ppo.config import PPOConfig
from elastic_lightning.functional import kl_k1, kl_k2, kl_k3, whiten
from elastic_lightning.policies import Rollout, ended
from elastic_lightning.policies.special_tokens import Ends

KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


class Experience(NamedTuple):
    """Per-token training signal, each [B, T] float32 and 0 at padding; no returns without a critic."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None


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
    """Per-token rewards (KL penalty everywhere, the score [B] at the last token), then advantages, then whitening.

    Returns use the advantages *before* whitening, as they are targets in units of reward.
    """
    penalty = KL_ESTIMATORS[config.kl_estimator](rollout.logprobs, reference_logprobs)
    rewards = -kl_coefficient * penalty
    last = (rollout.mask.sum(dim=1) - 1).clamp(min=0)  # a response that is left out has no valid token
    rewards = rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype)).masked_fill(~rollout.mask, 0)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollout.mask, shift_mean=False)
    advantages, returns = ESTIMATORS[config.advantage](rewards, rollout.values, rollout.mask, config)
    if config.whitens_advantages:
        advantages = whiten(advantages, rollout.mask)
    return Experience(rewards, advantages, returns)
