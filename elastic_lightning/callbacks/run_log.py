"""What a run has logged into its folder, remembered with each checkpoint and put back when the run resumes."""

from __future__ import annotations

import os
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
    """Bytes of each log in the run's folder, after what waits in memory was written."""
    flush(trainer)
    return {name: path.stat().st_size for name, path in _logs(trainer).items()}


def rewind(trainer: Trainer, marks: dict[str, int]) -> None:
    """Remove what was logged after `marks` were taken, so that the resumed run logs each step once.

    A folder that does not hold the marked files is another run's, and stays as it is.
    """
    logs = _logs(trainer)
    if not all(name in logs and logs[name].stat().st_size >= size for name, size in marks.items()) or not marks:
        return
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "close"):
            logger.experiment.close()  # its file is empty and goes; the first scalar opens another
    for name, path in logs.items():
        if name in marks:
            os.truncate(path, marks[name])
        else:
            path.unlink()


def _logs(trainer: Trainer) -> dict[str, Path]:
    """The logs by name, in the run's folder and in those of further loggers."""
    folder = trainer.log_dir  # asked on every rank, for the first one tells the others
    if not trainer.is_global_zero or not folder:
        return {}
    others = [logger.log_dir for logger in trainer.loggers[1:] if isinstance(logger, TensorBoardLogger)]
    logs = {}
    for number, place in enumerate(dict.fromkeys([folder, *others])):
        paths = [path for pattern in LOGS for path in Path(place).glob(pattern)]
        logs |= {f"{number}:{path.name}" if number else path.name: path for path in paths}
    return logs
