"""The configuration of a run, kept in its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer


class RunConfig(Callback):
    """Keeps a plain configuration and the number of processes in each checkpoint, to compare when a run resumes."""

    def __init__(self, version: str) -> None:
        self.version = version  # of this package
        self.config: dict[str, Any] = {}
        self.resumed_from: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the checkpoint that training goes on from the newest, which `last` means: what was written later is of a
        continuation that is given up."""
        folder = Path(trainer.log_dir or "").resolve()  # asked on every rank, for the first one tells the others
        own = self.resumed_from is not None and folder in self.resumed_from.resolve().parents
        if own and trainer.is_global_zero and self.resumed_from.exists():
            os.utime(self.resumed_from)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["world_size"] = self.config, trainer.world_size
        checkpoint["elastic_lightning_version"] = self.version
