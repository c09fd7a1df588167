"""The average in CPU memory is the average, however late its thread is; and what averaging cost is measured."""

import time

import pytest
import torch

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAOnly, HareTortoise, offload
from elastic_lightning.callbacks.stopwatch import Stopwatch

DECAY = 0.9
MAKES = {
    "elastic": lambda **options: ElasticReset(every=3, decay=DECAY, **options),
    "elastic on batches": lambda **options: ElasticReset(every=3, decay=DECAY, update_on="batch", **options),
    "hare": lambda **options: HareTortoise(every=2, decay=DECAY, **options),
    "ema": lambda **options: EMAOnly(decay=DECAY, validate=True, save=False, **options),
}


@pytest.fixture
def late(monkeypatch):
    """The thread comes after the training went on."""

    def slow(*args):
        time.sleep(0.005)
        lerp(*args)

    lerp = offload.lerp_
    monkeypatch.setattr(offload, "lerp_", slow)


def runs(lab, root, make, **trainer):
    """The same training with the average in place and offloaded: modules and callbacks."""
    found = []
    for options in ({}, {"offload": True}):
        module, callback = lab.manual(), make(**options)
        lab.fit(module, root, [callback], lab.batches(8), **trainer)
        found.append((module, callback))
    return found


def assert_equal(one, two, atol=0.0):
    (module, callback), (other, offloaded) = one, two
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(dict(other.named_parameters())[name], parameter, atol=atol, rtol=0)
    assert (offloaded.updates, offloaded.resets) == (callback.updates, callback.resets)
    for name, average in callback.ema.items():
        torch.testing.assert_close(offloaded.ema[name].cpu(), average.cpu(), atol=atol, rtol=0)
        assert offloaded.ema[name].device.type == "cpu"
    for name, initial in callback.initial.items():
        assert torch.equal(offloaded.initial[name].cpu(), initial.cpu())


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_an_offloaded_average_is_the_average(lab, tmp_path, make, late):
    assert_equal(*runs(lab, tmp_path, make))


def test_its_state_is_complete_when_it_is_saved(lab, tmp_path, late):
    _, (module, callback) = runs(lab, tmp_path, MAKES["elastic"])
    trainer = lab.fit(module, tmp_path, [callback], lab.batches(1))  # goes on: the thread is there again
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    (state,) = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"].values()
    assert state["updates"] == callback.updates
    assert all(torch.equal(state["ema"][name], value) for name, value in callback.ema.items())


def test_what_goes_wrong_in_the_thread_is_not_lost(lab, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(offload, "lerp_", broken)
    with pytest.raises(RuntimeError, match="no room"):
        lab.fit(lab.plain(), tmp_path, [ElasticReset(every=3, offload=True)])


@pytest.mark.cuda
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_an_offloaded_average_is_the_average_on_cuda(lab, tmp_path, make, late, monkeypatch):
    """The copy is late too: without the optimizer's wait it would read weights of the next step."""
    update = offload.OffloadedAverage.update

    def slow(average, names=None):
        average.wait()
        with torch.cuda.stream(average.stream):
            torch.cuda._sleep(20_000_000)
        update(average, names)

    monkeypatch.setattr(offload.OffloadedAverage, "update", slow)
    assert_equal(*runs(lab, tmp_path, make, accelerator="cuda", devices=1), atol=1e-6)


def test_a_stopwatch_adds_up_and_starts_anew():
    watch, device = Stopwatch(), torch.device("cpu")
    for _ in range(2):
        with watch.running(device):
            time.sleep(0.02)
        time.sleep(0.05)
    assert 0.04 <= watch.read() < 0.08
    assert watch.read() == 0


def test_the_time_inside_is_logged_at_each_ppo_step(lab, tmp_path, logger, read_events, monkeypatch):
    from elastic_lightning.callbacks import weight_store

    def slow(*args):
        time.sleep(0.01)
        lerp(*args)

    lerp = weight_store.lerp_
    monkeypatch.setattr(weight_store, "lerp_", slow)
    callback = ElasticReset(every=2)
    lab.fit(lab.ppo(), tmp_path, [callback], lab.prompts(3), logger=logger)
    seconds = read_events(logger.log_dir)["time/ElasticReset_seconds"]
    assert [step for step, _ in seconds] == [1, 2, 3]
    a_batch = 0.01 * callback.updates / 3
    assert all(a_batch <= value < 3 * a_batch + 0.1 for _, value in seconds)
