"""The configuration of a run, kept in its checkpoints."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class RunConfig(Callback):
    """Keeps a plain configuration and the number of processes in each checkpoint, to compare when a run resumes."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"], checkpoint["world_size"] = self.config, trainer.world_size
