"""A stage's folder when its run begins: what an interrupted run goes on from stays, what another run made is moved
aside, and nothing that a pipeline did not make is touched."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import shutil
from pathlib import Path
from typing import Any

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.progress import LOG
from elastic_lightning.evaluation.records import RECORD, read_json
from elastic_lightning.evaluation.stages import Run
from elastic_lightning.locks import LOCK
from elastic_lightning.outputs import RUN_FILES, UNSAVED, move_aside, write_whole

MARKER = ".pipeline"  # lies in every folder that a pipeline made, and says what was to be made there beside what
BEGUN = ("events.out.tfevents.*", "config.yaml", "hparams.yaml", "samples.jsonl", "*.writing", LOG, LOCK, UNSAVED)
RESULTS = (*RUN_FILES, "test.json", "predictions*.jsonl", "samples_*.jsonl", "evaluation.json", "humaneval.jsonl")


def check_folder(run: Run) -> None:
    """Refuse a folder with somebody else's files in it; a pipeline moves only what a pipeline made."""
    folder = run.folder
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is not a plain folder: move it away or choose another --output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(f"{folder} was not made by a pipeline: move it away or choose another --output")


def interrupted(run: Run, recipe: dict[str, Any]) -> bool:
    """Whether the folder holds what this very run began, which was stopped before its end."""
    return read_json(run.folder / MARKER).get("recipe") == recipe and not (run.folder / RECORD).exists()


def resumes(run: Run, recipe: dict[str, Any]) -> bool:
    """Whether the run can go on from a checkpoint of its own."""
    return interrupted(run, recipe) and any((run.folder / "checkpoints").glob("batch_*.ckpt"))


def make_room(run: Run, recipe: dict[str, Any], force: bool) -> Path | None:
    """Make the folder ready for a run that begins anew.

    A run that was interrupted before it had made anything to keep leaves nothing. What else a pipeline made there, or
    where the run's products go, is moved aside. Files of others stay.

    Returns:
        Where it was moved to.
    """
    check_folder(run)
    begun = read_json(run.folder / MARKER)
    others = begun.get("others", [])
    ours = _ours(run, others)
    old = None
    if interrupted(run, recipe) and not force and all(_is_beginning(path) for path in ours):
        for path in ours:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif ours:
        old = move_aside(run.folder, sorted(ours, key=lambda path: path.name == RECORD))  # the record last, if killed
    if begun:
        for path in _outside(run):
            if str(path) not in others:
                move_aside(path)
    run.folder.mkdir(parents=True, exist_ok=True)
    there = [path.name for path in run.folder.iterdir() if path.name != MARKER] + [str(path) for path in _outside(run)]
    write_whole(run.folder / MARKER, json.dumps({"recipe": recipe, "others": there}))
    return old


def made(run: Run) -> list[str]:
    """Names of what lies in the folder and did not before the run began."""
    others = read_json(run.folder / MARKER).get("others", [])
    return sorted(path.name for path in run.folder.iterdir() if path.name not in (MARKER, RECORD, *others))


def _ours(run: Run, others: list[str]) -> list[Path]:
    """What a pipeline's run made in its folder: by what it wrote down at its end, or else by the name."""
    products = [path.relative_to(run.folder).parts[0] for path in run.produces if run.folder in path.parents]
    patterns = (
        *BEGUN,
        *RESULTS,
        *map(glob.escape, [RECORD, *products, *read_json(run.folder / RECORD).get("made", [])]),
    )
    there = sorted(run.folder.iterdir()) if run.folder.is_dir() else []
    candidates = [path for path in there if path.name not in (MARKER, *others)]
    return [path for path in candidates if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)]


def _outside(run: Run) -> list[Path]:
    """Products that are there, and not in the run's folder."""
    return [path for path in run.produces if run.folder not in path.parents and os.path.lexists(path)]


def _is_beginning(path: Path) -> bool:
    """Whether it is what a run leaves that has saved nothing yet."""
    if path.name == "checkpoints":
        return not any(path.glob("*.ckpt"))
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in BEGUN)
