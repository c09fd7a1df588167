"""What a run has logged into its folder, remembered with each checkpoint and put back when the run resumes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

LOGS = ("events.out.tfevents.*", "samples.jsonl")


def flush(trainer: Trainer) -> None:
    """Write what waits in memory."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "flush"):
            logger.experiment.flush()


def mark(trainer: Trainer) -> dict[str, int]:
    """Bytes of each log in the run's folder, after what waits in memory was written; of a further logger's folder with
    its number, as ``1:<name>``."""
    flush(trainer)
    folders = _folders(trainer)
    return {f"{prefix}{path.name}": path.stat().st_size for prefix, place in folders.items() for path in _logs(place)}


def logged_in(folder: Path, marks: dict[str, int]) -> bool:
    """Whether the event files that were marked lie in a folder, whole: nobody else's have their names."""
    own = {name: size for name, size in marks.items() if name.startswith("events.")}
    there = {path.name: path.stat().st_size for path in _logs(folder)}
    return bool(own) and all(there.get(name, -1) >= size for name, size in own.items())


def rewind(trainer: Trainer, marks: dict[str, int]) -> None:
    """Remove what was logged after `marks` were taken, so that the resumed run logs each step once.

    A folder that does not hold the marked files is another run's, and stays as it is.
    """
    for prefix, place in _folders(trainer).items():
        logs = {f"{prefix}{path.name}": path for path in _logs(place)}
        own = {name: size for name, size in marks.items() if re.match(r"(\d+:)?", name)[0] == prefix}
        if not own or not all(name in logs and logs[name].stat().st_size >= size for name, size in own.items()):
            continue
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "close"):
                logger.experiment.close()  # its file is empty and goes; the first scalar opens another
        for name, path in logs.items():
            if name in own:
                os.truncate(path, own[name])
            elif not prefix:
                path.unlink()


def _folders(trainer: Trainer) -> dict[str, Path]:
    """Where logs lie, by the prefix of their names in `mark`: the run's folder, and those of further loggers."""
    folder = trainer.log_dir  # asked on every rank, for the first one tells the others
    if not trainer.is_global_zero or not folder:
        return {}
    others = [logger.log_dir for logger in trainer.loggers[1:] if isinstance(logger, TensorBoardLogger)]
    places = enumerate(dict.fromkeys([folder, *others]))
    return {f"{number}:" if number else "": Path(place) for number, place in places}


def _logs(folder: Path) -> list[Path]:
    return [path for pattern in LOGS for path in folder.glob(pattern)]
