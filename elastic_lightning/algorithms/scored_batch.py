"""The rows of several processes brought together: a PPO batch is one batch, however many ranks sampled it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_lightning.policies import PairedTexts, Prompts, Rollout
from elastic_lightning.ranks import gather, objects_of_ranks
from elastic_lightning.rewards import Scores


class ScoredBatch(NamedTuple):
    """What was sampled and how it was scored, row by row.

    `reference_logprobs` is [B, T] as everything in the rollout; `trunk` [B, P+T-1, H] and `pairs` are those of
    `MiniBatch`.
    """

    prompts: Prompts
    rollout: Rollout
    scores: Scores
    reference_logprobs: Tensor
    trunk: Tensor | None = None
    pairs: PairedTexts | None = None

    def of_all_ranks(self) -> ScoredBatch:
        """The rows of all ranks in their order, the same on each: one rank's batch, had it sampled them all."""
        prompts = _gather_each(self.prompts, left=True)
        rollout = _gather_each(self.rollout)
        trunk = self.trunk
        if trunk is not None:
            missing = rollout.tokens.shape[1] - self.rollout.tokens.shape[1]
            trunk = gather(F.pad(trunk, (0, 0, 0, missing)), left=True)
        held = self.scores.components  # none on a rank whose every response is masked
        names = dict.fromkeys(name for names in objects_of_ranks([*held]) for name in names)
        components = {name: gather(held.get(name, torch.zeros_like(self.scores.total))) for name in names}
        pairs = self.pairs
        if pairs is not None:
            pairs = PairedTexts(_gather_each(pairs.source, left=True), _gather_each(pairs.target))
        scores = Scores(gather(self.scores.total), components)
        return ScoredBatch(prompts, rollout, scores, gather(self.reference_logprobs), trunk, pairs)


def _gather_each(parts: NamedTuple, left: bool = False) -> NamedTuple:
    return type(parts)(*(gather(tensor, left) for tensor in parts))
