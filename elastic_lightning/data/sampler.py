"""The order of the data, as a pure function of (seed, epoch); any batch of an epoch can be the first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

CYCLE = 1000  # epochs of a run before an endless sampler's second round meets the order of a first


class EpochSampler(Sampler[int]):
    """Indices of one rank: each epoch a fresh permutation, cut into global batches of which each rank takes its slice.

    The global batch therefore holds the same rows on any number of ranks. Set ``use_distributed_sampler=False`` on the
    trainer, or Lightning would shard a second time.

    Args:
        size: of the data set.
        batch_size: rows a batch on one rank.
        seed: of the permutations.
        shuffle: False keeps the order, and the last batch although it is smaller.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world_size, self.epoch = rank, world_size, 0
        self.skip = 0  # batches that the next iteration leaves out, and it alone

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        skip, self.skip = self.skip, 0
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for start, end in self._slices()[skip:]:
            yield from order[start:end]

    def __len__(self) -> int:
        return sum(end - start for start, end in self._slices())

    def _slices(self) -> list[tuple[int, int]]:
        """Where in an epoch's order this rank's batches begin and end."""
        step = self.batch_size * self.world_size
        end = self.size - self.size % step if self.shuffle else self.size
        slices = []
        for start in range(0, end, step):
            rows = min(step, end - start)  # the last batch is as even as it can be
            first, beyond = (start + rows * rank // self.world_size for rank in (self.rank, self.rank + 1))
            slices.append((first, beyond))
        return slices


class LengthSampler(Sampler[list[int]]):
    """Batches of rows of like length, for one rank: little padding, and still a pure function of (seed, epoch).

    An epoch is a fresh permutation, sorted by length and cut into global batches, which come in random order; rows of
    equal length meet by chance. As in `EpochSampler` a global batch holds the same rows on any number of ranks. Give it
    to a `DataLoader` as its `batch_sampler`. The number of batches is that of every epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows a batch on one rank; each epoch leaves out a few rows at random, so that all batches are whole.
        batch_tokens: instead of `batch_size`: the tokens that rows times the longest of them may make on one rank.
        times: how often an epoch has each row; once by default.
        seed: of the permutations.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        times: Sequence[int] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if (batch_size is None) == (batch_tokens is None):
            raise ValueError("give exactly one of batch_size and batch_tokens")
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.skip = 0  # batches that the next iteration leaves out, and it alone
        self.rows = torch.arange(len(lengths))
        if times is not None:
            self.rows = self.rows.repeat_interleave(torch.tensor(times))
        self.lengths = torch.tensor(lengths)[self.rows]
        if batch_size is not None:
            step = batch_size * world_size
            self.ends = list(range(step, len(self.rows) + 1, step))
        else:
            self.ends = _ends_within(sorted(self.lengths.tolist()), batch_tokens * world_size, world_size)

    @property
    def sampler(self) -> LengthSampler:
        """Where Lightning looks for `set_epoch` in a loader that has a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        if not self.ends:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.rows), generator=generator)[: self.ends[-1]]
        order = order[self.lengths[order].argsort(stable=True)]
        starts = [0, *self.ends[:-1]]
        for batch in torch.randperm(len(self.ends), generator=generator).tolist()[skip:]:
            share = order[starts[batch] : self.ends[batch]].tensor_split(self.world_size)[self.rank]
            yield self.rows[share].tolist()

    def __len__(self) -> int:
        return len(self.ends)


class EndlessSampler(Sampler[list[int]]):
    """Epoch after epoch of a sampler, without end: for a loader that accompanies another one, which ends.

    What epoch e of the run draws begins with the sampler's epoch e, and is as pure a function of the epoch.
    """

    def __init__(self, epochs: LengthSampler) -> None:
        self.epochs, self.epoch = epochs, 0
        self.skip = 0  # batches that the next iteration leaves out, and it alone

    @property
    def sampler(self) -> EndlessSampler:
        """Where Lightning looks for `set_epoch` in a loader that has a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        whole, rest = divmod(skip, len(self.epochs))
        for cycle in itertools.count(whole):
            self.epochs.set_epoch(self.epoch + cycle * CYCLE)
            self.epochs.skip = rest if cycle == whole else 0
            yield from self.epochs


def even_batch_size(rows: int, batch_size: int, world_size: int) -> int:
    """The batch size of one rank, raised until the rows that are left for the last batch suffice for every rank: then
    all have as many batches. At most all rows in one batch, of which there must be as many as ranks."""
    while 0 < rows % (batch_size * world_size) < world_size <= rows:
        batch_size += 1
    return batch_size


def sorted_in_batches(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """An order of all rows in which each batch holds rows of like length; the last, smaller batch stays the last."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    whole = len(order) // batch_size
    batches = torch.randperm(whole, generator=torch.Generator().manual_seed(seed)).tolist()
    starts = [batch * batch_size for batch in [*batches, whole]]
    return [row for start in starts for row in order[start : start + batch_size]]


def _ends_within(lengths: Sequence[int], tokens: int, least: int) -> list[int]:
    """Where to cut rows of rising length, so that rows times the longest make `tokens` at most, but `least` rows."""
    ends, start = [], 0
    for row, length in enumerate(lengths):
        if row - start >= least and (row - start + 1) * length > tokens:
            ends.append(row)
            start = row
    if ends and len(lengths) - start < least:
        ends.pop()  # too few for every rank: they join the batch before
    return [*ends, len(lengths)] if len(lengths) >= least else []
