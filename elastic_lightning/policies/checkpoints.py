"""Checkpoints of Lightning, read without executing anything."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from elastic_lightning.errors import UserError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU: tensors and plain values; a pickle of anything else is not loaded.

    Raises:
        UserError: there is no such file, or it is damaged, or not a checkpoint, or a folder of shards.
    """
    file = Path(path)
    if file.is_dir():
        raise UserError(
            f"{path} is a folder, and a checkpoint is a file (of a sharded run with save_distributed_checkpoint: false)"
        )
    if not file.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds; and its message on pickles advises to load them anyway
        raise UserError(
            f"cannot load the checkpoint {path} ({type(error).__name__}): it is damaged or cut off, or holds objects "
            "beside tensors and plain values, which are never loaded, as they can run any code"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is not a checkpoint of a run: it holds no state_dict")
    return checkpoint
