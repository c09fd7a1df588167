"""One process of two: three PPO batches, of which the second has a reward that is NaN on the last rank alone.

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

from elastic_lightning.callbacks import ElasticReset
from elastic_lightning.rewards import Reward


class FailsOnLastRank(Reward):
    """Lengths of responses; NaN in the second call on rank 1."""

    calls = 0

    def forward(self, prompts, responses):
        self.calls += 1
        scores = torch.tensor([float(len(response)) for response in responses])
        if self.calls == 2 and os.environ["RANK"] == "1":
            scores[0] = math.nan
        return scores


def main(folder: str, output: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    toy = Toy(Path(folder))
    module, average = toy.ppo(reward=FailsOnLastRank()), ElasticReset(every=100)
    batches = [toy.prompts(rows=4, seed=2 * number + rank) for number in range(3)]
    options = {"strategy": "ddp", "devices": 2, "plugins": [TorchElasticEnvironment()], "callbacks": [average]}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        toy.fit(module, output, batches, use_distributed_sampler=False, **options)
    torch.save(
        {
            "weights": {name: p.detach() for name, p in module.actor.named_parameters()},
            "average": average.ema,
            "updates": average.updates,
            "skipped": module.faults.skipped,
            "ppo_step": module.ppo_step,
            "told": [str(warning.message) for warning in told if "is skipped" in str(warning.message)],
        },
        Path(output) / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
