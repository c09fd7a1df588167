"""The order of the data, as a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        step = self.batch_size * self.world_size
        end = self.size - self.size % step if self.shuffle else self.size
        for start in range(self.rank * self.batch_size, end, step):
            yield from order[start : min(start + self.batch_size, end)]

    def __len__(self) -> int:
        return sum(1 for _ in self)
