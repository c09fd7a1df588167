"""Elastic Reset and its relatives against a plain loop that knows no Lightning."""

import pytest
import torch
from lightning import Callback
from plain_loop import DECAY, assert_same, loop

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAAnchor, EMAOnly, HareTortoise, ReferenceReset, ResetToInitial, WeightSets
from elastic_lightning.errors import UserError


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
@pytest.mark.parametrize("kind", ["plain", "manual"])
def test_elastic_reset_is_the_loop(lab, tmp_path, kind, update_on, optimizer):
    build = getattr(lab, kind)
    module, batches = build(optimizer), lab.batches(8)
    callback = ElasticReset(every=3, decay=DECAY, update_on=update_on)
    lab.fit(module, tmp_path, [callback], batches)
    steps = 3 if kind == "manual" else 1
    online, ema, initial = loop(build(optimizer), batches, 3, update_on, steps=steps)
    assert (callback.resets, callback.batches, callback.next_reset) == (2, 8, 1)
    assert callback.updates == 8 * (steps if update_on == "optimizer_step" else 1)
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)
    assert_same(callback.initial.values(), initial)


@pytest.mark.parametrize("every", [1, 2, 4, 5])
def test_resets_at_the_end_of_every_nth_batch(lab, tmp_path, every):
    class Watch(Callback):
        at, left = [], []

        def on_before_reset(self, trainer, pl_module):
            self.at.append(callback.batches)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.left.append(callback.next_reset)

    Watch.at, Watch.left = [], []
    callback = ElasticReset(every=every)
    lab.fit(lab.plain(), tmp_path, [callback, Watch()], lab.batches(3), max_epochs=3)  # batches count over epochs
    assert Watch.at == list(range(every, 10, every))
    assert Watch.left == [every - number % every for number in range(1, 10)]


@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
def test_accumulated_gradients(lab, tmp_path, update_on):
    module, batches = lab.plain(), lab.batches(8)
    callback = ElasticReset(every=4, decay=DECAY, update_on=update_on)
    lab.fit(module, tmp_path, [callback], batches, accumulate_grad_batches=2)
    online, ema, _ = loop(lab.plain(), batches, 4, update_on, accumulate=2)
    assert callback.updates == (4 if update_on == "optimizer_step" else 8)
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)


@pytest.mark.parametrize("kind", ["plain", "manual"])
@pytest.mark.parametrize(("relative", "reset"), [(HareTortoise, "hare"), (ResetToInitial, "initial"), (EMAOnly, None)])
def test_relatives_are_the_loop(lab, tmp_path, kind, relative, reset):
    build = getattr(lab, kind)
    module, batches = build(), lab.batches(7)
    every = None if reset is None else 3
    options = {"save": False} if relative is EMAOnly else {"every": 3}
    callback = relative(**options) if relative is ResetToInitial else relative(**options, decay=DECAY)
    lab.fit(module, tmp_path, [callback], batches)
    online, ema, _ = loop(build(), batches, every, reset=reset, steps=3 if kind == "manual" else 1)
    assert_same(module.net.parameters(), online)
    if callback.uses_ema:
        assert_same(callback.ema.values(), ema)
    else:
        assert not callback.ema


def test_frozen_weights_and_buffers_take_no_part(lab, tmp_path):
    module = lab.plain()
    frozen = [p.clone() for p in module.frozen.parameters()]
    callback = ElasticReset(every=2)
    lab.fit(module, tmp_path, [callback])
    assert set(callback.ema) == set(callback.initial) == {"net.weight", "net.bias"}
    assert all(torch.equal(p, q) for p, q in zip(module.frozen.parameters(), frozen, strict=True))
    assert module.steps == 6


def test_patterns_choose(lab, tmp_path):
    callback = ElasticReset(every=2, parameters=["*.bias"])
    lab.fit(lab.plain(), tmp_path, [callback])
    assert set(callback.ema) == {"net.bias"}


@pytest.mark.parametrize("build", ["plain", "manual", "ppo"])
def test_the_optimizer_keeps_its_state_and_its_tensors(lab, tmp_path, build):
    module = getattr(lab, build)()
    names = dict(module.named_parameters())
    identity = {name: (id(p), p.data_ptr()) for name, p in names.items()}
    kept = {}

    class Compare(Callback):
        def on_before_reset(self, trainer, pl_module):
            self.state = {
                p: {n: (t, t.clone()) for n, t in state.items()} for p, state in trainer.optimizers[0].state.items()
            }
            self.weights = {name: p.detach().clone() for name, p in names.items()}

        def on_after_reset(self, trainer, pl_module):
            state = trainer.optimizers[0].state
            assert self.state and state.keys() == self.state.keys()
            for parameter, tensors in self.state.items():
                for name, (tensor, value) in tensors.items():
                    assert state[parameter][name] is tensor and torch.equal(tensor, value)
            moved = {name for name, p in names.items() if not torch.equal(p, self.weights[name])}
            kept["moved"] = kept.get("moved", set()) | moved

    lab.fit(module, tmp_path, [ElasticReset(every=2), Compare()])
    assert {name: (id(p), p.data_ptr()) for name, p in module.named_parameters()} == identity
    assert kept["moved"] and not any("value_head" in name or "reference" in name for name in kept["moved"])


def test_the_value_head_is_not_reset(lab, tmp_path):
    module, callback = lab.ppo(), ElasticReset(every=2)
    heads = []

    class Watch(Callback):
        def on_before_reset(self, trainer, pl_module):
            heads.append({n: p.clone() for n, p in pl_module.actor.value_head.named_parameters()})

        def on_after_reset(self, trainer, pl_module):
            head = dict(pl_module.actor.value_head.named_parameters())
            assert all(torch.equal(head[name], value) for name, value in heads[-1].items())

    lab.fit(module, tmp_path, [callback, Watch()])
    assert len(heads) == 2 and heads[-1]["weight"].abs().max() > 0
    assert not any("value_head" in name for name in callback.ema)
    assert set(callback.ema) == {name for name, _ in module.actor.lm.named_parameters()}
    assert callback.updates == 4 * 2 * 2


def test_lora_averages_the_adapter_alone(lab, tmp_path):
    module, callback = lab.ppo(lora=True), ElasticReset(every=2)
    lab.fit(module, tmp_path, [callback])
    assert callback.ema and all("lora_" in name for name in callback.ema)
    assert callback.initial.keys() == callback.ema.keys()  # no frozen copy exists: the start is kept


def test_theta_0_is_the_frozen_reference(lab, tmp_path):
    module, callback = lab.ppo(), ElasticReset(every=2)
    lab.fit(module, tmp_path, [callback])
    reference = dict(module.reference.lm.named_parameters())
    assert all(tensor.data_ptr() == reference[name].data_ptr() for name, tensor in callback.initial.items())
    assert "initial" not in callback.state_dict()
    first = lab.ppo().shadowed_parameters()
    assert all(torch.equal(tensor, first[name]) for name, tensor in callback.initial.items())


@pytest.mark.parametrize("mover", [lambda: ReferenceReset(every=1), lambda: EMAAnchor(decay=0.5)])
@pytest.mark.parametrize("first", [True, False])
def test_theta_0_is_a_copy_where_the_reference_moves(lab, tmp_path, mover, first):
    module, callback = lab.ppo(), ElasticReset(every=3)
    start = {name: p.detach().clone() for name, p in module.shadowed_parameters().items()}
    callbacks = [callback, mover()] if first else [mover(), callback]
    lab.fit(module, tmp_path, callbacks)
    reference = dict(module.reference.lm.named_parameters())
    assert any(not torch.equal(reference[name], start[name]) for name in start)
    assert all(torch.equal(tensor, start[name]) for name, tensor in callback.initial.items())
    assert all(torch.equal(p, start[name]) for name, p in module.initial.lm.named_parameters())
    assert callback.state_dict()["initial"].keys() == start.keys()


def test_reference_reset_follows_the_policy(lab, tmp_path, logger, read_events):
    module = lab.ppo()
    lab.fit(module, tmp_path, [ReferenceReset(every=2)], lab.prompts(4), logger=logger)
    policy = dict(module.actor.lm.named_parameters())
    assert all(torch.equal(p, policy[name]) for name, p in module.reference.lm.named_parameters())
    kl = [value for _, value in read_events(logger.log_dir)["train/kl_k3"]]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[2] == pytest.approx(0, abs=1e-7)  # the penalty starts anew
    assert kl[1] > 1e-4 and kl[3] > 1e-4


def test_ema_anchor_is_the_average(lab, tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append({n: p.detach().clone() for n, p in pl_module.shadowed_parameters().items()})

    module = lab.ppo()
    average = {name: p.detach().clone() for name, p in module.shadowed_parameters().items()}
    lab.fit(module, tmp_path, [EMAAnchor(decay=DECAY, update_on="batch"), Watch()])
    for weights in seen:
        average = {name: DECAY * value + (1 - DECAY) * weights[name] for name, value in average.items()}
    reference = dict(module.reference.lm.named_parameters())
    for name, value in average.items():
        torch.testing.assert_close(reference[name], value, atol=1e-6, rtol=0)


def test_bfloat16_weights_have_a_float32_average_that_moves(lab, tmp_path):
    class Half(lab.plain):
        def __init__(self):
            super().__init__(torch.optim.SGD)
            self.bfloat16()
            for parameter in self.net.parameters():
                parameter.data.fill_(1.0)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch.bfloat16(), batch_idx) * 0

    class Jump(Callback):  # the online weights stand at 1.5 from the first batch on
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for parameter in pl_module.net.parameters():
                parameter.data.fill_(1.5)

    module, callback = Half(), EMAOnly(decay=0.995, save=False)
    lab.fit(module, tmp_path, [callback, Jump()], lab.batches(50))
    assert all(tensor.dtype == torch.float32 for tensor in callback.ema.values())
    assert module.net.weight.dtype == torch.bfloat16
    expected = 1.5 - 0.5 * 0.995**50
    for tensor in callback.ema.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, expected), atol=1e-5, rtol=0)

    stuck = torch.ones(3, dtype=torch.bfloat16)  # what an average in the weights' own type would have done
    for _ in range(50):
        stuck.lerp_(torch.full_like(stuck, 1.5), 0.005)
    assert torch.equal(stuck, torch.ones_like(stuck))


def test_a_bfloat16_reset_rounds_the_average(lab, tmp_path):
    module = lab.plain().bfloat16()
    module.training_step = lambda batch, batch_idx: module.loss(batch.bfloat16())
    callback = ElasticReset(every=3, decay=DECAY)
    averages = []

    class Watch(Callback):
        def on_before_reset(self, trainer, pl_module):
            averages.append({name: tensor.bfloat16() for name, tensor in callback.ema.items()})

        def on_after_reset(self, trainer, pl_module):
            for name, parameter in pl_module.named_parameters():
                assert name not in averages[-1] or torch.equal(parameter, averages[-1][name])

    lab.fit(module, tmp_path, [callback, Watch()])
    assert len(averages) == 2


# Wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticReset(every=0), "every must be 1 or more"),
        (lambda: ElasticReset(every=-3), "every must be 1 or more"),
        (lambda: HareTortoise(every=0), "HareTortoise: every"),
        (lambda: ElasticReset(every=5, decay=1.5), r"decay must be in \[0, 1\], got 1.5"),
        (lambda: ElasticReset(every=5, decay=-0.1), "decay"),
        (lambda: EMAOnly(decay=float("nan")), "decay"),
        (lambda: ElasticReset(every=5, update_on="optimiser_step"), "update_on must be optimizer_step or batch"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ElasticReset(every=5, parameters=["encoder.*"]), r"no trainable parameters.*encoder"),
        (lambda: ElasticReset(every=5, parameters=["frozen.*"]), "no trainable parameters"),
        (lambda: ReferenceReset(every=5), "moves the reference policy"),
        (lambda: EMAAnchor(), "moves the reference policy"),
    ],
)
def test_wrong_module(lab, tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        lab.fit(lab.plain(), tmp_path, [make()])


def test_a_reference_that_cannot_move_is_refused(lab, tmp_path):
    with pytest.raises(UserError, match="frozen_copy"):
        lab.fit(lab.ppo(lora=True), tmp_path, [ReferenceReset(every=2)])


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_without_named_parameters_are_refused(lab, name):
    class FakeTrainer:
        strategy = type(name, (), {})()

    with pytest.raises(UserError, match=f"{name}, which keeps parameters in flat ones"):
        ElasticReset(every=2).setup(FakeTrainer(), lab.plain(), "fit")
    ElasticReset(every=2).setup(FakeTrainer(), lab.plain(), "validate")


def test_a_callback_outlives_its_trainer(lab, tmp_path):
    """No hook stays on an optimizer once the fit is over."""
    callback = WeightSets(decay=DECAY, every=None)
    module = lab.plain()
    trainer = lab.fit(module, tmp_path, [callback])
    updates = callback.updates
    trainer.optimizers[0].step()
    assert callback.updates == updates == 6
