"""One callback over several fits: of one module, which goes on, and of others, which begin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback
from plain_loop import DECAY, assert_same, loop

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAOnly, HareTortoise, ReferenceReset, ResetToInitial

SGD = torch.optim.SGD  # Lightning makes the optimizer of each fit anew: this one remembers nothing
KINDS = {
    "elastic": (lambda: ElasticReset(every=4, decay=DECAY), 4, {}),
    "batch": (lambda: ElasticReset(every=4, decay=DECAY, update_on="batch"), 4, {"update_on": "batch"}),
    "offload": (lambda: ElasticReset(every=4, decay=DECAY, offload=True), 4, {}),
    "hare": (lambda: HareTortoise(every=4, decay=DECAY), 4, {"reset": "hare"}),
    "initial": (lambda: ResetToInitial(every=4), 4, {"reset": "initial"}),
    "only": (lambda: EMAOnly(decay=DECAY, save=False), None, {}),
}


def fit_twice(lab, root, module, callbacks, batches, again=False):
    """Epoch by epoch: with one trainer whose `max_epochs` is raised, or with two."""
    trainer = lab.fit(module, root, callbacks, batches)
    if again:
        lab.fit(module, root, callbacks, batches)
    else:
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, lab.loader(batches))
    return trainer


@pytest.mark.parametrize("again", [False, True], ids=["one_trainer", "two_trainers"])
@pytest.mark.parametrize(("make", "every", "how"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["plain", "manual"])
def test_two_fits_are_one(lab, tmp_path, kind, make, every, how, again):
    module, callback, batches = getattr(lab, kind)(SGD), make(), lab.batches(6)
    fit_twice(lab, tmp_path, module, [callback], batches, again)
    online, ema, initial = loop(getattr(lab, kind)(SGD), batches * 2, every, steps=3 if kind == "manual" else 1, **how)
    assert (callback.batches, callback.resets) == (12, 3 if every else 0)
    assert_same(module.net.parameters(), online)
    for ours, theirs in ((callback.ema, ema), (callback.initial, initial)):
        assert_same(ours.values(), theirs if ours else [])


class Recorder(Callback):
    """The policy's weights after each batch, before a reset there."""

    def __init__(self):
        self.batches = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append({n: p.detach().clone() for n, p in pl_module.shadowed_parameters().items()})


@pytest.mark.parametrize("lora", [False, True])
def test_two_fits_of_ppo_are_one(lab, tmp_path, lora):
    def build():
        module = lab.ppo(lora=lora)

        def configure():
            optimizer = SGD(module.parameter_groups(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)]

        module.configure_optimizers = configure
        return module

    def make():
        return ElasticReset(every=3, decay=DECAY, update_on="batch")

    batches, recorder = lab.prompts(2), Recorder()
    whole, one, module, two = build(), make(), build(), make()
    start = {name: p.detach().clone() for name, p in module.shadowed_parameters().items()}
    lab.fit(whole, tmp_path, [one], batches, max_epochs=2)
    fit_twice(lab, tmp_path, module, [recorder, two], batches)
    assert (two.batches, two.updates, two.resets) == (4, 4, 1)
    weights = dict(module.named_parameters())
    assert all(torch.equal(weights[name], parameter) for name, parameter in whole.named_parameters())
    assert all(torch.equal(two.initial[name], value) for name, value in start.items())
    for name, value in start.items():  # the reset after three batches sets the average to theta_0; one batch follows
        expected = DECAY * value + (1 - DECAY) * recorder.batches[3][name]
        torch.testing.assert_close(two.ema[name], expected, atol=1e-6, rtol=0)


def test_every_module_has_a_clock_of_its_own(lab, tmp_path):
    callback, folds = ElasticReset(every=4, decay=DECAY), [lab.batches(6)[:5], lab.batches(6), lab.batches(6)[1:]]
    for batches in folds:  # as in a cross-validation
        module = lab.plain()
        lab.fit(module, tmp_path, [callback], batches)
        online, ema, initial = loop(lab.plain(), batches, 4)
        assert (callback.batches, callback.resets) == (len(batches), 1)
        assert_same(module.net.parameters(), online)
        assert_same(callback.ema.values(), ema)
        assert_same(callback.initial.values(), initial)
        del module  # another one may come to lie at its address


def test_weights_that_were_changed_in_between_start_anew(lab, tmp_path):
    module, callback, batches = lab.plain(SGD), ElasticReset(every=4, decay=DECAY), lab.batches(5)
    lab.fit(module, tmp_path, [callback], batches)
    for changed in (module, plain := lab.plain(SGD)):
        changed.net.bias.data.fill_(2.0)
    module.net.weight.data.copy_(plain.net.weight)
    with pytest.warns(UserWarning, match="not those that the last fit ended with"):
        lab.fit(module, tmp_path, [callback], batches)
    online, ema, initial = loop(plain, batches, 4)
    assert callback.batches == 5
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)
    assert_same(callback.initial.values(), initial)


@pytest.mark.parametrize("offload", [False, True])
def test_after_an_exception_a_fit_goes_on(lab, tmp_path, offload):
    class Breaks(lab.plain):
        """Keeps its optimizer, and stops in the third batch of the first fit."""

        def __init__(self):
            super().__init__(SGD)
            self.kept, self.broken = SGD(self.net.parameters(), lr=0.1), False

        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and not self.broken:
                self.broken = True
                raise RuntimeError("out of memory, say")
            return self.loss(batch)

        def configure_optimizers(self):
            return self.kept

    module, callback = Breaks(), EMAOnly(decay=DECAY, save=False, offload=offload)
    batches = lab.batches(6)
    with pytest.raises(RuntimeError, match="out of memory"):
        lab.fit(module, tmp_path, [callback], batches)
    lab.fit(module, tmp_path, [callback], batches)
    online, ema, _ = loop(lab.plain(SGD), batches[:2] + batches, None)
    assert (callback.batches, callback.updates) == (8, 8)
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)


def test_a_state_is_of_the_module_that_it_was_loaded_for(lab, tmp_path):
    batches, callback = lab.batches(5), ElasticReset(every=4, decay=DECAY)
    lab.fit(lab.plain(SGD), tmp_path, [ElasticReset(every=4, decay=DECAY)], batches).save_checkpoint(
        tmp_path / "a.ckpt"
    )
    trainer = lab.trainer(tmp_path, [callback])
    measured, other = lab.plain(SGD), lab.plain(SGD)
    trainer.validate(measured, lab.loader(batches), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "b.ckpt")  # of the same weights, and so with the same state
    (state,) = torch.load(tmp_path / "b.ckpt", weights_only=True)["callbacks"].values()
    assert (state["batches"], state["resets"]) == (5, 1)
    lab.fit(other, tmp_path, [callback], batches)
    assert callback.batches == 5
    assert_same(other.net.parameters(), loop(lab.plain(SGD), batches, 4)[0])


def test_a_search_for_a_learning_rate_leaves_no_trace(lab, tmp_path):
    from lightning.pytorch.callbacks import LearningRateFinder

    class Rate(lab.plain):
        def __init__(self):
            super().__init__(SGD)
            self.lr = 0.1

        def configure_optimizers(self):
            return SGD(self.net.parameters(), lr=self.lr)

    module, callback, batches = Rate(), ElasticReset(every=4, decay=DECAY), lab.batches(6)
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    lab.fit(module, tmp_path, [callback, finder], batches)
    trained = lab.plain(SGD)
    online, ema, initial = loop(trained, batches, 4, rate=module.trainer.optimizers[0].param_groups[0]["lr"])
    assert (callback.batches, callback.updates, callback.resets) == (6, 6, 1)
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)
    assert_same(callback.initial.values(), initial)


def test_a_reference_that_begins_to_move_leaves_theta_0(lab, tmp_path):
    module, callback = lab.ppo(), ElasticReset(every=3, decay=DECAY)
    start = {name: p.detach().clone() for name, p in module.shadowed_parameters().items()}
    lab.fit(module, tmp_path, [callback], lab.prompts(1))
    lab.fit(module, tmp_path, [ReferenceReset(every=1), callback], lab.prompts(1))  # before ours
    lab.fit(module, tmp_path, [callback], lab.prompts(1))  # and nothing moves it any more
    reference = dict(module.reference.lm.named_parameters())
    assert any(not torch.equal(reference[name], value) for name, value in start.items())
    assert all(torch.equal(callback.initial[name], value) for name, value in start.items())
    assert callback.resets == 1  # to an average that began at theta_0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_fits_on_two_ranks_are_one(lab, tmp_path, kind):
    here, output = Path(__file__).parent, tmp_path / "found.pt"
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / "two_fits_on_two_ranks.py"), kind, str(output)]
    run = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found, batches = torch.load(output), lab.batches(6)
    online, ema, initial = loop(lab.plain(SGD), batches * 2, 4)
    for name, expected in (("online", online), ("ema", ema), ("initial", initial)):
        assert_same(found[name], expected)
