"""Step 7: what a PPO batch looked like, and what its update did, as numbers for the log."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elastic_lightning.algorithms.ppo.experience import Experience
from elastic_lightning.algorithms.ppo.rollout import ScoredRollout
from elastic_lightning.functional import kl_k1, kl_k3
from elastic_lightning.policies import ended
from elastic_lightning.policies.special_tokens import Ends


class Counts(NamedTuple):
    """Of a batch: rows with a score, rows that were left out, valid tokens."""

    rows: int
    left_out: int
    tokens: int


def batch_statistics(
    scored: ScoredRollout, experience: Experience, eos_token_id: Ends, device: torch.device
) -> tuple[Counts, dict[str, float]]:
    """Counts of a batch and its means, read from the device at once.

    Means are over the rows that have a score: of the reward and its parts (reward_*), of the return (the sum of what
    the tokens were rewarded with), of KL in nats a response by two estimators, of the length in tokens, and of whether
    it ended by itself; those named per_token are over valid tokens. `explained_variance` is that of the values, where
    there are any.
    """
    rollout, scores, mask = scored.rollout, scored.scores, scored.rollout.mask
    k1 = kl_k1(rollout.logprobs, scored.reference_logprobs).masked_fill(~mask, 0)
    k3 = kl_k3(rollout.logprobs, scored.reference_logprobs).masked_fill(~mask, 0)
    sums = {
        "rows": mask.any(dim=1).sum(),
        "left_out": (~mask.any(dim=1)).sum(),
        "tokens": mask.sum(),
        "reward": scores.total.sum(),
        "reward_squared": scores.total.square().sum(),
        "k1": k1.sum(),
        "k3": k3.sum(),
        "ended": ended(rollout.responses, eos_token_id).sum(),
        "return": experience.rewards.sum(),
    }
    parts = {f"reward_{name}": part.sum() for name, part in scores.components.items()}
    packed = torch.stack([value.to(device, torch.float64) for value in (*sums.values(), *parts.values())]).tolist()
    total = dict(zip(sums, packed, strict=False))
    rows, tokens = total["rows"], total["tokens"]
    mean = total["reward"] / rows
    measured = {
        "reward": mean,
        "reward_std": max(total["reward_squared"] / rows - mean**2, 0.0) ** 0.5,
        "return": total["return"] / rows,
        "kl": total["k1"] / rows,
        "kl_k3": total["k3"] / rows,
        "kl_per_token": total["k1"] / tokens,
        "kl_k3_per_token": total["k3"] / tokens,
        "length": tokens / rows,
        "eos_rate": total["ended"] / rows,
        **{name: value / rows for name, value in zip(parts, packed[len(sums) :], strict=True)},
    }
    if experience.returns is not None:
        measured["explained_variance"] = explained_variance(rollout.values, experience.returns, mask).item()
    return Counts(int(rows), int(total["left_out"]), int(tokens)), measured


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance of `returns` that `values` explain, over valid tokens: 1 is perfect, 0 is a constant."""
    returns, residuals = returns[mask], (returns - values)[mask]
    return 1 - residuals.var(unbiased=False) / returns.var(unbiased=False).clamp(min=torch.finfo(torch.float32).eps)


def ratio_deviation(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Largest distance of a valid token's policy ratio from 1, of log-ratios [B, T]."""
    return torch.expm1(log_ratio.masked_fill(~mask, 0)).abs().max()


def summarised(measured: dict[str, list[Tensor]], stopped: bool) -> dict[str, float]:
    """Means over mini-batches of what an update measured, and the ratio of the first one, which must be 1."""
    summary = {name: torch.stack(values).mean().item() for name, values in measured.items()}
    summary["first_ratio"] = measured["ratio"][0].item()
    summary["first_ratio_deviation"] = measured["ratio_deviation"][0].item()
    summary["optimizer_steps"] = float(len(measured["grad_norm"]))
    summary["stopped_early"] = float(stopped)
    return summary


def speed(seconds: dict[str, float], counts: Counts) -> dict[str, float]:
    """Seconds and tokens a second of each phase of a PPO batch, and samples a second of the whole."""
    values = {f"time/{name}_seconds": spent for name, spent in seconds.items()}
    values |= {f"time/{name}_tokens_per_second": counts.tokens / spent for name, spent in seconds.items()}
    return values | {"time/samples_per_second": counts.rows / sum(seconds.values())}
