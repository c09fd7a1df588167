"""Several rewards as one."""

from __future__ import annotations

from torch import Tensor, nn

from elastic_lightning.errors import UserError
from elastic_lightning.rewards.base import Reward, score


class WeightedReward(Reward):
    """Weighted sum of named rewards; each part is logged before weighting.

    Each part has its own `retries` and `on_error`; a response that one of them masks has no score.

    Args:
        rewards: name -> reward.
        weights: name -> weight; 1 for a name that is left out.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if not rewards:
            raise UserError("a WeightedReward needs at least one reward")
        unknown = sorted(set(weights or {}) - set(rewards))
        if unknown:
            raise UserError(f"weights for rewards that are not there: {unknown}; the rewards are {sorted(rewards)}")
        self.rewards = nn.ModuleDict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}

    def parts(self) -> dict[str, Reward]:
        """The rewards by name."""
        return dict(self.rewards.items())

    def combine(self, components: dict[str, Tensor]) -> Tensor:
        """Weighted sum [B]."""
        first, *rest = [self.weights[name] * values for name, values in components.items()]
        return sum(rest, start=first)

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores [B] float32; a response that a part masks has none, and raises."""
        scores = score(self, prompts, responses)
        if scores.valid is not None and not scores.valid.all():
            raise RuntimeError("a part of the WeightedReward has no score for a response")
        return scores.total
