"""The configuration of a run, kept in its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from elastic_lightning.callbacks.weight_sets import WeightSets

METHODS = (  # callbacks that are part of what a run is, for they decide what becomes of its weights
    WeightSets,
    WeightAveraging,
    StochasticWeightAveraging,
    BaseFinetuning,
    GradientAccumulationScheduler,
    ModelPruning,
)


class RunConfig(Callback):
    """Keeps a plain configuration, the method and the machine in each checkpoint, to compare when a run resumes."""

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
        checkpoint["method"], checkpoint["machine"] = method_of(trainer), machine_of(trainer)


def method_of(trainer: Trainer) -> list[str]:
    """Classes of the callbacks that move weights."""
    return sorted(type(callback).__name__ for callback in trainer.callbacks if isinstance(callback, METHODS))


def machine_of(trainer: Trainer) -> dict[str, Any]:
    """What decides how sums are rounded, beside the configuration."""
    return {
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "device": trainer.strategy.root_device.type,
        "instructions of the CPU": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
    }


def replaced_callbacks(files: Iterable[Path], callbacks: list[Any]) -> list[str]:
    """A line for each configuration file that names callbacks which a run with these `callbacks` has no more: what sets
    ``trainer.callbacks`` once more replaces the whole list."""
    kept = {_short_name(callback) for callback in callbacks}
    lines = []
    for file in files:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        trainer = settings.get("trainer") if isinstance(settings, dict) else None
        given = [trainer.get(key) or [] for key in ("callbacks", "callbacks+")] if isinstance(trainer, dict) else []
        named = [callback for part in given for callback in (part if isinstance(part, list) else [part])]
        gone = [name for name in dict.fromkeys(map(_short_name, named)) if name not in kept]
        if gone:
            lines.append(
                f"{', '.join(gone)} of {file} {'is' if len(gone) == 1 else 'are'} not in this run, for "
                "trainer.callbacks was set again; `callbacks+` adds to the list"
            )
    return lines


def _short_name(callback: Any) -> str:
    """Of a class, given by itself or as ``class_path``."""
    name = callback.get("class_path", "") if hasattr(callback, "get") else callback
    return str(name).rsplit(".", 1)[-1]
