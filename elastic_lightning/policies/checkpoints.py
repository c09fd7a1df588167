"""Checkpoints of Lightning, read without executing anything, and not where they are damaged."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import torch

from elastic_lightning.errors import UserError

CHUNK = 2**20  # bytes read at a time


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
    check_undamaged(file)
    try:
        checkpoint = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises many kinds; and its message on pickles advises to load them anyway
        raise UserError(
            f"cannot load the checkpoint {path} ({type(error).__name__}): it is damaged or cut off, or holds objects "
            f"beside tensors and plain values, which are never loaded, as they can run any code{_instead(file)}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of a run: it holds no state_dict")
    return checkpoint


def check_undamaged(path: str | Path) -> None:
    """Raise a `UserError` where bytes of a checkpoint are not those that torch wrote: it is a zip, which keeps a CRC-32
    of each record (torch itself does not look). A file is read once for it, about a second for 2 GB."""
    file = Path(path)
    problem = _damage(file, file.stat().st_size, file.stat().st_mtime_ns) if zipfile.is_zipfile(file) else None
    if problem:
        raise UserError(f"the checkpoint {path} is damaged ({problem}){_instead(file)}")


@functools.lru_cache(maxsize=64)
def _damage(file: Path, size: int, changed: int) -> str | None:
    """What is wrong with a zip, asked once while its size and time stay as they are."""
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC == 0:  # torch.serialization.set_crc32_options(False)
                    continue
                with archive.open(record) as content:
                    while content.read(CHUNK):
                        continue
    except Exception as error:  # a flipped bit may as well ask for a password or another compression
        return str(error) or type(error).__name__
    return None


def _instead(damaged: Path) -> str:
    """Words that name the newest other checkpoint in a damaged one's folder that is whole."""
    others = [path for path in damaged.parent.glob("*.ckpt") if path.name != damaged.name and zipfile.is_zipfile(path)]
    for path in sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if _damage(path, path.stat().st_size, path.stat().st_mtime_ns) is None:
            return f"; the newest good one beside it is {path}: give it as --ckpt_path"
    return ""
