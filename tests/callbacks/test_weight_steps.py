"""When which weights move: several optimizers, skipped steps, accumulation, weights that join, buffers, odd types."""

import warnings

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from plain_loop import DECAY, assert_same, loop
from torch import nn

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAOnly, ResetToInitial
from elastic_lightning.errors import UserError


def seeded(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def towards_average(average, tensors):
    for name, tensor in tensors.items():
        average[name].mul_(DECAY).add_(tensor.detach(), alpha=1 - DECAY)


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# Several optimizers ----------------------------------------------------------------------------------------------


class Two(LightningModule):
    """A generator with a norm, and a discriminator that takes several steps for one of the generator's."""

    def __init__(self, ratio):
        super().__init__()
        self.automatic_optimization, self.ratio = False, ratio
        self.generator = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.discriminator = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        seeded(self)

    def train_on(self, batch, optimizers, backward, stepped):
        generator, discriminator = optimizers
        for _ in range(self.ratio):
            discriminator.zero_grad()
            backward(self.discriminator(self.generator(batch).detach()).square().mean())
            discriminator.step()
            stepped("discriminator")
        generator.zero_grad()
        backward((self.discriminator(self.generator(batch)) - 1).square().mean())
        generator.step()
        stepped("generator")

    def training_step(self, batch, batch_idx):
        self.train_on(batch, self.optimizers(), self.manual_backward, lambda part: None)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.generator, self.discriminator)]

    def tensors(self):
        buffers = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        return dict(self.named_parameters()) | buffers


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
@pytest.mark.parametrize("ratio", [1, 5])
def test_an_average_moves_when_its_optimizer_steps(lab, tmp_path, ratio, update_on, offload):
    module, plain, batches = Two(ratio), Two(ratio), lab.batches(5)
    callback = ElasticReset(every=3, decay=DECAY, update_on=update_on, buffers=True, offload=offload)
    lab.fit(module, tmp_path, [callback], batches)

    tensors = plain.tensors()
    average, initial = copies(tensors), copies(tensors)

    def stepped(part):
        if update_on == "optimizer_step":
            towards_average(average, {name: tensor for name, tensor in tensors.items() if name.startswith(part)})

    optimizers = plain.configure_optimizers()
    for number, batch in enumerate(batches, start=1):
        plain.train_on(batch, optimizers, lambda loss: loss.backward(), stepped)
        if update_on == "batch":
            towards_average(average, tensors)
        if number == 3:
            for name, tensor in tensors.items():
                tensor.data.copy_(average[name])
                average[name].copy_(initial[name])
    assert callback.ema.keys() == average.keys()
    for name, tensor in module.tensors().items():
        torch.testing.assert_close(tensor, tensors[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(callback.ema[name], average[name], atol=1e-5, rtol=0)


# Steps that are left out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
@pytest.mark.parametrize("why", ["scaler", "scaler, fused", "no loss"])
def test_an_average_follows_taken_steps_only(lab, tmp_path, why, update_on):
    class Skips(lab.plain):
        def training_step(self, batch, batch_idx):
            bad = batch_idx in (1, 2, 4)
            if why == "no loss":
                return None if bad else self.loss(batch)
            return self.loss(batch) * (torch.inf if bad else 1.0)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.1, fused=why.endswith("fused"))

    class Autocastless(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    module, callback, batches = Skips(), EMAOnly(decay=DECAY, update_on=update_on, save=False), lab.batches(6)
    options = {}
    if why != "no loss":
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        options = {"plugins": [Autocastless("16-mixed", "cpu", scaler)]}
    lab.fit(module, tmp_path, [callback], batches, **options)
    online, ema, _ = loop(lab.plain(), [batches[0], batches[3], batches[5]], None)
    assert callback.updates == 3
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)


# Accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["elastic", "initial"])
@pytest.mark.parametrize("every", [3, 5])
def test_a_reset_drops_the_gradients_that_wait(lab, tmp_path, every, kind):
    module, batches = lab.plain(torch.optim.SGD), lab.batches(8)
    callback = ElasticReset(every=every, decay=DECAY) if kind == "elastic" else ResetToInitial(every=every)
    lab.fit(module, tmp_path, [callback], batches, accumulate_grad_batches=2)
    online, ema, _ = loop(lab.plain(torch.optim.SGD), batches, every, reset=kind, accumulate=2)
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema if callback.ema else [])


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [4, 8]), (4, [1, 2])])
def test_the_axis_counts_the_steps_of_the_training_log(lab, tmp_path, logger, read_events, accumulate, steps):
    module = lab.plain()
    module.training_step = lambda batch, batch_idx: logged(module.loss(batch))

    def logged(loss):
        module.log("train/loss", loss)
        return loss

    options = {"accumulate_grad_batches": accumulate, "logger": logger}
    lab.fit(module, tmp_path, [ElasticReset(every=4)], lab.batches(8), **options)
    curves = read_events(logger.log_dir)
    assert [step for step, _ in curves["reset/count"]] == steps
    # Lightning counts from 0: the batch that ended in step n has its loss at n - 1.
    assert {step - 1 for step in steps} <= {step for step, _ in curves["train/loss"]}


# Weights that join -----------------------------------------------------------------------------------------------


class Deep(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)
        seeded(self)

    def loss(self, batch):
        return (self.head(torch.tanh(self.body(batch))) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.1)


def unfrozen_later(batches, every):
    """Three epochs, the body trained from the second on."""
    module, optimizer = Deep(), None
    average, initial = {}, {}
    for epoch in range(3):
        for index, batch in enumerate(batches):
            parts = dict(module.head.named_parameters(prefix="head"))
            parts |= dict(module.body.named_parameters(prefix="body")) if epoch else {}
            for name, tensor in parts.items():
                initial.setdefault(name, tensor.detach().clone())
                average.setdefault(name, tensor.detach().clone())
            optimizer = torch.optim.SGD(parts.values(), lr=0.1)
            module.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
            towards_average(average, parts)
            if (epoch * len(batches) + index + 1) % every == 0:
                for name, tensor in parts.items():
                    tensor.data.copy_(average[name])
                    average[name].copy_(initial[name])
    return module, average, initial


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_that_are_unfrozen_later_join(lab, tmp_path, capsys, ours_first):
    module, callback, batches = Deep(), ElasticReset(every=4, decay=DECAY), lab.batches(5)
    callbacks = [callback, Unfreeze()] if ours_first else [Unfreeze(), callback]
    lab.fit(module, tmp_path, callbacks, batches, max_epochs=3)
    plain, average, initial = unfrozen_later(batches, 4)
    assert_same(module.parameters(), [p.detach() for p in plain.parameters()])
    for ours, theirs in ((callback.ema, average), (callback.initial, initial)):
        assert ours.keys() == theirs.keys()
        assert_same([ours[name] for name in theirs], theirs.values())
    lines = [line for line in capsys.readouterr().out.splitlines() if "join" in line]
    assert lines == ["ElasticReset: 2 weights join, theta_0 is what they are now: body.weight, body.bias"]


def test_what_joined_is_there_again_in_a_resumed_run(lab, tmp_path):
    """Lightning leaves it to the module to unfreeze what was unfrozen when its checkpoint was written."""
    callback, batches = ElasticReset(every=7, decay=DECAY), lab.batches(5)
    trainer = lab.fit(Deep(), tmp_path, [callback, Unfreeze()], batches, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = ElasticReset(every=7, decay=DECAY)
    trainer = lab.trainer(tmp_path, [resumed, Unfreeze()], max_epochs=3)
    trainer.fit(Deep(), lab.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.batches == 15
    assert resumed.initial.keys() == resumed.ema.keys() == {"head.weight", "head.bias", "body.weight", "body.bias"}
    assert all(torch.equal(resumed.initial[name], value) for name, value in callback.initial.items())


# Buffers ---------------------------------------------------------------------------------------------------------


class Normed(LightningModule):
    """A norm between two layers."""

    def __init__(self):
        super().__init__()
        self.net = seeded(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))

    def training_step(self, batch, batch_idx):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def normed_loop(batches, every, buffers):
    module = Normed()
    optimizer = module.configure_optimizers()
    statistics = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    tensors = dict(module.named_parameters()) | (statistics if buffers else {})
    average, initial = copies(tensors), copies(tensors)
    for number, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
        towards_average(average, tensors)
        if number % every == 0:
            for name, tensor in tensors.items():
                tensor.data.copy_(average[name])
                average[name].copy_(initial[name])
    return module, average


@pytest.mark.parametrize("buffers", [False, True])
def test_buffers_take_part_where_asked(lab, tmp_path, buffers):
    module, callback, batches = Normed(), ElasticReset(every=4, decay=DECAY, buffers=buffers), lab.batches(6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lab.fit(module, tmp_path, [callback], batches, max_epochs=2)
    said = [str(warning.message) for warning in caught if "buffers" in str(warning.message)]
    assert len(said) == (0 if buffers else 1) and all("net.1.running_mean" in line for line in said)
    plain, average = normed_loop(batches * 2, 4, buffers)
    assert callback.ema.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(callback.ema[name], value, atol=1e-5, rtol=0)
    state = module.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-5, rtol=0)
    assert state["net.1.num_batches_tracked"] == 12


def test_buffers_are_resumed(lab, tmp_path):
    def make():
        return ElasticReset(every=4, decay=DECAY, buffers=True)

    batches, resumed, module = lab.batches(6), make(), Normed()
    lab.fit(Normed(), tmp_path, [make()], batches).save_checkpoint(tmp_path / "half.ckpt")
    trainer = lab.trainer(tmp_path, [resumed], max_epochs=2)
    trainer.fit(module, lab.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    plain, average = normed_loop(batches * 2, 4, True)
    assert_same(module.parameters(), [p.detach() for p in plain.parameters()])
    assert_same([resumed.ema[name] for name in average], average.values())


# Types and patterns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
def test_wide_and_complex_parameters_keep_all_of_their_numbers(lab, tmp_path, dtype):
    class Odd(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1 + 0.5j, -2 + 1e-10j]).to(torch.complex128).to(dtype))

        def training_step(self, batch, batch_idx):
            target = torch.tensor(2 - 1j).to(dtype)
            return (self.weight - target).abs().square().sum().float()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex")
        module, plain = Odd(), Odd()
    callback = ElasticReset(every=4, decay=DECAY)
    depths = []
    callback.before_reset = lambda *_: depths.append(callback.store.depth())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex")
        lab.fit(module, tmp_path, [callback], lab.batches(6))
        optimizer, average, initial = (
            plain.configure_optimizers(),
            plain.weight.detach().clone(),
            plain.weight.detach().clone(),
        )
        for number in range(1, 7):
            optimizer.zero_grad()
            plain.training_step(None, 0).backward()
            optimizer.step()
            average = DECAY * average + (1 - DECAY) * plain.weight.detach()
            if number == 4:
                assert depths == [pytest.approx(torch.linalg.vector_norm(plain.weight - initial).item(), rel=1e-6)]
                plain.weight.data.copy_(average)
                average = initial.clone()
    tolerance = 1e-6 if dtype == torch.complex64 else 1e-12
    assert callback.ema["weight"].dtype == dtype
    torch.testing.assert_close(module.weight, plain.weight, atol=tolerance, rtol=0)
    torch.testing.assert_close(callback.ema["weight"], average, atol=tolerance, rtol=0)


@pytest.mark.parametrize("patterns", [["net.*", "nett.*"], ["nett.bias", "net.*"]])
def test_a_pattern_that_matches_nothing_is_refused(lab, tmp_path, patterns):
    with pytest.raises(UserError, match=r"pattern 'nett\."):
        lab.fit(lab.plain(), tmp_path, [ElasticReset(every=5, parameters=patterns)])
