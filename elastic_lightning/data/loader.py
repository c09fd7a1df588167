"""A loader that goes on where a run stopped, in the protocol that Lightning has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from elastic_lightning.callbacks.position import Position


class ResumableLoader(DataLoader):
    """A `DataLoader` whose sampler has `set_epoch` and `skip`, as those of this project have.

    Its state is the epoch and the batches of it that are done. They are asked for when a checkpoint is written, not
    counted here: a batch that was fetched is not yet one that was trained on.

    Args:
        position: how far the run has come.
        options: those of `DataLoader`.
    """

    def __init__(self, position: Callable[[], Position], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.position = position

    def __iter__(self) -> Iterator[Any]:
        """Nothing is fetched before the first batch is asked for: workers would fetch at once, and Lightning makes the
        iterator before it sets the epoch."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Called by Lightning when it saves."""
        epoch, batches = self.position().next_batch
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Called by Lightning before it iterates; the next iteration begins behind what is done."""
        sampler = self.sampler if hasattr(self.sampler, "skip") else self.batch_sampler
        sampler.set_epoch(state["epoch"])
        sampler.skip = state["batches"]
