"""What makes a run faster or smaller leaves its result as it was, or says what it costs."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from elastic_lightning.algorithms import PPO, Execution
from elastic_lightning.algorithms.ppo.update import micro_batches
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource

EPS = 1e-4  # of Adam: a gradient that is only rounding must not become a step of full size


def run(toy, root, batches=2, execution=None, replay=True, rows=7, **options):
    """A short run; the module and its metrics. Without `replay` the frozen layers are run in every forward pass."""
    options = {"adam_eps": EPS, "micro_batch_size": 3} | options
    module = toy.ppo(execution=execution or Execution(), **options)
    if not replay:
        module.frozen_hidden = lambda prompts, responses: None
    toy.perturb(module)
    trainer = toy.fit(module, root, [toy.prompts(rows=rows, seed=seed) for seed in range(batches)])
    return module, {name: value.item() for name, value in trainer.callback_metrics.items()}


def parts_of(batch):
    """The micro-batches that the update would make of a batch in the order of its rows."""
    lengths = batch.lengths()
    halves = torch.arange(len(batch.prompts.tokens)).tensor_split(2)
    ordered = [half[sum(lengths)[half].argsort(stable=True)] for half in halves]
    return [part for half in ordered for part in micro_batches(batch, half, lengths, 3)]


def same(one, other, atol=3e-6):
    ours = dict(other.actor.named_parameters())
    for name, parameter in one.actor.named_parameters():
        torch.testing.assert_close(ours[name], parameter, atol=atol, rtol=0)


def test_scoring_a_few_rows_at_a_time_changes_nothing(toy, tmp_path):
    execution = Execution(scoring_batch_size=2, recompute_logprobs="always")
    plain, metrics = run(toy, tmp_path)
    cut, cut_metrics = run(toy, tmp_path, execution=execution)
    same(plain, cut)
    assert cut_metrics["train/kl"] == pytest.approx(metrics["train/kl"], abs=1e-5)


def test_gradient_checkpointing_changes_nothing(toy, tmp_path):
    same(run(toy, tmp_path)[0], run(toy, tmp_path, execution=Execution(gradient_checkpointing=True))[0])


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiling_changes_nothing_and_happens_once(toy, tmp_path):
    shapes = {"batches": 3, "rows": 10, "micro_batch_size": 3}  # micro-batches of three rows and of two
    plain, _ = run(toy, tmp_path, **shapes)
    torch._dynamo.reset()
    counters.clear()
    compiled, _ = run(toy, tmp_path, execution=Execution(compile=True), **shapes)
    lengths = {tuple(part.rollout.tokens.shape) for batch in compiled.seen for part in parts_of(batch)}
    assert len({rows for rows, _ in lengths}) > 1 < len({length for _, length in lengths})
    same(plain, compiled, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "one graph for all lengths"


def test_a_rollout_in_bfloat16_shows_what_it_costs(toy, tmp_path):
    never = Execution(rollout_dtype="bfloat16", recompute_logprobs="never")
    _, plain = run(toy, tmp_path, batches=1)
    module, costly = run(toy, tmp_path, batches=1, execution=never)
    assert plain["train/first_ratio_deviation"] < 1e-5 < 1e-3 < costly["train/first_ratio_deviation"] < 0.3
    assert {p.dtype for p in module.rollout_copy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.actor.parameters()} == {torch.float32}


def test_its_log_probabilities_are_recomputed_by_default(toy, tmp_path):
    module, metrics = run(toy, tmp_path, batches=1, execution=Execution(rollout_dtype="bfloat16"))
    assert metrics["train/first_ratio_deviation"] < 1e-5
    assert 1e-3 < metrics["train/rollout_ratio_deviation"] < 0.3
    assert "train/rollout_ratio_deviation" not in run(toy, tmp_path)[1]
    (batch,) = module.seen
    assert not batch.rollout.logprobs[~batch.rollout.mask].any() and not batch.rollout.values[~batch.rollout.mask].any()


@pytest.mark.parametrize("lora", [False, True])
def test_the_copy_is_refreshed_before_each_rollout(toy, tmp_path, lora):
    module = toy.ppo(lora=lora, execution=Execution(rollout_dtype="bfloat16"), learning_rate=0.1)
    start = {name: parameter.clone() for name, parameter in module.rollout_copy.lm.named_parameters()}
    refreshed = []
    refresh = module.rollout_copy.refresh

    def watched(lm):
        refresh(lm)
        own = dict(module.rollout_copy.lm.named_parameters())
        trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
        refreshed.append(all(torch.equal(own[name], parameter.bfloat16()) for name, parameter in trained.items()))

    module.rollout_copy.refresh = watched
    toy.fit(module, tmp_path, [toy.prompts(seed=seed) for seed in range(3)])
    assert refreshed == [True] * 3
    moved = {n for n, parameter in module.rollout_copy.lm.named_parameters() if not torch.equal(parameter, start[n])}
    trained = {name for name, parameter in module.actor.lm.named_parameters() if parameter.requires_grad}
    assert moved and moved <= trained
    assert not any(parameter.requires_grad for parameter in module.rollout_copy.parameters())


def test_the_copy_stays_out_of_checkpoints(toy, tmp_path):
    module = toy.ppo(execution=Execution(rollout_dtype="bfloat16"))
    trainer = toy.fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    names = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    assert names and not any("rollout_copy" in name for name in names)


def test_frozen_layers_stay_and_the_others_move_as_without_the_shared_trunk(toy, tmp_path):
    module, metrics = run(toy, tmp_path, execution=Execution(trainable_layers=1), entropy_coefficient=0.1)
    plain, plain_metrics = run(
        toy, tmp_path, execution=Execution(trainable_layers=1), entropy_coefficient=0.1, replay=False
    )
    same(module, plain)
    assert metrics["train/first_ratio_deviation"] < 1e-5
    assert metrics["train/kl"] == pytest.approx(plain_metrics["train/kl"], abs=1e-5)
    start = dict(toy.plain_model().named_parameters())
    for name, parameter in module.actor.lm.model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    assert set(module.shadowed_parameters()) == set(module.reference_weights())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True, "gradient_checkpointing": True}, "exclude each other"),
        ({"compile": True, "trainable_layers": 1}, "exclude each other"),
        ({"rollout_dtype": "int8"}, "rollout_dtype must be one of"),
        ({"recompute_logprobs": "sometimes"}, "recompute_logprobs must be one of"),
        ({"trainable_layers": 0}, "trainable_layers must be 1 or more"),
        ({"scoring_batch_size": 0}, "scoring_batch_size must be 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Execution(**options)


def test_lora_and_trainable_layers_exclude_each_other(toy):
    with pytest.raises(UserError, match=r"trainable_layers and policy\.lora"):
        PPO(ModelSource(toy.folder, lora=LoRA(rank=2)), toy.reward_class(), execution=Execution(trainable_layers=1))


def test_an_unmerged_adapter_and_trainable_layers_exclude_each_other(toy, tmp_path):
    PPO(toy.source(lora=True), toy.reward_class()).save_pretrained(tmp_path / "adapter", adapter="adapter")
    with pytest.raises(UserError, match="unmerged adapter exclude each other"):
        PPO(ModelSource(str(tmp_path / "adapter")), toy.reward_class(), execution=Execution(trainable_layers=1))


@pytest.mark.parametrize(
    ("precision", "device"),
    [
        ("bf16-true", "cpu"),
        pytest.param("bf16-true", "cuda", marks=pytest.mark.cuda),
        pytest.param("16-true", "cuda", marks=pytest.mark.cuda),
    ],
)
def test_half_precision_throughout(toy, tmp_path, precision, device):
    metrics = toy.fit(toy.ppo(), tmp_path, precision=precision, accelerator=device, devices=1).callback_metrics
    assert metrics["train/first_ratio_deviation"] < 0.3 and metrics["train/grad_norm"] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("execution", [{}, {"rollout_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_with_graphs_samples_what_it_learns_from(toy, tmp_path, precision, execution, device="cuda"):
    """Validations, in inference mode, stand before and between the training batches."""
    found = []
    for graphs in (True, False):
        module = toy.ppo(execution=Execution(cuda_graphs=graphs, **execution), adam_eps=EPS)
        toy.perturb(module)
        options = {"accelerator": device, "devices": 1, "precision": precision, "num_sanity_val_steps": -1}
        trainer = toy.trainer(tmp_path, val_check_interval=1, **options)
        batches = [toy.prompts(rows=6, seed=seed) for seed in range(3)]
        trainer.fit(module, toy.loader(batches), toy.loader([toy.prompts(rows=6, seed=9)]))
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        exact = precision == "32-true" or execution  # whose log-probabilities are recomputed
        assert metrics["train/first_ratio_deviation"] < (1e-3 if exact else 0.2)
        found.append((module.cpu(), metrics))
    if precision == "32-true" and not execution:  # else rounding tips a draw
        (one, metrics), (other, others) = found
        same(one, other, atol=1e-4)
        assert metrics["val/reward"] == pytest.approx(others["val/reward"], abs=1e-4)


@pytest.mark.parametrize(("model", "captured"), [({"model_type": "gpt2"}, True), ({"model_type": "falcon"}, False)])
def test_where_graphs_would_change_the_numbers_there_are_none(toy, model, captured):
    """What decides is asked on a CPU here; nothing is captured before something is sampled."""
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = ModelSource(architecture={**model, **size, "alibi": True}, tokenizer=toy.folder)
    module = PPO(source, toy.reward_class())
    lm, cuda = module.actor.lm, torch.device("cuda")
    assert module.sample.captured(lm, 9, torch.device("cpu")) is None
    assert [module.sample.captured(lm, 9, cuda) is not None for _ in range(2)] == [captured, captured]
    without = PPO(source, toy.reward_class(), execution=Execution(cuda_graphs=False))
    assert without.sample.captured(lm, 9, cuda) is None


@pytest.mark.parametrize(
    ("rollout", "update", "recomputes"),
    [
        (None, "float32", False),
        ("bfloat16", "float32", True),
        ("bfloat16", "bfloat16", False),
        ("float16", "float32", True),
    ],
)
def test_auto_recomputes_after_a_rollout_in_lower_precision(rollout, update, recomputes):
    execution = Execution(rollout_dtype=rollout)
    assert execution.recomputes(getattr(torch, update)) is recomputes
    assert Execution(rollout_dtype=rollout, recompute_logprobs="always").recomputes(torch.float32)
    assert not Execution(rollout_dtype=rollout, recompute_logprobs="never").recomputes(torch.float32)


def test_auto_recomputes_under_autocast_too(toy, tmp_path):
    """A copy in bfloat16 rounds norms and the residual stream, which autocast keeps in float32."""
    module = toy.ppo(execution=Execution(rollout_dtype="bfloat16"))
    metrics = toy.fit(module, tmp_path, precision="bf16-mixed").callback_metrics
    assert metrics["train/rollout_ratio_deviation"] > 1e-3 > metrics["train/first_ratio_deviation"]


def test_under_autocast_every_optimizer_step_is_seen(toy, tmp_path):
    module = toy.ppo(learning_rate=0.03, epochs=4, mini_batches=1)
    trainer = toy.fit(module, tmp_path, precision="bf16-mixed")
    assert trainer.callback_metrics["train/first_ratio_deviation"] < 0.2
    assert (
        trainer.callback_metrics["train/ratio_deviation"] > 2 * trainer.callback_metrics["train/first_ratio_deviation"]
    )
    assert trainer.callback_metrics["train/grad_norm"] > 0
