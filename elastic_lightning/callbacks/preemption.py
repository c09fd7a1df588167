"""A polite end for a job that must go: the batch in hand is finished and saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import Any

from lightning import Callback, LightningModule, Trainer

from elastic_lightning.callbacks.saving import BatchCheckpoint
from elastic_lightning.errors import UserError
from elastic_lightning.signals import RAISED_FOR, STOPPING, Interrupted


class Preempted(SystemExit):
    """Training ended because it was asked to, with exit status 0; the text says what was saved."""

    def __init__(self, text: str) -> None:
        super().__init__(0)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Preemption(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C the training batch (for PPO: the PPO batch) is finished and saved; then `Preempted`
    ends training. On several ranks it is enough that one of them gets the signal. Ctrl-C once more ends it at once, by
    `Interrupted`, and nothing is saved.

    The first two are the signals that SLURM sends before a job's time is over (``#SBATCH --signal=SIGUSR1@90``).
    Lightning's own answer, which saves in the middle of a batch and requeues the job, is taken out: whoever starts the
    job decides whether it starts again. The trainer needs a `BatchCheckpoint`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._says = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not any(isinstance(callback, BatchCheckpoint) for callback in trainer.callbacks):
            raise UserError("Preemption needs a BatchCheckpoint among the trainer's callbacks, which saves the batch")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: Lightning has just put its own handlers in, and gives back what was there when training ends.
        swallowed = RAISED_FOR[0] if RAISED_FOR else None  # in what came before
        self.received = signal.SIGTERM if trainer.received_sigterm else swallowed
        self._process, self._says = os.getpid(), trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in heard}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:  # where Lightning has not given back its own
                signal.signal(number, handler)
        self._before = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches != 0:
            return
        asked = self.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and not trainer.fast_dev_run:
            (checkpoint, *_) = (callback for callback in trainer.callbacks if isinstance(callback, BatchCheckpoint))
            path = checkpoint.save(trainer)
            name = "another rank's signal" if self.received is None else self.received.name
            raise Preempted(f"stopped by {name} after batch {checkpoint.batches}, saved as {path}")

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # in a worker of a data loader, whose batches are still wanted
        again = number == self.received == signal.SIGINT
        self.received = signal.Signals(number)
        if again:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # on the way out there is nothing to interrupt
            raise Interrupted(number)
        if number == signal.SIGINT and self._says:
            text = "\nCtrl-C: the batch in hand is finished and saved; once more ends it at once, and loses the batch\n"
            with contextlib.suppress(OSError):  # nobody may be listening
                os.write(2, text.encode())  # for print may be what was interrupted
