"""Checkpoint files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from elastic_lightning.policies.checkpoints import check_undamaged


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file beside the target, has it on the disk, and only then gives it its name.

    Lightning's own writes into the system's folder for temporary files first, and does not wait for the disk; and it
    loads a file in which bits have changed.
    """

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        if Path(path).is_file():
            check_undamaged(path)
        return super().load_checkpoint(path, *arguments, **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.writing")
        try:
            with fresh.open("wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def write_whole(trainer: Trainer, path: Path) -> OSError | None:
    """Have all ranks make a checkpoint and the first one write it; returns what went wrong there."""
    try:
        trainer.save_checkpoint(path, weights_only=False)
    except OSError as error:
        trainer.strategy.barrier()  # where the other ranks wait, at the end of saving
        return error
    return None


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch says where in its code a write failed, but not why
            raise error.__context__ from None
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
