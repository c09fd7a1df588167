"""Elastic Reset and its relatives against a plain loop that knows no Lightning."""

import itertools

import pytest
import torch
from lightning import Callback

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAAnchor, EMAOnly, HareTortoise, ReferenceReset, ResetToInitial, WeightSets
from elastic_lightning.errors import UserError

DECAY = 0.9


def loop(module, batches, every, update_on="optimizer_step", reset="elastic", steps=1, accumulate=1, decay=DECAY):
    """The whole of training, written out. Returns (online, ema, initial) after the last batch."""
    parameters = [*module.net.parameters()]
    optimizer = module.optimizer(parameters, lr=0.1)
    initial = [p.detach().clone() for p in parameters]
    ema = [p.detach().clone() for p in parameters]

    def move():
        for average, parameter in zip(ema, parameters, strict=True):
            average.copy_(decay * average + (1 - decay) * parameter.detach())

    for number, batch in enumerate(batches, start=1):
        for _ in range(steps):
            (module.loss(batch) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if update_on == "optimizer_step":
                    move()
        if update_on == "batch":
            move()
        if every and number % every == 0:
            for parameter, average, first in zip(parameters, ema, initial, strict=True):
                parameter.data.copy_(first if reset == "initial" else average)
                if reset == "elastic":
                    average.copy_(first)
    return [p.detach().clone() for p in parameters], ema, initial


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=0)


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


# Validation with the average -------------------------------------------------------------------------------------


class Look(Callback):
    """Weights during and after validation."""

    def __init__(self):
        self.during, self.after = [], []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.during.append(pl_module.net.weight.detach().clone())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.after.append(pl_module.net.weight.detach().clone())


@pytest.mark.parametrize("validate", [True, False])
def test_validation_sees_the_average(lab, tmp_path, validate):
    module, look, batches = lab.plain(), Look(), lab.batches(4)
    callback = EMAOnly(decay=DECAY, validate=validate, save=False)
    trainer = lab.trainer(tmp_path, [callback, look], val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(module, lab.loader(batches), lab.loader(batches[:1]))
    plain = lab.plain()
    for index, count in enumerate((0, 2, 4)):  # the sanity check, and twice after two batches
        online, ema, _ = loop(lab.plain(), batches[:count], None)
        assert_same([look.during[index]], [ema[0] if validate else online[0]])
    assert_same(module.net.parameters(), loop(plain, batches, None)[0])
    assert_same([look.after[2]], [loop(lab.plain(), batches[:2], None)[0][0]])


def test_weights_come_back_after_a_failed_validation(lab, tmp_path):
    module, batches = lab.plain(), lab.batches(4)

    def fails(batch, batch_idx):
        raise RuntimeError("validation went wrong")

    module.validation_step = fails
    callback = EMAOnly(decay=DECAY, validate=True, save=False)
    trainer = lab.trainer(tmp_path, [callback])
    with pytest.raises(RuntimeError, match="went wrong"):
        trainer.fit(module, lab.loader(batches), lab.loader(batches[:1]))
    assert_same(module.net.parameters(), loop(lab.plain(), batches, None)[0])
    assert not any(parameter.is_inference() for parameter in module.parameters())


def test_average_weights_come_back_after_an_exception(lab, tmp_path):
    module, callback = lab.plain(), EMAOnly(decay=DECAY, save=False)
    lab.fit(module, tmp_path, [callback])
    before = [p.detach().clone() for p in module.net.parameters()]
    with pytest.raises(KeyError), callback.average_weights():
        assert_same(module.net.parameters(), callback.ema.values())
        raise KeyError
    assert_same(module.net.parameters(), before)


def test_the_average_is_saved(lab, tmp_path, logger):
    from transformers import AutoModelForCausalLM

    module, callback = lab.ppo(), EMAOnly(decay=DECAY)
    lab.fit(module, tmp_path, [callback], logger=logger)
    before = {name: p.detach().clone() for name, p in module.shadowed_parameters().items()}
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "ema").named_parameters())
    for name, value in callback.ema.items():
        torch.testing.assert_close(saved[name.removeprefix("model.")], value, atol=0, rtol=0)
        assert name.endswith("wpe.weight") or not torch.equal(value, before[name])


# State -----------------------------------------------------------------------------------------------------------

KINDS = {
    "elastic": lambda: ElasticReset(every=4, decay=DECAY),
    "batch": lambda: ElasticReset(every=3, decay=DECAY, update_on="batch"),
    "hare": lambda: HareTortoise(every=4, decay=DECAY),
    "initial": lambda: ResetToInitial(every=4),
    "only": lambda: EMAOnly(decay=DECAY, save=False),
}


def halves(lab, root, build, make, batches, **options):
    """An unbroken run of two epochs; and one that stops after the first and goes on from its checkpoint."""
    whole, one = build(), make()
    lab.fit(whole, root, one, batches, max_epochs=2, **options)
    half = build()
    lab.fit(half, root, make(), batches, max_epochs=1, **options).save_checkpoint(root / "half.ckpt")
    resumed, two = build(), make()
    trainer = lab.trainer(root, two, max_epochs=2, **options)
    trainer.fit(resumed, lab.loader(batches), ckpt_path=root / "half.ckpt", weights_only=True)
    return whole, one, resumed, two


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", ["plain", "manual"])
def test_a_resumed_run_is_the_run(lab, tmp_path, kind, build):
    whole, (one,), resumed, (two,) = halves(lab, tmp_path, getattr(lab, build), lambda: [KINDS[kind]()], lab.batches(6))
    assert two.batches == one.batches == 12
    assert (two.updates, two.resets, two.next_reset) == (one.updates, one.resets, one.next_reset)
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(resumed.named_parameters())[name], parameter)
    for weights in ("ema", "initial"):
        ours, theirs = getattr(two, weights), getattr(one, weights)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("lora", "make"),
    [
        pytest.param(False, lambda: [ElasticReset(every=3, decay=DECAY)], id="elastic"),
        pytest.param(True, lambda: [ElasticReset(every=3, decay=DECAY)], id="lora"),
        pytest.param(False, lambda: [ReferenceReset(every=3)], id="reference"),
        pytest.param(False, lambda: [EMAAnchor(decay=DECAY)], id="anchor"),
        pytest.param(False, lambda: [ReferenceReset(every=2), ElasticReset(every=3, decay=DECAY)], id="both"),
    ],
)
def test_a_resumed_ppo_is_the_run(lab, tmp_path, lora, make):
    whole, ones, resumed, twos = halves(lab, tmp_path, lambda: lab.ppo(lora=lora), make, lab.prompts(2))
    ours, theirs = dict(resumed.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())  # the reference too
    for one, two in zip(ones, twos, strict=True):
        assert (two.batches, two.updates, two.resets) == (one.batches, one.updates, one.resets)
        assert all(torch.equal(two.initial[name], value) for name, value in one.initial.items())


def test_a_loop_across_the_checkpoint(lab, tmp_path):
    """Against the plain loop too: an unbroken run and a resumed one could be wrong alike."""
    batches = lab.batches(3)
    _, _, resumed, (two,) = halves(lab, tmp_path, lab.plain, lambda: [ElasticReset(every=4, decay=DECAY)], batches)
    online, ema, initial = loop(lab.plain(), batches * 2, 4)
    assert_same(resumed.net.parameters(), online)
    assert_same(two.ema.values(), ema)
    assert_same(two.initial.values(), initial)


def test_what_a_checkpoint_holds(lab, tmp_path):
    trainer = lab.fit(lab.plain(), tmp_path, [ElasticReset(every=4)])
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    (state,) = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"].values()
    assert (state["batches"], state["updates"], state["resets"]) == (6, 6, 1)
    assert set(state["ema"]) == set(state["initial"]) == {"net.weight", "net.bias"}


def test_state_of_another_model_is_refused(lab, tmp_path):
    callback = ElasticReset(every=4)
    ema = {"other": torch.zeros(1)}
    callback.load_state_dict({"batches": 1, "updates": 1, "resets": 0, "ema": ema})
    with pytest.raises(UserError, match="ema weights are of another model"):
        lab.fit(lab.plain(), tmp_path, [callback])


# Hooks and telemetry ---------------------------------------------------------------------------------------------


def test_hooks_are_called_in_order(lab, tmp_path):
    calls = []

    def log(name):
        return lambda *_: calls.append((name, module.net.weight.detach().clone()))

    class Own(ElasticReset):
        def before_reset(self, trainer, pl_module):
            log("own before")()

        def after_reset(self, trainer, pl_module):
            log("own after")()

    class Other(Callback):
        def on_before_reset(self, trainer, pl_module):
            log("other before")()

        def on_after_reset(self, trainer, pl_module):
            log("other after")()

    module = lab.plain()
    module.on_before_reset, module.on_after_reset = log("module before"), log("module after")
    lab.fit(module, tmp_path, [Other(), Own(every=4)])
    names = ["own before", "other before", "module before", "own after", "other after", "module after"]
    assert [name for name, _ in calls] == names
    weights = [weight for _, weight in calls]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(weights[:3]))
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(weights[3:]))
    assert not torch.equal(weights[2], weights[3])


def test_telemetry(lab, tmp_path, logger, read_events):
    module, callback = lab.ppo(), ElasticReset(every=2, decay=0.5)
    distances = []

    class Watch(Callback):
        def measure(self, pl_module):
            online = pl_module.shadowed_parameters()
            distances.append(
                sum((p - callback.initial[name]).square().sum().item() for name, p in online.items()) ** 0.5
            )

        def on_before_reset(self, trainer, pl_module):
            self.measure(pl_module)

        def on_after_reset(self, trainer, pl_module):
            self.measure(pl_module)

    lab.fit(module, tmp_path, [callback, Watch()], lab.prompts(5), logger=logger)
    curves = read_events(logger.log_dir)
    assert curves["reset/count"] == [(2, 1.0), (4, 2.0)]
    for tag, expected in (("reset/distance_before", distances[0::2]), ("reset/distance_after", distances[1::2])):
        assert [step for step, _ in curves[tag]] == [2, 4]
        assert [value for _, value in curves[tag]] == pytest.approx(expected, rel=1e-4)
    assert all(after < before for before, after in zip(distances[0::2], distances[1::2], strict=True))
    for name in ("reward", "kl"):
        train = dict(curves[f"train/{name}"])
        assert curves[f"reset/{name}_before"] == [(step, train[step]) for step in (2, 4)]
        assert curves[f"reset/{name}_after"] == [(step, train[step]) for step in (3, 5)]


def test_telemetry_of_a_module_without_a_clock_counts_batches(lab, tmp_path, logger, read_events):
    lab.fit(lab.manual(), tmp_path, [ElasticReset(every=2)], logger=logger)
    curves = read_events(logger.log_dir)
    assert curves["reset/count"] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert "reset/reward_before" not in curves and "reset/reward_after" not in curves


def test_the_first_batch_after_a_resume_reports_the_reset(lab, tmp_path, logger, read_events):
    halves(lab, tmp_path, lab.ppo, lambda: [ElasticReset(every=2)], lab.prompts(2))
    resumed, module = ElasticReset(every=2), lab.ppo()
    trainer = lab.trainer(tmp_path, [resumed], max_epochs=2, logger=logger)
    trainer.fit(module, lab.loader(lab.prompts(2)), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert [step for step, _ in read_events(logger.log_dir)["reset/reward_after"]] == [3]


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


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_refused(lab, name):
    class FakeTrainer:
        strategy = type(name, (), {})()

    with pytest.raises(UserError, match=f"{name}, which shards"):
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
