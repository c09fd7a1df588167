"""Two processes against one: the same global batch gives the same run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch
from algorithms.conftest import PAD

from elastic_lightning.errors import UserError

TESTS = Path(__file__).parents[1]


def launch(folder, ranks=2):
    """`rank_cases` as so many processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    command = [sys.executable, str(TESTS / "rank_cases.py"), str(folder)]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """What one process and each of two made of every case: name -> (one, [first, second])."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_cases.save_models(folder / "models")

    def one(name, **options):
        return rank_cases.Setup(folder / "models", folder / "one" / name, 1, dict, **options)

    for name in rank_cases.HALVES:
        rank_cases.first_half(name, one(f"half_{name}", save_to=folder / f"{name}.ckpt"))
    processes = launch(folder)
    expected = {name: case(one(name)) for name, case in rank_cases.CASES.items()}
    expected |= {f"resumed_{name}": rank_cases.both_halves(name, one(f"whole_{name}")) for name in rank_cases.HALVES}
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-5000:]
    two = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    compared = {name: (expected[name.split(":")[1]], [rank[name] for rank in two]) for name in two[0]}
    for strategy, names in rank_cases.RESUMED.items():
        for name in names:
            path = folder / f"{strategy}_{name}.ckpt"
            if name in rank_cases.SAME_RANKS:
                with pytest.raises(UserError, match="as many processes as it was saved with: 2, and not 1"):
                    rank_cases.both_halves(name, one(f"{strategy}_rest_{name}", resume_from=path))
                continue
            rest = rank_cases.both_halves(name, one(f"{strategy}_rest_{name}", resume_from=path))
            compared[f"{strategy}:resumed_{name}_on_one"] = (expected[f"resumed_{name}"], [rest])
    return compared


def differences(one, other):
    """The largest difference of each kind of result."""
    found = {}
    for kind, expected in one.items():
        got = other[kind]
        if isinstance(expected, torch.Tensor):
            expected, got = {kind: expected}, {kind: got}
        elif isinstance(expected, list):
            expected, got = dict(enumerate(expected)), dict(enumerate(got))
        if isinstance(expected, str):
            assert expected == got
        else:
            assert expected.keys() == got.keys() and len(expected) == len(got), kind
            found[kind] = max((difference(expected[name], got[name]) for name in expected), default=0.0)
    return found


def difference(expected, got):
    """Largest distance of two tensors, relative to the first where that is above 1."""
    assert expected.shape == got.shape
    return (expected.double() - got.double()).abs().max().item() / max(1.0, expected.double().abs().max().item())


def second_half(gradients):
    """Of gradients by ``step:name``, those of the later half of all steps, counted from 0."""
    by_step = [(*name.split(":", 1), gradient) for name, gradient in gradients.items()]
    half = (max(int(step) for step, *_ in by_step) + 1) // 2
    return {f"{int(step) - half}:{name}": gradient for step, name, gradient in by_step if int(step) >= half}


RESUMED = [(strategy, f"resumed_{name}") for strategy, names in rank_cases.RESUMED.items() for name in names]
NAMES = [f"{strategy}:{name}" for strategy, (_, cases) in rank_cases.STRATEGIES.items() for name in cases]
ON_ONE = [(strategy, name) for strategy, name in RESUMED if name.removeprefix("resumed_") not in rank_cases.SAME_RANKS]
NAMES += [*map(":".join, RESUMED), *(f"{strategy}:{name}_on_one" for strategy, name in ON_ONE)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(results, name):
    one, two = results[name]
    if "resumed" in name:  # the second half alone was seen, and its steps are counted anew
        half = len(one["samples"]) // 2
        one = {kind: value[half:] if isinstance(value, list) else value for kind, value in one.items()}
        one |= {"gradients": second_half(one["gradients"])}
        del one["texts"]
    for rank in two:
        worst = differences(one, rank)
        assert max(worst.values()) <= 1e-6, worst


@pytest.mark.slow
def test_a_layer_is_whole_while_it_runs_and_no_longer(results):
    assert [rank["whole_layers"] for rank in results["fsdp:plain"][1]] == [1, 1]
    assert [rank["whole_layers"] for rank in results["ddp:uneven"][1]] == [4, 4]


@pytest.mark.slow
def test_the_cases_are_what_they_say(results):
    one = results["ddp:early_stop"][0]["metrics"]
    assert one["train/stopped_early"] == 1 and 0 < one["train/optimizer_steps"] < 8
    uneven = results["ddp:uneven"][0]
    assert uneven["coefficient"] != 0.05  # adapted
    assert all(gradient.abs().max() > 0 for gradient in uneven["gradients"].values())
    assert len(uneven["texts"].splitlines()) == 2 * 4 and uneven["folder"] and uneven["distance"] > 0
    assert len({tuple(row.tolist()).index(PAD) if PAD in row else len(row) for row in uneven["samples"][0]}) > 2
