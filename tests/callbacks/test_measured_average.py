"""`EMAOnly(validate=True)`: what is measured is the average of the weights that are measured."""

import warnings

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_loop import DECAY, loop

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAOnly
from elastic_lightning.errors import UserError


class Monitored(Callback):
    """What validation in a fit logged, epoch by epoch."""

    def __init__(self, name="val/loss"):
        self.name, self.values = name, []

    def on_validation_end(self, trainer, pl_module):
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics[self.name]))


def build(lab):
    class Measured(lab.plain):
        """Logs the loss wherever it is measured, and predicts it."""

        def test_step(self, batch, batch_idx):
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx):
            return self.loss(batch)

    return Measured()


def make(**options):
    return EMAOnly(decay=DECAY, save=False, **{"validate": True} | options)


def loss_of(lab, weights, batch):
    """Of these weights in a plain module."""
    module = lab.plain()
    for parameter, value in zip(module.net.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    return module.loss(batch).item()


def fitted(lab, root, callback, **options):
    """A trainer after three epochs, with a checkpoint of each; what was monitored, and what it should have been."""
    batches, held_out = lab.batches(3), lab.batches(4)[3:]
    monitored = Monitored()
    files = ModelCheckpoint(root, "{epoch}", "val/loss", save_top_k=-1, **options)
    trainer = lab.trainer(root, [callback, files, monitored], max_epochs=3, enable_checkpointing=True)
    module = build(lab)
    trainer.fit(module, lab.loader(batches), lab.loader(held_out))
    plain = [loop(lab.plain(), batches * epochs, None)[:2] for epochs in (1, 2, 3)]
    losses = [[loss_of(lab, weights, held_out[0]) for weights in sets] for sets in plain]
    online, average = zip(*losses, strict=True)
    return trainer, module, lab.loader(held_out), monitored.values, average, online


def measure(trainer, module, loader, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun`|.*does not have many workers")
        validated = trainer.validate(module, loader, verbose=False, **options)[0]["val/loss"]
        tested = trainer.test(module, loader, verbose=False, **options)[0]["val/loss"]
        (predicted,) = trainer.predict(module, loader, **options)
    return [validated, tested, predicted.item()]


@pytest.mark.parametrize("offload", [False, True])
def test_what_was_monitored_is_measured_again(lab, tmp_path, offload):
    trainer, module, held_out, monitored, average, online = fitted(lab, tmp_path, make(offload=offload))
    assert monitored == pytest.approx(average, rel=1e-5)
    best = trainer.checkpoint_callback.best_model_path
    assert abs(average[0] - average[2]) > 0.01 and abs(average[0] - online[0]) > 0.01  # it can be told which
    after = [p.detach().clone() for p in module.net.parameters()]
    assert measure(trainer, module, held_out) == pytest.approx([average[2]] * 3, rel=1e-5)  # what is in memory
    assert all(torch.equal(p, q) for p, q in zip(module.net.parameters(), after, strict=True))
    for epoch in (0, 2, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        expected = pytest.approx([average[epoch]] * 3, rel=1e-5)
        assert measure(trainer, module, held_out, ckpt_path=path) == expected
        fresh = lab.trainer(tmp_path, [make(offload=offload)])
        assert measure(fresh, build(lab), held_out, ckpt_path=path) == expected
        loaded = build(lab)
        EMAOnly.load_average(loaded, path)
        assert [loaded.loss(batch).item() for batch in held_out] == pytest.approx([average[epoch]], rel=1e-5)
    measured = trainer.validate(module, held_out, ckpt_path=best, verbose=False)[0]["val/loss"]
    assert measured == pytest.approx(min(monitored), rel=1e-5)


def test_other_modules_have_no_average(lab, tmp_path):
    trainer, _, held_out, *_ = fitted(lab, tmp_path, make())
    other = build(lab)
    expected = [other.loss(batch).item() for batch in held_out] * 3
    assert measure(trainer, other, held_out) == pytest.approx(expected, rel=1e-6)


def test_without_validate_the_weights_themselves_are_measured(lab, tmp_path):
    trainer, module, held_out, monitored, _, online = fitted(lab, tmp_path, make(validate=False))
    assert monitored == pytest.approx(online, rel=1e-5)
    path = tmp_path / "epoch=0.ckpt"
    assert measure(trainer, module, held_out, ckpt_path=path) == pytest.approx([online[0]] * 3, rel=1e-5)


def test_a_file_without_an_average_is_measured_as_it_is(lab, tmp_path):
    with pytest.warns(UserWarning, match="save_weights_only do not hold"):
        trainer, module, held_out, _, _, online = fitted(lab, tmp_path, make(), save_weights_only=True)
    path = tmp_path / "epoch=0.ckpt"
    with pytest.warns(UserWarning, match=r"epoch=0\.ckpt holds no average"):
        measured = measure(trainer, module, held_out, ckpt_path=path)
    assert measured == pytest.approx([online[0]] * 3, rel=1e-5)
    with pytest.raises(UserError, match="holds no average"):
        EMAOnly.load_average(module, path)


def test_a_fit_goes_on_from_what_was_measured(lab, tmp_path):
    """A checkpoint that was loaded to be measured brought weights, average and clock."""
    callbacks = [make(), ElasticReset(every=4, decay=DECAY)]
    batches, module = lab.batches(3), lab.plain(torch.optim.SGD)
    trainer = lab.fit(module, tmp_path, callbacks, batches)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, lab.loader(batches))
    trainer.validate(module, lab.loader(batches), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    lab.fit(module, tmp_path, callbacks, batches)
    online, ema, initial = loop(lab.plain(torch.optim.SGD), batches * 2, 4)
    assert [callback.batches for callback in callbacks] == [6, 6]
    for ours, theirs in ((module.net.parameters(), online), (callbacks[1].ema.values(), ema)):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.detach(), other, atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(callbacks[1].initial.values(), initial, strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_a_policy_measures_what_was_monitored(lab, tmp_path, lora):
    """In another process, as from the command line: fresh module, callback and trainer."""
    monitored, batches = Monitored("val/kl"), lab.prompts(2)
    trainer = lab.trainer(tmp_path, [make(), monitored], max_epochs=2)
    trainer.fit(lab.ppo(lora=lora), lab.loader(batches), lab.loader(batches[:1]))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh, module = lab.trainer(tmp_path, [make()]), lab.ppo(lora=lora)
    options = {"ckpt_path": tmp_path / "end.ckpt", "weights_only": True, "verbose": False}
    (measured,) = fresh.validate(module, lab.loader(batches[:1]), **options)
    assert measured["val/kl"] == pytest.approx(monitored.values[-1], rel=1e-5)
    (online,) = lab.trainer(tmp_path).validate(module, lab.loader(batches[:1]), **options)
    assert abs(online["val/kl"] - measured["val/kl"]) > 1e-4
