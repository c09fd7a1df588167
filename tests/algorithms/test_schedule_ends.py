"""A learning rate that decays does so to the run's end, whatever ends it; rates by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset

from elastic_lightning.algorithms import AdamWConfig, LanguageModel
from elastic_lightning.algorithms.schedules import batches_of_run
from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource


class Rates(Callback):
    """The rate that each training batch ended with, which a PPO batch was trained with."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *args):
        self.values.append(float(trainer.callback_metrics["train/learning_rate"]))


class Endless(IterableDataset):
    """The same batch again and again, without a length."""

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield self.batch


def blocks():
    return torch.randint(0, 27, (4, 8), generator=torch.Generator().manual_seed(0))


def subject(toy, kind, **schedule):
    """A module whose rate decays, and a batch for it."""
    if kind == "ppo":
        return toy.ppo(schedule="linear", learning_rate=1e-3, **schedule), toy.prompts()
    return LanguageModel(ModelSource(toy.folder), AdamWConfig(schedule="linear", warmup=0, **schedule)), blocks()


@pytest.mark.parametrize(
    "ends, factors",
    [  # four optimizer steps a batch
        ({"max_steps": 16, "max_epochs": -1}, [1, 0.75, 0.5, 0.25]),
        ({"max_steps": 16, "max_epochs": 1000}, [1, 0.75, 0.5, 0.25]),
        ({"max_steps": 13, "max_epochs": 5}, [1, 0.75, 0.5, 0.25]),  # over once 13 steps are taken
        ({"max_steps": 1000, "max_epochs": 1}, [1, 0.5]),
    ],
)
def test_ppos_rate_decays_to_the_first_end(toy, tmp_path, ends, factors):
    module, prompts = subject(toy, "ppo")
    rates = Rates()
    toy.fit(module, tmp_path, [prompts] * 2, callbacks=[rates], **ends)
    assert rates.values == pytest.approx([1e-3 * factor for factor in factors])


def test_batches_of_fewer_steps_move_the_end_away():
    trainer = SimpleNamespace(max_epochs=-1, max_steps=16, num_training_batches=100)
    steps_taken = [0, 4, 5, 9, 13, 16]  # the second batch stopped after one step, the last one at the limit
    totals = []
    for done, trainer.global_step in enumerate(steps_taken):
        totals.append(batches_of_run(trainer, done, 4))
    assert totals == [4, 4, 5, 5, 5, 5]
    trainer.max_steps = -1
    assert batches_of_run(trainer, 3, 4) == math.inf


@pytest.mark.parametrize("kind", ["ppo", "supervised"])
def test_a_schedule_without_an_end_is_refused(toy, tmp_path, kind):
    module, batch = subject(toy, kind)
    with pytest.raises(UserError, match=r"schedule: linear decays to the run's end, and nothing says.*max_steps"):
        toy.fit(module, tmp_path, [batch] * 2, max_epochs=-1, max_time="00:00:00:09")
    with pytest.raises(UserError, match=r"schedule: linear decays to the run's end, and the training data has no len"):
        toy.trainer(tmp_path).fit(module, DataLoader(Endless(batch), batch_size=None))
    toy.trainer(tmp_path, max_steps=2).fit(module, DataLoader(Endless(batch), batch_size=None))
    with pytest.warns(UserWarning, match="max_time may end the run before its learning rate has decayed"):
        toy.fit(module, tmp_path, [batch], max_time="00:00:00:09")
