"""The rows of several processes brought together: a PPO batch is one batch, however many ranks sampled it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from elastic_lightning.policies import PairedTexts, Prompts, Rollout
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
        components = {name: gather(part) for name, part in self.scores.components.items()}
        pairs = self.pairs
        if pairs is not None:
            pairs = PairedTexts(_gather_each(pairs.source, left=True), _gather_each(pairs.target))
        scores = Scores(gather(self.scores.total), components)
        return ScoredBatch(prompts, rollout, scores, gather(self.reference_logprobs), trunk, pairs)


def rows_of_ranks(rows: int) -> list[int]:
    """How many rows each rank has, each saying how many it has itself."""
    if not several():
        return [rows]
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    counts[dist.get_rank()] = rows
    return sum_of_ranks(counts).tolist()


def any_rank(values: Tensor) -> bool:
    """Whether any value is true on any rank."""
    found = values.any().to(torch.int32)
    if several():
        dist.all_reduce(found)
    return bool(found)


def gather(tensor: Tensor, left: bool = False) -> Tensor:
    """The rows [B, L, ...] of all ranks in their order, filled up with zeros to the longest L of any (or [B] alone).

    Args:
        tensor: of this rank: its B and L may be its own, what follows is that of all.
        left: fill up on the left.
    """
    shapes = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64)
    shapes[dist.get_rank()] = torch.tensor(tensor.shape[:2] if tensor.dim() > 1 else (len(tensor), 0))
    shapes = sum_of_ranks(shapes)
    rows, length = shapes[:, 0].tolist(), int(shapes[:, 1].max())
    if tensor.dim() > 1:
        missing = length - tensor.shape[1]
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + ((missing, 0) if left else (0, missing)))
    whole = tensor.new_zeros(max(rows), *tensor.shape[1:])
    whole[: len(tensor)] = tensor
    parts = [torch.empty_like(whole) for _ in rows]
    dist.all_gather(parts, whole)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_of_ranks(counts: Tensor) -> Tensor:
    """The sum over ranks of a small tensor on the CPU."""
    if not several():
        return counts
    # NCCL wants it on this rank's device.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else counts.device
    summed = counts.to(device, copy=True)
    dist.all_reduce(summed)
    return summed.cpu()


def mean_of_ranks(value: float) -> float:
    """The mean over ranks of a number that each has."""
    if not several():
        return value
    return (sum_of_ranks(torch.tensor([value], dtype=torch.float64)) / dist.get_world_size()).item()


def _gather_each(parts: NamedTuple, left: bool = False) -> NamedTuple:
    return type(parts)(*(gather(tensor, left) for tensor in parts))
