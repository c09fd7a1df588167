"""Weight callbacks over a run's life: validation with the average, checkpoints, hooks and telemetry."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from lightning import Callback
from plain_loop import DECAY, assert_same, loop

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import EMAAnchor, EMAOnly, HareTortoise, ReferenceReset, ResetToInitial
from elastic_lightning.errors import UserError
from elastic_lightning.policies import load_policy

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


@pytest.mark.parametrize("update_on", ["optimizer_step", "batch"])
def test_the_average_leaves_a_skipped_step_out(lab, tmp_path, update_on):
    module, batches = lab.plain(), lab.batches(4)

    def skip(optimizer):  # as supervised modules do where a gradient is not finite
        module.batch_skipped = module.trainer.global_step == 1
        if module.batch_skipped:
            optimizer.zero_grad()

    module.on_before_optimizer_step = skip
    callback = EMAOnly(decay=DECAY, update_on=update_on, save=False)
    lab.trainer(tmp_path, [callback]).fit(module, lab.loader(batches))
    online, ema, _ = loop(lab.plain(), [batches[0], *batches[2:]], None)
    assert callback.updates == 3
    assert_same(module.net.parameters(), online)
    assert_same(callback.ema.values(), ema)


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


def test_a_saved_average_takes_the_place_of_an_older_one_when_it_is_whole(lab, tmp_path, logger):
    module, callback = lab.ppo(), EMAOnly(decay=DECAY)
    trainer = lab.fit(module, tmp_path, [callback], logger=logger)
    before = contents(tmp_path / "run" / "ema")

    def dies(folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    module.save_pretrained = dies
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(trainer, module)
    assert contents(tmp_path / "run" / "ema") == before


def test_what_stands_in_the_place_of_a_saved_average_is_found_before_training(lab, tmp_path, logger):
    module, before = lab.ppo(), lab.ppo()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ema").write_text("mine")
    with pytest.raises(UserError, match="ema is a file, and a folder is to be written there"):
        lab.fit(module, tmp_path, [EMAOnly(decay=DECAY)], logger=logger)
    assert_same(module.parameters(), [parameter.detach() for parameter in before.parameters()])


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("times", [1, 2])
def test_sums_are_those_of_the_files_that_were_saved_last(lab, tmp_path, times):
    module = lab.ppo()
    for _ in range(times):
        with torch.no_grad():
            for parameter in module.actor.parameters():
                parameter += 0.1
        module.save_pretrained(tmp_path)
    sums = sorted(line.split() for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert sums == sorted([hashlib.sha256(f.read_bytes()).hexdigest(), f.name] for f in tmp_path.glob("*.safetensors"))
    load_policy(str(tmp_path))


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
