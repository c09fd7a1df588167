"""One PPO batch cut into mini-batches and micro-batches, without the padding that their rows do not need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from elastic_lightning.algorithms.experience import Experience
from elastic_lightning.algorithms.ppo_config import PPOConfig
from elastic_lightning.errors import UserError
from elastic_lightning.policies import PairedTexts, Prompts, Rollout


class MiniBatch(NamedTuple):
    """Rows of one PPO batch: everything the loss reads.

    `trunk` [B, P+T-1, H] is what leaves the frozen layers, where there are any (see `CausalLM.trunk_hidden`); `pairs`
    are texts that a second model learns from beside the policy, one pair a row.
    """

    prompts: Prompts
    rollout: Rollout
    experience: Experience
    trunk: Tensor | None = None
    pairs: PairedTexts | None = None

    def rows(self, index: Tensor) -> MiniBatch:
        """The given rows of every tensor."""
        parts = (type(part)(*(tensor[index] for tensor in part)) for part in self[:3])
        trunk = None if self.trunk is None else self.trunk[index]
        return MiniBatch(*parts, trunk, None if self.pairs is None else self.pairs.rows(index))

    def trimmed(self, prompt: int, response: int) -> MiniBatch:
        """Only the last `prompt` columns of the prompts and the first `response` of the responses."""
        skipped = self.prompts.tokens.shape[1] - prompt
        return MiniBatch(
            Prompts(*(tensor[:, skipped:] for tensor in self.prompts)),
            Rollout(*(tensor[:, :response] for tensor in self.rollout)),
            Experience(*(tensor[:, :response] for tensor in self.experience)),
            None if self.trunk is None else self.trunk[:, skipped : skipped + prompt + response - 1],
            None if self.pairs is None else self.pairs.trimmed(),
        )


class Lengths(NamedTuple):
    """Valid tokens of each prompt and response, int64 [B] on the CPU: cutting a batch does not wait for a GPU."""

    prompts: Tensor
    responses: Tensor

    @classmethod
    def of(cls, batch: MiniBatch) -> Lengths:
        """The lengths of a batch's rows."""
        return cls(batch.prompts.mask.sum(dim=1).cpu(), batch.rollout.mask.sum(dim=1).cpu())

    def order(self, rows: Tensor) -> Tensor:
        """The given rows from the shortest to the longest."""
        return rows[(self.prompts + self.responses)[rows].argsort(stable=True)]


def check_rows(rows: list[int], rank: int, config: PPOConfig, sharded: bool) -> None:
    """Raise a `UserError` where a PPO batch cannot be cut into mini-batches.

    Args:
        rows: of the batch, on each rank.
        rank: this one.
        config: says into how many, and how large a micro-batch is.
        sharded: weights are, and then a mini-batch must have as many micro-batches on every rank.
    """
    if rows[rank] < config.mini_batches:
        raise UserError(
            f"a batch of {rows[rank]} prompts cannot be cut into {config.mini_batches} mini-batches: "
            "raise data's batch_size or lower ppo.mini_batches"
        )
    parts = config.mini_batches * len(rows)
    unlike = config.micro_batch_size is not None and sum(rows) % parts
    if sharded and (unlike or sum(rows) < parts):
        raise UserError(
            f"a batch of {sum(rows)} prompts in {config.mini_batches} mini-batches over {len(rows)} processes: "
            "where weights are sharded every process must run the policy equally often; let the batch of all "
            "processes be a multiple of mini-batches x processes"
        )


def micro_batches(batch: MiniBatch, rows: Tensor, lengths: Lengths, size: int | None) -> Iterator[MiniBatch]:
    """The given rows (on the CPU), `size` at a time (all by default), rows of like length together and trimmed."""
    for part in lengths.order(rows).split(size or len(rows)):
        prompt, response = (max(1, int(length[part].max())) for length in lengths)  # responses may all be left out
        # Not blocking: the update waits for the device once a mini-batch, where it asks whether all is finite.
        index = part.to(batch.prompts.tokens.device, non_blocking=True)
        yield batch.rows(index).trimmed(prompt, response)
