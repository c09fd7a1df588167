"""`elastic-lightning pipeline FILE`: run the stages of a file in order, skip what is up to date, close with the report.

Each run is a process of its own with its log in `<output>/<stage>/seed_<N>/log.txt`. The file format and its checks
are in `stages.py`, what is shown meanwhile in `progress.py`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import report
from elastic_lightning.evaluation.arguments import Parser
from elastic_lightning.evaluation.progress import LOG, Job, display, duration, tail
from elastic_lightning.evaluation.records import completion, completions, recipe, select, write_record
from elastic_lightning.evaluation.report_files import check_report
from elastic_lightning.evaluation.runs import DRIFT, REWARD, collect
from elastic_lightning.evaluation.stage_folder import check_folder, made, make_room, resumes
from elastic_lightning.evaluation.stages import Pipeline, read_pipeline
from elastic_lightning.locks import locked, wait_until_free
from elastic_lightning.outputs import check_writable, move_aside
from elastic_lightning.processes import child_environment
from elastic_lightning.terminal import PlainConsole, cell

PROGRAM = (sys.executable, "-m", "elastic_lightning.cli")
PATIENCE = 60.0  # seconds from SIGTERM to SIGKILL: a fit ends its batch and saves
LAST_WORDS = 10.0  # seconds in which the run of a pipeline that was killed ends with it


# ---- one run --------------------------------------------------------------------------------------------------------


def start(job: Job, program: tuple[str, ...], threads: int, upstream: dict[str, str], force: bool = False) -> str:
    """Start a run in a process group of its own, so that it stops with all its workers.

    A fit that was interrupted goes on from its last checkpoint; any other run begins in a folder made ready for it.

    Returns:
        Where what was there had to be moved to, in words.
    """
    run, now = job.run, recipe(job.run, upstream)
    wait_until_free(run.folder, LAST_WORDS)
    resume = [] if force or not resumes(run, now) else ["--ckpt_path=last"]
    check_folder(run)
    old = None if resume else make_room(run, now, force)
    environment = {**os.environ, **child_environment(), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (run.folder / LOG).open("ab" if resume else "wb") as log:
        job.process = subprocess.Popen(
            [*program, *run.arguments, *resume],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    job.state, job.started = "running", time.monotonic()
    return f"{run.name}: what an earlier run left is in {old}" if old else ""


def stop(jobs: list[Job]) -> None:
    """End running jobs and their workers: SIGTERM first, SIGKILL for what is left."""
    running = [job for job in jobs if job.state == "running"]
    signal_groups(running, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for job in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(max(0.0, deadline - time.monotonic()))
    signal_groups(running, signal.SIGKILL)
    for job in running:
        job.process.wait()
        job.end("stopped")


def signal_groups(jobs: list[Job], number: int) -> None:
    """Send a signal to every process of the jobs' groups that still is there."""
    for job in jobs:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(job.process.pid, number)


def failure(job: Job) -> str | None:
    """Why an ended run does not count as complete, or None."""
    if job.process.returncode:
        return f"exit status {job.process.returncode}"
    lacking = [str(path) for path in job.run.produces if not path.exists()]
    return f"it ended without writing {', '.join(lacking)}" if lacking else None


# ---- all runs -------------------------------------------------------------------------------------------------------


def run(pipeline: Pipeline, program=PROGRAM, only=None, force=False, console: Console | None = None) -> int:
    """Run a pipeline's stages and the closing report.

    Args:
        pipeline: from `read_pipeline`.
        program: the command that the stages' arguments follow.
        only: names of the stages to run, default all.
        force: run them although they are up to date.
        console: where to show the progress and the table.

    Returns:
        0, 1 if a run failed, 130 after Ctrl-C.

    Raises:
        UserError: `only` names a stage wrongly, a run's folder holds files that no pipeline made, or another process
            writes there.
    """
    console = console or PlainConsole()
    began = time.monotonic()
    chosen = select(pipeline, only)
    for item in chosen:
        check_folder(item)
    jobs = [Job(item) for item in chosen]
    with locked(pipeline.output, "elastic-lightning pipeline"):
        try:
            failed = run_jobs(pipeline, jobs, tuple(program), force, console)
        except KeyboardInterrupt:
            console.print("Interrupted; the same command goes on with the stages that are not complete.")
            return 130
        if failed:
            tell_failure(failed, console)
            return 1
        close(pipeline, console)
    total = duration(time.monotonic() - began)
    console.print(cell(f"Finished in {total}. Runs and TensorBoard logs: {pipeline.output}"), soft_wrap=True)
    return 0


def run_jobs(pipeline: Pipeline, jobs: list[Job], program, force: bool, console: Console) -> Job | None:
    """Run the jobs, upstream first, several at once; stop at the first that fails and return it."""
    names = {job.run.name for job in jobs}
    ids = {name: found for name, found in completions(pipeline).items() if name not in names}
    threads = max(1, cores() // pipeline.jobs)

    def begin(job: Job) -> None:
        note = start(job, program, threads, ids, force)
        if note:
            console.print(cell(note), soft_wrap=True)

    with terminable(), display(jobs, console) as show:
        try:
            while any(job.state in ("waiting", "running") for job in jobs):
                end_finished(jobs, ids)
                if any(job.state == "failed" for job in jobs):
                    break
                start_ready(jobs, ids, pipeline.jobs, force, begin)
                show()
                time.sleep(0.1)
        finally:
            stop(jobs)
            show()
    return next((job for job in jobs if job.state == "failed"), None)


def end_finished(jobs: list[Job], ids: dict[str, str]) -> None:
    """Take note of the processes that ended."""
    for job in jobs:
        if job.state == "running" and job.process.poll() is not None:
            job.end("failed" if failure(job) else "done")
            if job.state == "done":
                ids[job.run.name] = write_record(job, ids, made(job.run))


def start_ready(jobs: list[Job], ids: dict[str, str], limit: int, force: bool, begin: Callable[[Job], None]) -> None:
    """Skip or start the jobs whose upstream is complete, `limit` at once."""
    for job in jobs:
        if job.state != "waiting" or not all(need in ids for need in job.run.needs):
            continue
        found = None if force else completion(job.run, ids)
        if found:
            job.state, ids[job.run.name] = "skipped", found
        elif sum(other.state == "running" for other in jobs) < limit:
            begin(job)


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like an exception: the stages live in their own sessions and would outlive us."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread alone
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the end -------------------------------------------------------------------------------------------------------


def tell_failure(job: Job, console: Console) -> None:
    """Which run failed, why, where its log is and how it ends."""
    log = job.run.folder / LOG
    lines = [f"{job.run.name} failed: {failure(job)}", f"Its log: {log}", *(f"  {line}" for line in tail(log, 20))]
    for line in lines:
        console.print(cell(line), soft_wrap=True)


def close(pipeline: Pipeline, console: Console) -> None:
    """Report over the runs that are up to date: those marked `report: true`, or else every fit with the reward tag."""
    tags = {"reward": REWARD, "drift": DRIFT, **pipeline.report}
    marked = [run for run in pipeline.runs.values() if run.report]
    wanted = marked or [run for run in pipeline.runs.values() if run.arguments[0] == "fit"]
    ids = completions(pipeline)
    folders = [run.folder for run in wanted if run.name in ids]
    runs, left_out = collect(folders, tags["reward"], tags["drift"])
    complete = [run.folder for run in pipeline.runs.values() if run.name in ids]
    if runs:
        output = pipeline.output / "report"
        try:
            check_report(output, [run.folder for run in runs])
        except UserError as error:  # not now that all the work is done
            console.print(cell(f"{error}; it is in {move_aside(output)} now"), soft_wrap=True)
        left_out = left_out if marked else []
        report.make_report(runs, left_out, output, tags["reward"], tags["drift"], console, complete)
    elif not report.print_measured(complete, console):
        console.print(cell(f"No report: no complete run logged {tags['reward']} and {tags['drift']}."))


def main(argv: list[str]) -> int:
    """`elastic-lightning pipeline FILE [--data DIR] [--model DIR] [--output DIR] [--jobs N] [--only STAGE ...]`.

    Raises:
        UserError: anything is wrong with the file or the arguments; nothing has run then.
    """
    parser = Parser("pipeline", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="the pipeline, a YAML file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder that {data} stands for in the file")
    parser.add_argument("--model", metavar="DIR", help="the folder or hub id that {model} stands for in the file")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the runs go, instead of the file's 'output'")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once, each with cores // N threads")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run these stages; those before must be complete")
    parser.add_argument("--force", action="store_true", help="run stages although they are up to date")
    given = parser.parse_args(argv)
    pipeline = read_pipeline(given.file, given.data, given.output, given.jobs, given.model)
    check_writable(pipeline.output, "the runs")
    return run(pipeline, only=given.only, force=given.force)
