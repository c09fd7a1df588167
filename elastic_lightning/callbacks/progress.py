"""A progress bar whose columns are the numbers a person watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from elastic_lightning.terminal import PlainConsole

SHOWN = {  # label -> logged name, format
    "loss": ("train/loss", ".3f"),
    "reward": ("train/reward", ".3f"),
    "kl": ("train/kl", ".2f"),
    "val reward": ("val/reward", ".3f"),
    "perplexity": ("val/perplexity", ".1f"),
    "accuracy": ("val/accuracy", ".3f"),
    "samples/s": ("time/samples_per_second", ".1f"),
}


class Bar(Progress):
    """How far it is, and below, where there are any, the numbers: so that both fit a terminal of 80 columns."""

    @classmethod
    def get_default_columns(cls) -> tuple[ProgressColumn, ...]:
        times = TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn()
        return TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), *times

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["metrics"]) for task in self.tasks if task.fields["metrics"])


class RunProgress(ProgressBar):
    """Reward, KL, perplexity, samples/s and the batches to the next reset, below the bar.

    On a terminal a rich bar; elsewhere (a log file, a batch job) one plain line every `seconds`.

    Args:
        seconds: between plain lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        total = self.total_train_batches * epochs if epochs else None
        if trainer.max_steps and trainer.max_steps > 0 and pl_module.automatic_optimization:
            steps = trainer.max_steps * trainer.accumulate_grad_batches
            total = steps if total is None else min(total, steps)
        done = trainer.fit_loop.total_batch_idx + 1
        self._start("training", total and max(total, done), done)  # a resumed run may be past a lower limit

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._advance(watched(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(watched(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._start("validating the start", sum(trainer.num_sanity_val_batches))
        elif trainer.state.fn == "validate":
            self._start("validating", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn == "validate":
            self._advance("")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._stop()
        elif self._bar is not None and not trainer.sanity_checking:
            self._bar.update(self._task, metrics=watched(trainer))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._advance("")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("predicting", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._advance("")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.console.print(*args)
        elif self._enabled:
            print(*args, flush=True)

    def _start(self, what: str, total: float | None, done: int = 0) -> None:
        self._what, self._done, self._began, self._begun_at = what, done, time.monotonic(), done
        self._total = None if total in (None, float("inf")) else int(total)
        self._last_line = time.monotonic()
        if not self._enabled or sys.stdout is None or not sys.stdout.isatty():
            return
        self._bar = Bar(console=PlainConsole(), refresh_per_second=4)
        self._task = self._bar.add_task(what, total=self._total, completed=done, metrics="")
        self._bar.start()

    def _advance(self, metrics: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, metrics=metrics)
        elif time.monotonic() - self._last_line >= self.seconds:
            self._line(metrics)

    def _stop(self, metrics: str | None = None) -> None:
        if self._bar is not None:
            if metrics is not None:
                self._bar.update(self._task, metrics=metrics)
            self._bar.stop()
            self._bar = self._task = None
        elif metrics is not None:
            self._line(metrics)

    def _line(self, metrics: str) -> None:
        self._last_line = time.monotonic()
        if self._enabled:
            rate = (self._done - self._begun_at) / max(self._last_line - self._began, 1e-9)
            total = "" if self._total is None else f"/{self._total}"
            print(f"{self._what} {self._done}{total}  {rate:.2f} batches/s  {metrics}", flush=True)


def watched(trainer: Trainer) -> str:
    """The numbers a person watches, as one line; those that nothing logs are left out."""
    metrics = trainer.callback_metrics
    parts = [f"{label} {float(metrics[name]):{form}}" for label, (name, form) in SHOWN.items() if name in metrics]
    resets = [getattr(callback, "next_reset", None) for callback in trainer.callbacks]
    parts += [f"next reset in {batches}" for batches in resets if batches is not None]
    return "  ".join(parts)
