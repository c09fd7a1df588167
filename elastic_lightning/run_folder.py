"""The folder of a run: made ready when it begins, and cleared where it comes to nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger

from elastic_lightning.outputs import (
    RUN_FILES,
    UNSAVED,
    check_free,
    clear_unsaved,
    ended_unsaved,
    move_aside,
    named,
)
from elastic_lightning.resume import newest, resume_line
from elastic_lightning.signals import Interrupted


class SaveConfig(SaveConfigCallback):
    """Writes the configuration when training begins: what fails before or only measures leaves that of a run alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.config = self.config.clone()
        for name, usual in {"ckpt_path": None, "another_method": False, "force": False}.items():
            self.config[name] = usual  # of this start, and not of the run
        super().setup(trainer, pl_module, "fit")


class RunFolder(DummyLogger):
    """In place of a logger that writes into a run's folder, for commands that only measure: its log stays whole."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return self.folder


def begin(folder: Path, force: bool, saves: bool) -> list[str]:
    """Have a folder ready for a run that is not there yet: what one left that saved nothing is removed, another one is
    moved aside where `force` says so. The folder is marked until there is a checkpoint, if the run `saves` any.

    Returns:
        Lines on what was done.

    Raises:
        UserError: a run is there.
    """
    notes = []
    if ended_unsaved(folder) and (names := clear_unsaved(folder)):
        notes.append(f"note: {folder} held a run that ended before its first checkpoint: removed {', '.join(names)}")
    taken = named(folder, RUN_FILES)
    if taken and force:
        notes.append(f"note: what was in {folder} is in {move_aside(folder, taken)} now")
    check_free(folder)
    if saves:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNSAVED).touch()
    return notes


def leave_nothing(trainer: Trainer, folder: Path, made: list[Path]) -> None:
    """Remove what a run that trained nothing left in its folder, so that nothing is in the way of a retry; and folders
    that were `made` for it."""
    for logger in trainer.loggers:
        logger.finalize("failed")
    if folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    elif ended_unsaved(folder):
        clear_unsaved(folder)
    for parent in made[1:]:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def what_is_lost(stop: Interrupted, folder: Path | None, trained: bool, argv: list[str]) -> str:
    """What to say to whom stopped a run before the batch in hand was saved.

    Args:
        stop: the signal.
        folder: of the run.
        trained: whether a batch was.
        argv: what started the run.
    """
    path = newest(folder) if folder else None
    if path is None:
        return f"{stop} before {'the first checkpoint' if trained else 'a batch was trained'}: nothing was saved"
    return f"{stop} at once: what came after {path.name} is lost; resume with: {resume_line(argv)}"
