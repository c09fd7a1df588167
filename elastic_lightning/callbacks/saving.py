"""What a run leaves behind: `save_pretrained` folders and checkpoints."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from elastic_lightning.errors import UserError


class SavePretrained(Callback):
    """Writes ``<run folder>/final`` at the end and, where `monitor` is given, ``<run folder>/best`` at each new best.

    Any transformers user can load them, and the next stage starts from them.

    Args:
        monitor: the metric that decides which validation is best, e.g. ``val/reward``.
        mode: whether more or less of it is better.
        adapter: for LoRA: "merged" into the base model, or the "adapter" alone.
        folder: in place of the run folder.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        adapter: Literal["merged", "adapter"] = "merged",
        folder: str | None = None,
    ) -> None:
        self.monitor, self.mode, self.adapter, self.folder = monitor, mode, adapter, folder
        self.best: float | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise UserError(f"SavePretrained: nothing logs {self.monitor!r}; validation logs {known}")
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value > self.best if self.mode == "max" else value < self.best)
        if better and not math.isnan(value):  # nothing is better than NaN: it would stay the best
            self.best = value
            self._save(trainer, pl_module, "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module, "final")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def _save(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        folder = self.folder or trainer.log_dir
        sharded = type(trainer.strategy).__name__ == "ModelParallelStrategy"  # then every rank holds a part
        if trainer.fast_dev_run or not (trainer.is_global_zero or sharded):
            return
        if folder is None:
            raise UserError("SavePretrained needs a run folder: give the trainer a logger, or the callback a `folder`")
        target, fresh = Path(folder) / name, Path(folder) / f"{name}.writing"
        if trainer.is_global_zero:
            shutil.rmtree(fresh, ignore_errors=True)
        pl_module.save_pretrained(fresh, adapter=self.adapter)
        if not trainer.is_global_zero:
            return
        shutil.rmtree(target, ignore_errors=True)
        os.replace(fresh, target)


class BatchCheckpoint(Checkpoint):
    """Saves ``<run folder>/checkpoints/batch_<n>.ckpt`` every `every` training batches, and keeps the last ones.

    For PPO a training batch is a PPO batch; Lightning's ModelCheckpoint counts optimizer steps, of which a PPO batch
    has many and, with early stopping, not always as many. A file appears under its name when it is whole.

    Args:
        every: training batches between checkpoints.
        keep: how many of the latest stay.
    """

    def __init__(self, every: int, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise UserError(f"BatchCheckpoint: every and keep must be 1 or more, got {every} and {keep}")
        self.every, self.keep = every, keep
        self.batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        if self.batches % self.every == 0 and not trainer.fast_dev_run:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    def _save(self, trainer: Trainer) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        target = folder / f"batch_{self.batches:06d}.ckpt"
        trainer.save_checkpoint(target.with_suffix(".writing"), weights_only=False)
        if trainer.is_global_zero:
            os.replace(target.with_suffix(".writing"), target)
            # What counts higher is of another run in the same folder, and would push out the file just written.
            mine = sorted(path for path in folder.glob("batch_*.ckpt") if path <= target)
            for old in mine[: -self.keep]:
                old.unlink()
