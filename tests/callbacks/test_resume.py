"""A run that is stopped and resumed is the unbroken run, bit for bit: weights, optimizer, counters, logs, data."""

from __future__ import annotations

import shutil
import signal

import pytest
import resume_cases
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from resume_cases import CASES, StopAt, assert_same, logged, run

from elastic_lightning.callbacks import BatchCheckpoint
from elastic_lightning.callbacks.position import Position
from elastic_lightning.data.loader import ResumableLoader
from elastic_lightning.data.sampler import EpochSampler

words, whole = resume_cases.words, resume_cases.whole

STOPS = {
    "mid_epoch": [("on_before_optimizer_step", 1)],
    "before_a_reset": [("on_before_optimizer_step", 2)],
    "in_the_batch_of_a_reset": [("on_before_reset", 2)],
    "after_a_reset": [("on_before_optimizer_step", 3)],
    "before_a_validation": [("on_validation_start", 2)],
    "after_a_validation": [("on_validation_end", 6)],
    "at_an_epochs_end": [("on_train_epoch_end", 4)],
    "at_an_epochs_start": [("on_train_epoch_start", 4)],
    "in_a_step": [("on_before_optimizer_step", 5)],
    "twice_around_an_epochs_end": [("on_train_epoch_start", 4), ("on_before_optimizer_step", 2)],
    "many_times": [("on_before_optimizer_step", 2), ("on_before_optimizer_step", 1), ("on_validation_end", 2)],
    "at_the_end": [("on_train_end", 8)],
}


EVERYWHERE = [("ppo", stops) for stops in STOPS]
ELSEWHERE = [
    (case, stops)
    for case in CASES
    if case != "ppo"
    for stops in ("mid_epoch", "before_a_validation", "twice_around_an_epochs_end")
]


@pytest.mark.parametrize(("case", "stops"), [*EVERYWHERE, *ELSEWHERE])
def test_a_resumed_run_is_the_run(case, stops, words, tmp_path, whole):
    for index, (hook, batches) in enumerate(STOPS[stops]):
        run(case, words, tmp_path, StopAt(hook, batches), resume=index > 0)
    assert_same(tmp_path, run(case, words, tmp_path, resume=True), *whole(case))


def test_a_run_of_a_number_of_steps_is_resumed_in_any_epoch(words, tmp_path, whole):
    limits = {"max_epochs": -1, "max_steps": 7, "limit_train_batches": 3, "val_check_interval": 2}
    run("language_model", words, tmp_path, StopAt("on_train_epoch_start", 3), **limits)
    run("language_model", words, tmp_path, StopAt("on_before_optimizer_step", 2), resume=True, **limits)
    resumed = run("language_model", words, tmp_path, resume=True, **limits)
    assert resumed.global_step == 7
    assert_same(tmp_path, resumed, *whole("language_model", **limits))


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 4, "limit_train_batches": 3}], ids=str)
@pytest.mark.parametrize("case", ["ppo", "language_model"])
def test_what_a_run_could_not_write_at_its_end_is_written_when_it_is_resumed(case, limits, words, tmp_path, whole):
    if case == "ppo" and limits:
        limits = limits | {"max_steps": 8}  # optimizer steps, of which a batch has two
    run(case, words, tmp_path, StopAt("on_train_end", 1, first=True), **limits)
    assert not (tmp_path / "run" / "final").exists()
    assert_same(tmp_path, run(case, words, tmp_path, resume=True, **limits), *whole(case, **limits))
    assert (tmp_path / "run" / "final" / "config.json").exists()


def test_a_run_that_was_stopped_early_stays_stopped(words, tmp_path):
    def impatient(patience):  # no perplexity is better than 0
        return [EarlyStopping("val/perplexity", patience=patience, stopping_threshold=None, min_delta=1e9)]

    run("language_model", words, tmp_path, StopAt("on_train_end", 1, first=True), more=impatient(1))
    resumed = run("language_model", words, tmp_path, resume=True, more=impatient(1))
    assert resumed.global_step == 4 and (tmp_path / "run" / "final" / "config.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run("language_model", words, tmp_path, resume=True, more=impatient(50)).global_step > 4


def test_every_loggers_log_goes_back_to_the_checkpoint(words, tmp_path):
    def another():
        return [TensorBoardLogger(tmp_path / "other", name="", version="run", default_hp_metric=False)]

    run("language_model", words, tmp_path, StopAt("on_before_optimizer_step", 3), loggers=another())
    (tmp_path / "run" / "checkpoints" / "batch_000003.ckpt").unlink()
    run("language_model", words, tmp_path, resume=True, loggers=another())
    assert logged(tmp_path / "other") == logged(tmp_path)
    assert [step for step, _ in logged(tmp_path / "other")["train/loss"]] == [*range(8)]


def test_a_loggers_new_folder_keeps_no_other_from_going_back(words, tmp_path, whole):
    def unnumbered():
        return [TensorBoardLogger(tmp_path / "other", default_hp_metric=False)]

    run("ppo", words, tmp_path, StopAt("on_before_optimizer_step", 3), loggers=unnumbered())
    (tmp_path / "run" / "checkpoints" / "batch_000003.ckpt").unlink()
    assert_same(tmp_path, run("ppo", words, tmp_path, resume=True, loggers=unnumbered()), *whole("ppo"))


def test_the_runs_compared_learn_something(whole):
    for case in ("ppo", "ppo_lora", "ppo_anchor"):
        values = logged(whole(case)[0])
        assert min(value for _, value in values["train/grad_norm"]) > 0
        assert len({value for _, value in values["train/reward"]}) > 1


class Numbers(LightningDataModule):
    """Rows that workers fetch, in the order of a `ResumableLoader`."""

    def train_dataloader(self):
        sampler = EpochSampler(8, 2, seed=1)
        return ResumableLoader(
            lambda: Position.of(self.trainer), range(8), batch_size=2, sampler=sampler, num_workers=1, collate_fn=list
        )


class Remembers(LightningModule):
    """Sees rows, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("batches", [4, 6])  # at an epoch's end, and inside the next one
def test_a_loader_with_workers_goes_on_in_the_same_order(tmp_path, batches):
    def fit(epochs, path=None, **limits):
        module = Remembers()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        keep = BatchCheckpoint(every=1, keep=9)
        trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=[keep], **quiet, **limits)
        trainer.fit(module, Numbers(), ckpt_path=path, weights_only=True)
        return module.seen

    whole = fit(3)
    shutil.copy(tmp_path / "checkpoints" / f"batch_{batches:06d}.ckpt", tmp_path / "start.ckpt")
    assert whole[:4] != whole[4:8]
    assert fit(3, tmp_path / "start.ckpt") == whole[batches:]


def test_gradients_on_their_way_are_not_cut(words, tmp_path, whole):
    options = {"accumulate_grad_batches": 2}
    run("language_model", words, tmp_path, StopAt("on_train_batch_start", 3), **options)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["batch_000002.ckpt"]
    assert_same(
        tmp_path, run("language_model", words, tmp_path, resume=True, **options), *whole("language_model", **options)
    )


def test_what_was_logged_after_the_checkpoint_is_removed(words, tmp_path, whole):
    """Also where the run that is resumed was ahead of the checkpoint, as after a kill with all its logs on the disk."""
    run("ppo", words, tmp_path, StopAt("on_train_batch_start", 6))
    (tmp_path / "run" / "checkpoints" / "batch_000005.ckpt").unlink()
    torn = next((tmp_path / "run").glob("events.*"))
    torn.write_bytes(torn.read_bytes()[:-7])  # half a record at the end
    assert max(step for step, _ in logged(tmp_path)["train/reward"]) >= 5
    assert_same(tmp_path, run("ppo", words, tmp_path, resume=True), *whole("ppo"))


def test_another_folders_logs_are_left_alone(words, tmp_path):
    run("ppo", words, tmp_path / "first", max_epochs=1)
    other = tmp_path / "second" / "run"
    other.mkdir(parents=True)
    (other / "samples.jsonl").write_text("another run's\n")
    (other / "checkpoints").mkdir()
    last = max((tmp_path / "first" / "run" / "checkpoints").iterdir())
    (other / "checkpoints" / last.name).write_bytes(last.read_bytes())
    run("ppo", words, tmp_path / "second", resume=True)
    assert (other / "samples.jsonl").read_text().startswith("another run's\n")
