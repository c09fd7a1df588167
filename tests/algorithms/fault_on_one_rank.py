"""One process of two: runs in which something goes wrong on one rank alone, and what each rank makes of it.

python fault_on_one_rank.py POLICY_FOLDER OUTPUT_FOLDER
"""

import math
import os
import sys
import warnings
from pathlib import Path

import torch
from algorithms.conftest import Toy
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from elastic_lightning.callbacks import BatchCheckpoint, ElasticReset, SavePretrained
from elastic_lightning.policies import Prompts
from elastic_lightning.rewards import Reward

RANK = int(os.environ["RANK"])


class FailsOnLastRank(Reward):
    """Lengths of responses; on rank 1 the second call returns NaN, or raises."""

    def __init__(self, raises: bool) -> None:
        super().__init__()
        self.raises, self.calls = raises, 0

    def forward(self, prompts, responses):
        self.calls += 1
        scores = torch.tensor([float(len(response)) for response in responses])
        if self.calls == 2 and RANK == 1:
            if self.raises:
                raise ConnectionError("no answer")
            scores[0] = math.nan
        return scores


class Lengths(Reward):
    def forward(self, prompts, responses):
        return torch.tensor([float(len(response)) for response in responses])


def fit(toy, folder, reward, callbacks, batches=None):
    module = toy.ppo(reward=reward)
    if batches is None:
        batches = [toy.prompts(rows=4, seed=2 * number + RANK) for number in range(3)]
    options = {"strategy": "ddp", "devices": 2, "plugins": [TorchElasticEnvironment()], "callbacks": callbacks}
    toy.fit(module, folder, batches, use_distributed_sampler=False, enable_checkpointing=True, **options)
    return module


def skipped(toy, folder):
    """A reward that is NaN on one rank, in the second batch of three."""
    average = ElasticReset(every=100)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module = fit(toy, folder, FailsOnLastRank(raises=False), [average])
    return {
        "weights": {name: p.detach() for name, p in module.actor.named_parameters()},
        "average": average.ema,
        "updates": average.updates,
        "skipped": module.faults.skipped,
        "ppo_step": module.ppo_step,
        "told": [str(warning.message) for warning in told if "is skipped" in str(warning.message)],
    }


def stopped(toy, folder, reward, callbacks=(), batches=None):
    """What a run that must stop says."""
    try:
        fit(toy, folder, reward, [*callbacks], batches)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def in_the_way(folder, name):
    """A folder where the first rank wants to write a file."""
    if RANK == 0:
        (folder / "checkpoints" / name / "inside").mkdir(parents=True)
    return folder


def main(policy: str, output: str) -> None:
    torch.set_num_threads(1)
    toy, folder = Toy(Path(policy)), Path(output)
    empty = toy.prompts(rows=4, seed=RANK)
    if RANK == 1:
        empty = Prompts(empty.tokens, empty.mask & (torch.arange(4) > 0)[:, None])
    results = {
        "skipped": skipped(toy, folder / "nan"),
        "reward raises": stopped(toy, folder / "raises", FailsOnLastRank(raises=True)),
        "empty prompt": stopped(toy, folder / "empty", Lengths(), batches=[empty]),
        "checkpoint": stopped(
            toy, in_the_way(folder / "save", "batch_000001.writing"), Lengths(), [BatchCheckpoint(every=1)]
        ),
        "export": stopped(toy, folder / "export", Lengths(), [SavePretrained(folder="/dev/null")]),
    }
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
