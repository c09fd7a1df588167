"""Places to write to: whether they can be, and whose work stands there, looked at before there is anything to lose."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from elastic_lightning.errors import UserError

RUN_FILES = (
    "events.out.tfevents.*",
    "metrics.csv",
    "config.yaml",
    "hparams.yaml",
    "samples.jsonl",
    "checkpoints",
    "final",
    "best",
    "ema",
)
ASIDE = re.compile(r"\.old-\d+$")  # ends the name of what was moved aside
UNSAVED = ".unsaved"  # lies in a run's folder until its first checkpoint: what is there then is nothing to go on from


def check_writable(folder: Path, what: str) -> None:
    """Raise a `UserError` where a folder cannot be made or written to; `what` is to go there, for the message."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"cannot write {what} to {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {what} to {folder}: no permission to write in {there}")


def check_folder(place: Path) -> None:
    """Raise a `UserError` where a folder is to be written and something else stands: a file, or a link to anything."""
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        kind = "link" if place.is_symlink() else "file"
        raise UserError(f"{place} is a {kind}, and a folder is to be written there: move it away")


def ended_unsaved(folder: Path) -> bool:
    """Whether a folder holds what is left of a run that ended before its first checkpoint."""
    return (folder / UNSAVED).is_file() and not any((folder / "checkpoints").glob("*.ckpt"))


def clear_unsaved(folder: Path) -> list[str]:
    """Remove what such a run left, and return the names; files of other names stay."""
    left = [*named(folder, [*RUN_FILES, "*.writing"]), folder / UNSAVED]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left[:-1]]


def check_free(folder: Path) -> None:
    """Raise a `UserError` where a new run would write over another one's files, or anybody's of such a name."""
    taken = next(iter(named(folder, RUN_FILES)), None)
    if taken is not None:
        raise UserError(
            f"{folder} already holds a run ({taken.name}): remove it, choose another trainer.logger.init_args.version "
            "(without a logger: trainer.default_root_dir), resume from its own checkpoint with --ckpt_path, or have it "
            "moved aside with --force"
        )


def check_absent(path: Path, force: bool = False) -> None:
    """Raise a `UserError` where a file to write is there already, a link too; `force` gives up files and links."""
    if not os.path.lexists(path):
        return
    mode = path.lstat().st_mode
    link = f"a link to {os.readlink(path)}" if stat.S_ISLNK(mode) else None
    if not link and not stat.S_ISREG(mode):
        raise UserError(f"cannot write {path}: what is there is not a file")
    if not force:
        raise UserError(f"{path} is there already{f' ({link})' if link else ''}: --force replaces it")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is whole or not there; where it was there, it is replaced and, of a link, the link alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".writing")
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)


def named(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """What lies right in a folder by one of these names, in their order; a link that leads nowhere too."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for pattern in patterns for name in fnmatch.filter(names, pattern)]


def move_aside(path: Path, inside: Iterable[Path] | None = None) -> Path:
    """Rename a file or folder to ``<name>.old-<N>``, the first N that is free; or, in that order, what lies `inside`.

    Returns:
        The new name.
    """
    number = next(n for n in range(1, 10**9) if not os.path.lexists(f"{path}.old-{n}"))
    old = path.with_name(f"{path.name}.old-{number}")
    if inside is None:
        os.rename(path, old)
        return old
    old.mkdir()
    for item in inside:
        os.rename(item, old / item.name)
    return old


def is_aside(path: Path) -> bool:
    """Whether something was moved aside, or lies in a folder that was."""
    return any(ASIDE.search(part) for part in path.parts)
