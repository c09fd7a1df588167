"""What of a pipeline is up to date: the record that a complete run leaves in its folder, held against what it would be
made of today."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.progress import Job
from elastic_lightning.evaluation.stages import Pipeline, Run, nearest
from elastic_lightning.outputs import write_whole

RECORD = "stage.json"  # written last, so a run that was killed has none


def completion(run: Run, upstream: dict[str, str]) -> str | None:
    """The id of the run's last completion, if neither its recipe, its outputs nor its upstream changed since.

    Args:
        run: the run asked about.
        upstream: ids of the current completions of the runs before it, by name.
    """
    record = read_json(run.folder / RECORD)  # never completed, or not ours to understand: it runs
    now = recipe(run, upstream)
    same = all(record.get(key) == value for key, value in now.items())
    return record.get("id") if same and all(path.exists() for path in run.produces) else None


def recipe(run: Run, upstream: dict[str, str]) -> dict[str, Any]:
    """What decides a run's result: its own fingerprint, and the completions of the runs that it builds on.

    Those are the runs before it, and those of another pipeline whose folders its arguments name.
    """
    return {
        "fingerprint": run.fingerprint,
        "upstream": {need: upstream.get(need) for need in run.needs},
        "reads": {str(path): read_json(path / RECORD).get("id") for path in run.reads},
    }


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def completions(pipeline: Pipeline) -> dict[str, str]:
    """Ids of all runs that are up to date, by name."""
    ids: dict[str, str] = {}
    for name, run in pipeline.runs.items():  # upstream first
        found = completion(run, ids)
        if found and all(need in ids for need in run.needs):
            ids[name] = found
    return ids


def write_record(job: Job, upstream: dict[str, str], made: list[str]) -> str:
    """Mark a run complete, which `made` the files of these names in its folder; returns the id of this completion."""
    run = job.run
    record = {
        "id": uuid.uuid4().hex,
        **recipe(run, upstream),
        "arguments": run.arguments,
        "seconds": round(job.seconds, 1),
        "made": made,
    }
    write_whole(run.folder / RECORD, json.dumps(record, indent=2))
    return record["id"]


def select(pipeline: Pipeline, only: list[str] | None) -> list[Run]:
    """The runs of the stages named, or all.

    Raises:
        UserError: no such stage, or a stage before them is left out and not up to date (or would not stay so).
    """
    stages = list(dict.fromkeys(run.stage for run in pipeline.runs.values()))
    for stage in only or []:
        if stage not in stages:
            raise UserError(f"--only: unknown stage {stage!r}{nearest(stage, stages)}")
    chosen = {name: run for name, run in pipeline.runs.items() if not only or run.stage in only}
    ids = completions(pipeline)
    for need in sorted(ancestors(pipeline, chosen) - set(chosen)):
        stage = pipeline.runs[need].stage
        if need not in ids:
            raise UserError(f"--only: {need} must be complete and up to date before: add {stage!r} to --only")
        if ancestors(pipeline, [need]) & set(chosen):
            raise UserError(f"--only: {stage!r} stands between the stages named: add it to --only")
    return list(chosen.values())


def ancestors(pipeline: Pipeline, names) -> set[str]:
    """The names of all runs that come before the named ones."""
    found = {need for name in names for need in pipeline.runs[name].needs}
    return found | ancestors(pipeline, found) if found else found
