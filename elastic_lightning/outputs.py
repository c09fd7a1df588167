"""Folders to write to: whether they can be, looked at before there is anything to lose."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_lightning.errors import UserError

RUN_FILES = (
    "events.out.tfevents.*",
    "metrics.csv",
    "config.yaml",
    "samples.jsonl",
    "checkpoints",
    "final",
    "best",
    "ema",
)


def check_writable(folder: Path, what: str) -> None:
    """Raise a `UserError` where a folder cannot be made or written to; `what` is to go there, for the message."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"cannot write {what} to {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {what} to {folder}: no permission to write in {there}")


def check_free(folder: Path) -> None:
    """Raise a `UserError` where a new run would write over another one's files, or anybody's of such a name."""
    taken = next((path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))), None)
    if taken is not None:
        raise UserError(
            f"{folder} already holds a run ({taken.name}): remove it, choose another trainer.logger.init_args.version "
            "(without a logger: trainer.default_root_dir), or resume with --ckpt_path"
        )
