"""Where in its data a run is, and how Lightning's loops are put there again."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning import Trainer


class Position(NamedTuple):
    """Between two training batches, when all that belongs to the first is done: its logging, its validation.

    Lightning's own record of its loops is made for checkpoints written inside a batch. Resumed from one, it leaves out
    the validation that was due, and after an epoch's last batch its counters of epochs no longer agree, so that a
    second interruption begins the epoch anew.

    Attributes:
        epoch: of the last batch, from 0.
        batches: of that epoch that are done.
        epoch_batches: of a whole epoch; None where that is not known.
        total: batches of all epochs.
        logged: Lightning's step of what it logs itself.
    """

    epoch: int
    batches: int
    epoch_batches: int | None
    total: int
    logged: int

    @classmethod
    def of(cls, trainer: Trainer) -> Position:
        """That of a trainer which is about to take the next batch, or at the end of an epoch."""
        loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
        whole = trainer.num_training_batches
        return cls(
            epoch=max(epochs.current.started - 1, 0),
            batches=loop.batch_progress.current.processed,
            epoch_batches=None if whole == float("inf") else int(whole),
            total=loop.batch_progress.total.processed,
            logged=loop._batches_that_stepped,
        )

    @property
    def epoch_done(self) -> bool:
        """Whether the next batch is of another epoch."""
        return self.batches == self.epoch_batches

    @property
    def next_batch(self) -> tuple[int, int]:
        """Epoch of the next batch, and batches before it in that epoch."""
        return (self.epoch + 1, 0) if self.epoch_done else (self.epoch, self.batches)

    def restore(self, loops: dict[str, Any], max_epochs: int | None) -> None:
        """Write this position into the state of the fit loop that Lightning is about to load."""
        epoch, behind = self.next_batch
        over = max_epochs not in (None, -1) and epoch >= max_epochs
        if behind == 0 and not over:  # an epoch begins as any does
            epochs, batches, total, logged = _all(epoch), _all(0), _all(self.total), self.logged
        else:
            # As inside the hooks at a batch's end: Lightning counts it as completed, and begins the next one; after the
            # last batch of all it goes through the end of training.
            epochs = _all(self.epoch + 1, processed=self.epoch, completed=self.epoch)
            batches = _all(self.batches, completed=self.batches - 1)
            total, logged = _all(self.total, completed=self.total - 1), self.logged - 1
        loops["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
        loops["epoch_loop.batch_progress"] = {"total": total, "current": batches, "is_last_batch": over}
        loops["epoch_loop.state_dict"] = {"_batches_that_stepped": logged}
        nothing = {"total": _all(0), "current": _all(0), "is_last_batch": False}
        loops["epoch_loop.val_loop.batch_progress"] = nothing

    def enter(self, trainer: Trainer) -> None:
        """To be called when training starts: an epoch's start is no restart, which Lightning takes it for where
        `max_steps` is set."""
        if self.next_batch[1] == 0:
            trainer.fit_loop.epoch_loop.restarting = False


def _all(count: int, **others: int) -> dict[str, int]:
    return {"ready": count, "started": count, "processed": count, "completed": count} | others
