"""Pipelines killed at random moments and started again, beside the one that nobody killed; see kill.py.

A pipeline has two stages, PPO with Elastic Reset and the same again from what that made; each is a child of the
pipeline's process, forked from it where it would otherwise begin with imports. SIGKILL hits the pipeline's own process
alone, once to three times; the next one starts at once, while what the killed one had started may be there still.
Sometimes a rival starts beside it, which must be refused. In the folders lie files of a user.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import kill
import yaml

sys.path.append(str(kill.ROOT / "tests"))
from ended import gone

from elastic_lightning import cli
from elastic_lightning.evaluation import pipeline

STAGES = ("first", "second")
NOTE = "what the user wrote"
PATIENCE = 600.0  # seconds until a stage must have begun
LOOK = 0.02  # seconds between two looks


class Forked:
    """In place of `subprocess.Popen` for a stage."""

    def __init__(self, command: list[str], stdout: BinaryIO, env: dict[str, str], **others: Any) -> None:
        arguments = command[len(pipeline.PROGRAM) :]
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=run_stage, args=(stdout.fileno(), arguments, env))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a stage", timeout)


def run_stage(log: int, arguments: list[str], environment: dict[str, str]) -> None:
    """Be a stage."""
    os.setsid()
    os.environ |= environment
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(cli.main(arguments))


def run_pipeline(log: Path, arguments: list[str]) -> None:
    """Be the command line of a pipeline."""
    subprocess.Popen = Forked
    kill.command_line(log, arguments)


class Trial(NamedTuple):
    """A pipeline killed and started again: moments of its kills, rivals that were refused, seconds, what is wrong."""

    number: int
    kills: list[str]
    refused: int
    seconds: float
    wrong: list[str]


def pipeline_file(world: Path, output: Path) -> Path:
    """A pipeline of two stages into `output`."""

    def stage(policy: str, **more) -> dict:
        flags = kill.settings_of(policy, f"{world}/reward")
        return {"command": "fit", "config": str(kill.CONFIG), "arguments": flags, **more}

    stages = {"first": stage(f"{world}/policy"), "second": stage("{output}/first/seed_1/final", needs="first")}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"output": str(output), "stages": stages}))
    return file


def start(world: Path, output: Path, name: str = "log") -> BaseProcess:
    """The pipeline, as a process of its own."""
    log = output.with_suffix(f".{name}")
    arguments = ["pipeline", str(pipeline_file(world, output))]
    process = kill.PROCESSES.Process(target=run_pipeline, args=(log, arguments))
    process.start()
    return process


def moment(process: BaseProcess, output: Path, stage: str, batch: int) -> None:
    """Wait for a checkpoint of a stage, or the end."""
    deadline = time.monotonic() + PATIENCE
    while process.is_alive() and kill.saved_batch(output / stage / "seed_1") < batch:
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"{output.name} did not reach batch {batch} of {stage} in {PATIENCE:.0f} s")
        time.sleep(LOOK)


def leave_notes(output: Path) -> set[Path]:
    """Files of a user's, where they may lie."""
    folders = [folder for folder in (output / stage / "seed_1" for stage in STAGES) if (folder / ".pipeline").exists()]
    notes = {folder / "notes.txt" for folder in (output, *folders) if folder.is_dir()}
    for note in notes:
        note.write_text(NOTE)
    return notes


def refused(world: Path, output: Path) -> bool:
    """Whether a pipeline that starts beside a living one ends with a line that names it."""
    rival = start(world, output, "rival")
    rival.join()
    return rival.exitcode == 1 and "writes to" in output.with_suffix(".rival").read_text()


def trial(number: int, seed: int, world: Path, whole: Path, seconds: float) -> Trial:
    """One pipeline; `seconds` are those of an unbroken one."""
    chance, output, began = random.Random(seed * 1000 + number), whole.parent / f"pipeline_{number}", time.monotonic()
    kills, rivals, wrong, notes = [], 0, [], set()
    for _ in range(chance.randint(1, 3)):
        stage, batch = chance.choice(STAGES), chance.randint(0, kill.EPOCHS * kill.BATCHES)
        process = start(world, output)
        moment(process, output, stage, batch)
        time.sleep(chance.random() * seconds / 10)
        notes |= leave_notes(output)
        if process.is_alive() and chance.random() < 0.3:
            rivals += 1
            wrong += [] if refused(world, output) or not process.is_alive() else ["a rival was not refused"]
        if process.is_alive():
            before = saved(output)
            kills.append(" ".join(map(str, before)))
            wrong += [f"a stage outlived its pipeline, from {before} on"] if outlived(process, output, before) else []
        process.join()
    kill.finish(start(world, output), output)
    wrong += differences(output, whole)
    wrong += [f"{note} is lost" for note in notes if not note.is_file() or note.read_text() != NOTE]
    if not wrong:
        shutil.rmtree(output)
    return Trial(number, kills, rivals, time.monotonic() - began, wrong)


def saved(output: Path) -> list[int]:
    """Batches of the last checkpoints."""
    return [kill.saved_batch(output / name / "seed_1") for name in STAGES]


def outlived(process: BaseProcess, output: Path, before: list[int]) -> bool:
    """Kill a pipeline; whether its stage went on, beyond the batch in hand when `before` was read and the next."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    return not all(gone(child, 30.0) for child in children) or sum(saved(output)) > sum(before) + 2


def differences(output: Path, whole: Path) -> list[str]:
    """What is not as in the pipeline that nobody killed, doubled steps among it, or lost."""
    wrong = []
    for stage in STAGES:
        run = output / stage / "seed_1"
        unlike = set(kill.compare(run, whole / stage / "seed_1")) - {"checkpoint.hyper_parameters.policy.path"}
        steps = kill.scalars(run).items()
        unlike |= {f"{tag} twice" for tag, of in steps if any(len(values) > 1 for values in of.values())}
        wrong += [f"{stage}: {name}" for name in sorted(unlike)]
    return wrong + [f"{path} is left" for path in [*output.rglob("*.old-*"), *output.rglob("*.lock")]]


def report(runs: int, seed: int, jobs: int, world: Path) -> int:
    """Do `runs` of them and print a line each; how many went wrong."""
    whole, began = world / "whole_pipeline", time.monotonic()
    kill.finish(start(world, whole), whole)
    seconds = time.monotonic() - began
    print(f"a pipeline that nobody kills takes {seconds:.0f} s", flush=True)
    print(f"{'pipe':>4}  {'killed after batches':<24}{'rivals refused':<16}{'seconds':>8}  result", flush=True)
    bad = 0
    for done in kill.in_parallel(jobs, lambda number: trial(number, seed, world, whole, seconds), runs):
        verdict = "identical" if not done.wrong else f"{len(done.wrong)} WRONG"
        print(
            f"{done.number:>4}  {', '.join(done.kills):<24}{done.refused:<16}{done.seconds:>8.1f}  {verdict}",
            flush=True,
        )
        for line in done.wrong[:10]:
            print(f"      {line}", flush=True)
        bad += bool(done.wrong)
    print(f"{runs - bad} of {runs} pipelines identical, {time.monotonic() - began:.0f} s in all", flush=True)
    return bad
