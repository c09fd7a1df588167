"""Steps 1 to 4: prompts, what was sampled for them, how it was scored, and how likely the reference finds it."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.policies import Prompts, Rollout
from elastic_lightning.ranks import gather, max_of_ranks, objects_of_ranks, several
from elastic_lightning.rewards import Scores

Batch = TypeVar("Batch")


class ScoredRollout(NamedTuple):
    """Sampled responses and what is known of them, row by row.

    `reference_logprobs` is [B, T] as everything in the rollout; `frozen_hidden` [B, P+T-1, H] is what leaves the frozen
    layers, where there are any (see `CausalLM.trunk_hidden`); `deviation` is how far ratios were from 1, a scalar,
    where log-probabilities were computed again. A response without a score has no valid token.
    """

    prompts: Prompts
    rollout: Rollout
    scores: Scores
    reference_logprobs: Tensor
    frozen_hidden: Tensor | None = None
    deviation: Tensor | None = None


def repeated(batch: Batch, times: int) -> Batch:
    """Each row of every tensor and list of a batch (named tuples, dicts, nested) `times` times, copies side by side."""
    if times == 1:
        return batch
    if isinstance(batch, Tensor):
        return batch.repeat_interleave(times, dim=0)
    if isinstance(batch, dict):
        return {name: repeated(part, times) for name, part in batch.items()}
    if hasattr(batch, "_fields"):
        return type(batch)(*(repeated(part, times) for part in batch))
    return [row for row in batch for _ in range(times)]


def check_rows(rows: list[int], rank: int, mini_batches: int, micro_batch_size: int | None, sharded: bool) -> None:
    """Raise a `UserError` where a PPO batch cannot be cut into mini-batches.

    Args:
        rows: of the batch, on each rank.
        rank: this one.
        mini_batches: into how many a batch is cut.
        micro_batch_size: rows of a forward pass; None is all.
        sharded: weights are, and then a mini-batch must have as many micro-batches on every rank.
    """
    if rows[rank] < mini_batches:
        raise UserError(
            f"a batch of {rows[rank]} prompts cannot be cut into {mini_batches} mini-batches: "
            "raise data's batch_size or lower ppo.mini_batches"
        )
    parts = mini_batches * len(rows)
    if sharded and (sum(rows) < parts or (micro_batch_size is not None and sum(rows) % parts)):
        raise UserError(
            f"a batch of {sum(rows)} prompts in {mini_batches} mini-batches over {len(rows)} processes: "
            "where weights are sharded every process must run the policy equally often; let the batch of all "
            "processes be a multiple of mini-batches x processes"
        )


def of_all_ranks(own: ScoredRollout) -> ScoredRollout:
    """The rows of all ranks in their order, the same on each: one rank's batch, had it sampled them all.

    Raises:
        NotFinite: no response of any rank has a score.
    """
    valid = own.scores.valid
    if valid is not None:  # nothing is learned from the others
        mask = own.rollout.mask & valid[:, None]
        rest = (None if part is None else part.masked_fill(~mask, 0) for part in own.rollout[2:])
        own = own._replace(rollout=Rollout(own.rollout.tokens, mask, *rest))
    if several():
        rollout = gather_each(own.rollout)
        frozen = own.frozen_hidden
        if frozen is not None:
            missing = rollout.tokens.shape[1] - own.rollout.tokens.shape[1]
            frozen = gather(F.pad(frozen, (0, 0, 0, missing)), left=True)
        held, none = own.scores.components, torch.zeros_like(own.scores.total)  # no parts where every row is masked
        names = dict.fromkeys(name for names in objects_of_ranks([*held]) for name in names)
        components = {name: gather(held.get(name, none)) for name in names}
        scores = Scores(gather(own.scores.total), components)
        prompts, reference_logprobs = gather_each(own.prompts, left=True), gather(own.reference_logprobs)
        deviation = None if own.deviation is None else max_of_ranks(own.deviation)
        own = ScoredRollout(prompts, rollout, scores, reference_logprobs, frozen, deviation)
    if valid is not None and not own.rollout.mask.any():
        raise NotFinite("reward", f"it raised on all {len(own.prompts.tokens)} responses")
    return own


def gather_each(parts: NamedTuple, left: bool = False) -> NamedTuple:
    """`gather` of every tensor of a named tuple."""
    return type(parts)(*(None if tensor is None else gather(tensor, left) for tensor in parts))
