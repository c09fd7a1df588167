"""The files of a report: a new one takes the place of an earlier one of the same runs, and of nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.records import read_json
from elastic_lightning.outputs import check_absent, write_whole

TABLE, SUMMARY, PICTURE, TESTS, EVALUATIONS = "table.csv", "summary.csv", "frontier.png", "test.csv", "evaluation.csv"
RECORD = ".report.json"  # what a report wrote, by its hash and the one before it, and of which runs


def check_report(output: Path, runs: Iterable[Path], force: bool = False) -> None:
    """Look at the folder of a report before it is made.

    Args:
        output: the folder, which may not be there.
        runs: what it is to be about.
        force: replace files and links there.

    Raises:
        UserError: a file of such a name is of another hand, was changed, is a link, or is about other runs alone.
    """
    record = read_json(output / RECORD)
    written, about = record.get("written", {}), record.get("runs", [])
    for name in (TABLE, SUMMARY, PICTURE, TESTS, EVALUATIONS):
        path = output / name
        if path.is_symlink() or not path.is_file() or _hash(path) not in written.get(name, []):
            check_absent(path, force)
    if about and not force and not set(about) & set(_named(output, runs)):
        raise UserError(f"{output} holds a report of other runs ({about[0]}, ...): --force replaces it")


@contextmanager
def publishing(output: Path, runs: Iterable[Path]) -> Iterator[Path]:
    """A folder to write the files into; when all is written they take their places, and links are not followed."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=output) as place:
        yield Path(place)
        files = sorted(Path(place).iterdir())
        before = read_json(output / RECORD).get("written", {})
        written = before | {file.name: [_hash(file), *before.get(file.name, [])[:1]] for file in files}
        # Before the files, and with what they replace, so that whoever is killed in between knows its own again.
        write_whole(output / RECORD, json.dumps({"runs": _named(output, runs), "written": written}, indent=2) + "\n")
        for file in files:
            os.replace(file, output / file.name)


def _named(output: Path, runs: Iterable[Path]) -> list[str]:
    """Folders of runs as seen from the report's, so that they may move together."""
    return [os.path.relpath(os.path.realpath(run), os.path.realpath(output)) for run in runs]


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
