"""One process of two: runs in which something goes wrong on one rank alone, and what each rank makes of it.

python fault_on_one_rank.py POLICY_FOLDER OUTPUT_FOLDER
"""

import math
import os
import sys
import warnings
from pathlib import Path

import rank_cases
import torch
from algorithms.conftest import Toy
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from elastic_lightning.callbacks import BatchCheckpoint, ElasticReset, SampleLogger, SavePretrained
from elastic_lightning.policies import Prompts
from elastic_lightning.rewards import ClassifierReward, Reward, WeightedReward

RANK = int(os.environ["RANK"])
MASKED = (2, 3, 4, 5, 6)  # a whole batch and its four responses, asked for one by one


class Lengths(Reward):
    """Lengths of responses; on rank 1 some calls, counted from 1, return NaN, or raise."""

    def __init__(self, nan: int | None = None, raises: tuple[int, ...] = (), **options) -> None:
        super().__init__()
        self.nan, self.raises, self.calls = nan, raises, 0
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, prompts, responses):
        self.calls += 1
        scores = torch.tensor([float(len(response)) for response in responses])
        if RANK == 1 and self.calls in self.raises:
            raise ConnectionError("no answer")
        if RANK == 1 and self.calls == self.nan:
            scores[0] = math.nan
        return scores


class InParts(Lengths):
    """A reward with named parts of its own."""

    def components(self, prompts, responses):
        lengths = super().forward(prompts, responses)
        return {"length": lengths, "half": lengths / 2}


def fit(toy, folder, reward, callbacks, batches=None, validate=False, strategy="ddp"):
    module = toy.ppo(reward=reward)
    if batches is None:
        batches = [toy.prompts(rows=4, seed=2 * number + RANK) for number in range(3)]
    options = {"strategy": strategy, "devices": 2, "plugins": [TorchElasticEnvironment()], "callbacks": callbacks}
    trainer = toy.trainer(folder, use_distributed_sampler=False, enable_checkpointing=True, **options)
    trainer.fit(module, toy.loader(batches), toy.loader(batches[:1]) if validate else None)
    return module


def skipped(toy, folder):
    """A reward that is NaN on one rank, in the second batch of three."""
    average = ElasticReset(every=100)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module = fit(toy, folder, Lengths(nan=2), [average])
    return {
        "weights": {name: p.detach() for name, p in module.actor.named_parameters()},
        "average": average.ema,
        "updates": average.updates,
        "skipped": module.faults.skipped,
        "ppo_step": module.ppo_step,
        "told": [str(warning.message) for warning in told if "is skipped" in str(warning.message)],
    }


def trained(toy, folder, reward, **options):
    """Steps and counts of a run that goes on."""
    module = fit(toy, folder, reward, [], **options)
    return {"ppo_step": module.ppo_step, "skipped": module.faults.skipped, "masked": module.faults.masked}


def stopped(toy, folder, reward, callbacks=(), **options):
    """What a run that must stop says."""
    try:
        fit(toy, folder, reward, [*callbacks], **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def in_the_way(folder, name):
    """A folder where the first rank wants to write a file."""
    if RANK == 0:
        (folder / name / "inside").mkdir(parents=True)
    return folder


def main(policy: str, output: str) -> None:
    torch.set_num_threads(1)
    toy, folder = Toy(Path(policy)), Path(output)
    empty = toy.prompts(rows=4, seed=RANK)
    if RANK == 1:
        empty = Prompts(empty.tokens, empty.mask & (torch.arange(4) > 0)[:, None])

    def classifier():
        return ClassifierReward(str(folder / "models" / "classifier"))

    results = {
        "skipped": skipped(toy, folder / "nan"),
        "reward raises": stopped(toy, folder / "raises", Lengths(raises=(2,))),
        "reward raises in validation": stopped(toy, folder / "validation", Lengths(raises=(4,)), validate=True),
        "samples": stopped(
            toy, in_the_way(folder / "samples", "samples.jsonl"), Lengths(), [SampleLogger()], validate=True
        ),
        "all of one rank are masked": trained(toy, folder / "masked", Lengths(raises=MASKED, on_error="mask")),
        "all of one rank are masked, in parts": trained(
            toy, folder / "masked_parts", InParts(raises=MASKED, on_error="mask")
        ),
        "a sharded part beside one that is asked again": trained(
            toy,
            folder / "again",
            WeightedReward({"model": classifier(), "lengths": Lengths(raises=(2,), retries=1)}),
            strategy=rank_cases.fsdp()["strategy"],
        ),
        "a sharded part beside one that raises": stopped(
            toy,
            folder / "mixed",
            WeightedReward({"lengths": Lengths(raises=(2,)), "model": classifier()}),
            strategy=rank_cases.fsdp()["strategy"],
        ),
        "empty prompt": stopped(toy, folder / "empty", Lengths(), batches=[empty]),
        "checkpoint": stopped(
            toy, in_the_way(folder / "save", "checkpoints/batch_000001.writing"), Lengths(), [BatchCheckpoint(every=1)]
        ),
        "export": stopped(toy, folder / "export", Lengths(), [SavePretrained(folder="/dev/null")]),
    }
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
