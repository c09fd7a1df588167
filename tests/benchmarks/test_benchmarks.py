"""The benchmarks measure what they say: same work on both sides, the plain path equal to ours, a limit by hand."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from learning import agrees, compare
from lockstep import Worker
from measure import runnable
from paths import PlainLM, PlainPPO
from rollout import bytes_a_token
from shapes import Shape, doubled, prepare, prompts

from elastic_lightning.evaluation.stages import read_pipeline
from elastic_lightning.policies import CausalLM, Prompts, Responses, load_policy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = Shape(layers=2, width=16, heads=2, vocabulary=64, batch=8, prompt=4, response=6, epochs=2, mini_batches=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("shapes.CACHE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_our_worker_runs_a_batch_a_turn(cache):
    options = {"shape": TINY.__dict__, "batches": 2, "reset_every": 2}
    worker = Worker("ours", sys.executable, "worker_ours.py", options)
    first, second = worker.batch(), worker.batch()
    worker.stop()
    assert first["optimizer_steps"] == second["optimizer_steps"] == 4
    assert 0 < second["reset_seconds"] < second["seconds"]
    assert second["peak_mib"] > second["idle_mib"] > 0
    assert sum(second["parts"].values()) < second["seconds"]


def test_a_worker_that_stops_says_where_its_log_is(tmp_path):
    with pytest.raises(SystemExit, match="gone stopped; its log"):
        Worker("gone", sys.executable, "no_such_file.py", {})


def alive(pid):
    """Whether a process runs; one that has ended may wait for somebody to ask how."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent is gone")
def test_a_worker_ends_with_its_driver_in_the_midst_of_a_batch(tmp_path):
    """The worker reports that it is ready, and then computes for an hour."""
    worker = tmp_path / "worker.py"
    worker.write_text("import os, time\nos.write(int(os.environ['LOCKSTEP_CHANNEL']), b'{}\\n')\ntime.sleep(3600)\n")
    drive = f"from lockstep import Worker; w = Worker('w', {sys.executable!r}, {str(worker)!r}, {{}})"
    command = [sys.executable, "-c", f"{drive}; print(w.process.pid, flush=True); w.batch()"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS)
    pid = int(driver.stdout.readline())
    assert alive(pid)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


@pytest.mark.parametrize("missing, left", [("avx512_bf16", ["fp32"]), ("", ["fp32", "bf16"])])
def test_cases_in_bfloat16_are_left_out_where_it_is_emulated(monkeypatch, capsys, missing, left):
    monkeypatch.setattr("elastic_lightning.algorithms.precision.missing_for_bfloat16", lambda: missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runnable(["fp32", "bf16"], lambda name: "bf16" in name) == left
    told = capsys.readouterr().out
    assert ("no instructions for bfloat16 (avx512_bf16): bf16" in told) == bool(missing)


def test_the_plain_path_has_our_loss_and_gradients(gpt2_folder):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 30, (3, 9), generator=generator)
    prompt = Prompts(tokens[:, :4], torch.ones(3, 4, dtype=torch.bool))
    mask = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    responses = Responses(tokens[:, 4:], mask)
    weights = torch.randn(int(mask.sum()), generator=generator)

    def loss(logprobs, entropy, part):
        return (weights[part] * (logprobs.exp() + 0.1 * entropy)).sum()

    found = []
    for kind in (CausalLM, PlainLM):
        lm = kind(load_policy(gpt2_folder).model)
        total, statistics = lm.token_loss(lm.response_hidden(prompt, responses), responses, loss, 0.7)
        total.backward()
        found.append([total, *statistics, *(p.grad for p in lm.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


def test_the_learning_pipeline_reads(monkeypatch):
    pipeline = read_pipeline(BENCHMARKS / "learning.yaml")
    runs = [run for run in pipeline.runs.values() if len(run.needs) == 2]
    assert len(runs) == 42 and {run.seed for run in runs} == {1, 2, 3, 4, 5, 6}
    assert all("--model.init_args.ppo.kl_penalty" not in " ".join(run.arguments) for run in runs)
    plain = next(run for run in runs if run.stage == "plain")
    assert "--model.class_path=paths.PlainPPO" in plain.arguments and hasattr(PlainPPO, "training_step")


def test_agreement_is_an_interval_of_paired_differences_that_holds_0():
    def method(*ends):
        return {seed: {"reward": [0.0, end]} for seed, end in enumerate(ends)}

    curves = {"base": method(1.0, 1.2, 1.1), "near": method(1.1, 1.2, 1.3), "far": method(1.3, 1.5, 1.42)}
    near, far = (compare(curves, name, "base", "reward") for name in ("near", "far"))
    assert near["end"] == pytest.approx(1.2) and near["end_baseline"] == pytest.approx(1.1)
    assert near["end_spread"] == pytest.approx(0.2) and near["mean_spread"] == pytest.approx(0.1)
    # differences 0.1, 0, 0.2: mean 0.1, deviation 0.1
    assert near["end_difference"] == pytest.approx(0.1)
    assert near["end_interval"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert agrees(near) and not agrees(far)


def test_the_bandwidth_limit_counts_weights_and_half_the_responses_cache(cache):
    model = load_policy(str(prepare(TINY) / "policy")).model
    used = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name and "ln_f" not in name)
    cache_values = 8 * (4 + 3) * 2 * 16 * 2  # rows, columns, layers, width, keys and values
    assert bytes_a_token(TINY, 4) == pytest.approx(4 * (used + cache_values))


def test_shapes(cache):
    assert prompts(TINY, 3).shape == (24, 4) and int(prompts(TINY, 3).min()) >= 2
    wide = doubled(TINY, "width", 2)
    assert (wide.width, wide.heads, wide.batch) == (64, 8, 8)
    assert load_policy(str(prepare(TINY) / "policy")).model.config.vocab_size == 64
