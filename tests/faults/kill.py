"""Kill runs at random moments, resume them to the end, and compare them with the run that nobody killed, bit for bit.

    python tests/faults/kill.py --runs 20 --pipelines 20

Every run is the command line in a process of its own (forked from one that has imported the libraries and nothing
else): PPO with Elastic Reset on the toy world, saving every batch. It ends by SIGKILL, sometimes twice, at moments that
the seed decides: after a batch drawn at random, and a time drawn at random after that. Compared are all of the last
checkpoint (weights, average, optimizer, counters, KL coefficient, learning rate), the exported folders, the samples and
every logged scalar, times and throughputs apart. Pipelines (killed_pipelines.py) are killed and started again in the
same way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/toy/elastic_reset.yaml"
EPOCHS, BATCHES = 2, 5  # of a run; resets after batches 3, 6 and 9, validations after 2 and 4 of each epoch
POLICY = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 96}
CLASSIFIER = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
CLASSIFIER |= {"intermediate_size": 32, "max_position_embeddings": 128}
CALLBACKS = """[{class_path: ElasticReset, init_args: {every: 3, decay: 0.9}}, {class_path: SampleLogger},
{class_path: SavePretrained, init_args: {monitor: val/reward}}, {class_path: BatchCheckpoint, init_args: {every: 1}}]"""
PROCESSES = multiprocessing.get_context("forkserver")  # a run's process begins with everything imported, and no more
PRELOADED = [
    "elastic_lightning.lightning_cli",
    "elastic_lightning.evaluation.pipeline",
    "torch.utils.tensorboard",
    "transformers.generation",
]
PRELOADED += [f"transformers.models.{kind}.modeling_{kind}" for kind in ("gpt2", "bert")]
POLL = 0.002  # seconds between two looks at a run's folder
START_LIMIT = 600.0  # seconds until a run must have begun


class Kill(NamedTuple):
    """What stood when a process was killed: the last checkpoint's batch, and the last batch that was logged."""

    saved: int
    logged: int


class Trial(NamedTuple):
    """A killed and resumed run: its kills, the seconds it took, and what differs from the unbroken run."""

    number: int
    kills: list[Kill]
    seconds: float
    differences: list[str]


def build_world(folder: Path) -> None:
    """Tokenizer, an untrained policy and an untrained reward model; no training is needed to compare bits."""
    from transformers import AutoModelForSequenceClassification

    from elastic_lightning.data.toy_grammar import review_grammar, toy_tokenizer
    from elastic_lightning.policies import ModelSource, load_source
    from elastic_lightning.policies.loading import from_architecture

    tokenizer = toy_tokenizer(review_grammar().words)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    policy = load_source(ModelSource(architecture=POLICY, tokenizer=str(folder / "tokenizer")))
    policy.model.save_pretrained(folder / "policy")
    policy.tokenizer.save_pretrained(folder / "policy")
    source = ModelSource(architecture=CLASSIFIER, tokenizer=str(folder / "tokenizer"))
    labels = {"num_labels": 2, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    reward = from_architecture(AutoModelForSequenceClassification, source, tokenizer, **labels)
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


def settings_of(policy: str, reward: str) -> list[str]:
    """Flags of a run from these models, but for where it lies."""
    return [
        f"--model.init_args.policy.path={policy}",
        f"--model.init_args.reward.init_args.path={reward}",
        "--model.init_args.sampling.max_new_tokens=8",
        "--model.init_args.ppo.kl_penalty=adaptive",
        "--model.init_args.ppo.schedule=linear",
        *("--model.init_args.ppo.epochs=2", "--model.init_args.ppo.mini_batches=2"),
        "--data.init_args.train_texts=64",
        *("--data.init_args.batch_size=8", "--data.init_args.eval_prompts=8", "--data.init_args.eval_texts=8"),
        *(f"--trainer.max_epochs={EPOCHS}", f"--trainer.limit_train_batches={BATCHES}"),
        "--trainer.val_check_interval=2",
        f"--trainer.callbacks={' '.join(CALLBACKS.split())}",
        "--trainer.enable_model_summary=false",
    ]


def arguments_of(world: Path, run: Path, resume: bool) -> list[str]:
    """What stands behind `elastic-lightning`."""
    return [
        *("fit", f"--config={CONFIG}", *settings_of(f"{world}/policy", f"{world}/reward")),
        f"--trainer.logger.init_args.save_dir={run.parent}",
        *("--trainer.logger.init_args.name=", f"--trainer.logger.init_args.version={run.name}"),
        *(["--ckpt_path=last"] if resume else []),
    ]


def command_line(log: Path, arguments: list[str]) -> None:
    """Be `elastic-lightning`, with what it prints in a file."""
    from elastic_lightning.cli import main

    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def start(world: Path, run: Path, resume: bool) -> BaseProcess:
    """The command line, as a process."""
    log = run.parent / f"{run.name}.log"
    process = PROCESSES.Process(target=command_line, args=(log, arguments_of(world, run, resume)))
    process.start()
    return process


def finish(process: BaseProcess, run: Path) -> None:
    """Wait for a process that must end well."""
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{run.name} failed:\n{(run.parent / f'{run.name}.log').read_text()[-3000:]}")


def saved_batch(run: Path) -> int:
    """Batch of the last checkpoint, 0 without any."""
    names = [path.stem for path in (run / "checkpoints").glob("batch_*.ckpt")]
    return max((int(name.removeprefix("batch_")) for name in names), default=0)


def kill(process: BaseProcess, run: Path, batch: int, delay: float) -> Kill | None:
    """SIGKILL `delay` seconds after the checkpoint of `batch`; None if the run was over by then."""
    deadline = time.monotonic() + START_LIMIT
    while saved_batch(run) < batch and process.is_alive():
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"{run.name} did not reach batch {batch} in {START_LIMIT:.0f} s")
        time.sleep(POLL)
    time.sleep(delay)
    if not process.is_alive():
        finish(process, run)
        return None
    process.kill()
    process.join()
    return Kill(saved_batch(run), max(scalars(run).get("train/reward", {0: []})))


def begin_and_kill(world: Path, run: Path, chance: random.Random, seconds: float) -> list[Kill]:
    """Begin a run and kill it, sometimes resume it and kill it again; its kills."""
    kills, batch = [], 0
    for _ in range(1 + (chance.random() < 0.4)):
        batch = chance.randint(batch + 1, EPOCHS * BATCHES)
        stopped = kill(start(world, run, resume=bool(kills)), run, batch, chance.random() * 1.5 * seconds)
        kills += [stopped] if stopped else []
        if stopped is None or batch == EPOCHS * BATCHES:
            break
    return kills


def trial(number: int, seed: int, world: Path, whole: Path, seconds: float) -> Trial:
    """One run, killed once or twice and resumed to the end; `seconds` are those of an unbroken batch."""
    chance, run, began = random.Random(seed * 1000 + number), whole.parent / f"killed_{number}", time.monotonic()
    while not (kills := begin_and_kill(world, run, chance, seconds)):
        shutil.rmtree(run)  # it was over before it could be killed: again, at another moment
    lost = [f"{stop.logged - stop.saved} batches lost" for stop in kills if stop.logged - stop.saved > 1]
    finish(start(world, run, resume=True), run)
    found = Trial(number, kills, time.monotonic() - began, lost + compare(run, whole))
    if not found.differences:
        shutil.rmtree(run)
    return found


# Comparing -------------------------------------------------------------------------------------------------------


def scalars(run: Path) -> dict[str, dict[int, list[float]]]:
    """{tag: {step: values}} of everything logged but times; one value a step in a run that is whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    found: dict[str, dict[int, list[float]]] = {}
    for tag in events.Tags()["scalars"]:
        if not tag.startswith("time/"):
            for event in events.Scalars(tag):
                found.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    return found


def state(run: Path) -> dict[str, Any]:
    """The last checkpoint, without what names its run's place or tells of its past."""
    checkpoint = torch.load(max((run / "checkpoints").glob("batch_*.ckpt")), weights_only=True)
    for name in ("run_log", "loops", "config"):  # `position` is what of the loops decides how a run goes on
        del checkpoint[name]
    return checkpoint


def unlike(name: str, ours: Any, theirs: Any) -> list[str]:
    """Names under which two nested values are not the same."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and ours.keys() == theirs.keys():
        return [found for key in theirs for found in unlike(f"{name}.{key}", ours[key], theirs[key])]
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for index, (a, b) in pairs for found in unlike(f"{name}.{index}", a, b)]
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [name]
    return [] if repr(ours) == repr(theirs) else [name]


def compare(run: Path, whole: Path) -> list[str]:
    """What differs between two finished runs."""
    found = unlike("checkpoint", state(run), state(whole)) + unlike("scalars", scalars(run), scalars(whole))
    for path in [*whole.glob("final/*.safetensors"), *whole.glob("best/*.safetensors"), whole / "samples.jsonl"]:
        ours = run / path.relative_to(whole)
        if not ours.is_file() or ours.read_bytes() != path.read_bytes():
            found.append(str(path.relative_to(whole)))
    return found


# The whole -------------------------------------------------------------------------------------------------------


def count(run: Path) -> str:
    """How much is compared."""

    def tensors(value: Any) -> int:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return int(isinstance(value, torch.Tensor)) + sum(tensors(part) for part in parts)

    values = sum(len(steps) for steps in scalars(run).values())
    return f"{tensors(state(run))} tensors of the last checkpoint and {values} logged scalars"


def in_parallel(jobs: int, work: Callable[[int], Any], runs: int) -> Iterator[Any]:
    """What `work` makes of the numbers 1 to `runs`, in their order, so many at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(work, range(1, runs + 1))


def report(runs: int, seed: int, jobs: int, folder: Path) -> int:
    """Kill and resume `runs` runs and print a line each; how many went wrong."""
    whole, began = folder / "whole", time.monotonic()
    process = start(folder, whole, resume=False)
    while saved_batch(whole) < 1 and process.is_alive():
        time.sleep(POLL)
    first = time.monotonic()
    finish(process, whole)
    seconds = (time.monotonic() - first) / (EPOCHS * BATCHES - 1)
    if any(len(values) > 1 for steps in scalars(whole).values() for values in steps.values()):
        sys.exit("the unbroken run logged a step twice")
    print(f"comparing {count(whole)}; an unbroken batch takes {seconds:.2f} s", flush=True)
    print(f"{'run':>4}  {'killed after batch':<20}{'batches repeated':<18}{'seconds':>8}  result", flush=True)
    failed = 0
    for done in in_parallel(jobs, lambda number: trial(number, seed, folder, whole, seconds), runs):
        saved = ", ".join(str(stop.saved) for stop in done.kills)
        repeats = ", ".join(str(stop.logged - stop.saved) for stop in done.kills)
        verdict = "identical" if not done.differences else f"{len(done.differences)} DIFFER"
        print(f"{done.number:>4}  {saved:<20}{repeats:<18}{done.seconds:>8.1f}  {verdict}", flush=True)
        for name in done.differences[:10]:
            print(f"      {name}", flush=True)
        failed += bool(done.differences)
    print(f"{runs - failed} of {runs} identical, {time.monotonic() - began:.0f} s in all", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="runs to kill and resume")
    parser.add_argument("--pipelines", type=int, default=0, help="pipelines to kill and start again")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    given = parser.parse_args()
    quiet = "ignore:resource_tracker:UserWarning"  # of the locks that killed processes could not give back
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": quiet}
    PROCESSES.set_forkserver_preload(PRELOADED)
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        builder = PROCESSES.Process(target=build_world, args=(Path(place),))
        builder.start()
        builder.join()
        if given.runs:
            failed += report(given.runs, given.seed, given.jobs, Path(place))
        if given.pipelines:
            import killed_pipelines

            failed += killed_pipelines.report(given.pipelines, given.seed, given.jobs, Path(place))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.modules["kill"] = sys.modules["__main__"]  # as which killed_pipelines knows this file
    sys.exit(main())
