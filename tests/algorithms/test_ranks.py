"""Two processes against one: the same global batch gives the same run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch

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
    processes = launch(folder)
    one = {}
    for name in {name: None for _, cases in rank_cases.STRATEGIES.values() for name in cases}:
        one[name] = rank_cases.CASES[name](rank_cases.Setup(folder / "models", folder / "one" / name, 1, dict))
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-5000:]
    two = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    return {name: (one[name.split(":")[1]], [rank[name] for rank in two]) for name in two[0]}


def differences(one, other):
    """The largest difference of each kind of result."""
    found = {}
    for kind, expected in one.items():
        got = other[kind]
        if isinstance(expected, torch.Tensor):
            expected, got = {kind: expected}, {kind: got}
        elif isinstance(expected, list):
            expected, got = dict(enumerate(expected)), dict(enumerate(got))
        assert expected.keys() == got.keys(), kind
        found[kind] = max((difference(expected[name], got[name]) for name in expected), default=0.0)
    return found


def difference(expected, got):
    """Largest distance of two tensors, relative to the first where that is above 1."""
    assert expected.shape == got.shape
    return (expected.double() - got.double()).abs().max().item() / max(1.0, expected.double().abs().max().item())


NAMES = [f"{strategy}:{name}" for strategy, (_, cases) in rank_cases.STRATEGIES.items() for name in cases]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(results, name):
    one, two = results[name]
    for rank in two:
        worst = differences(one, rank)
        print(name, worst, {n: (one["metrics"][n], v) for n,v in rank["metrics"].items() if difference(one["metrics"][n], v)>1e-6})
        assert max(worst.values()) <= 1e-6, worst


@pytest.mark.slow
def test_the_cases_are_what_they_say(results):
    one = results["ddp:early_stop"][0]["metrics"]
    assert one["train/stopped_early"] == 1 and 0 < one["train/optimizer_steps"] < 8
    assert results["ddp:plain"][0]["coefficient"] != 0.05  # adapted
    assert all(gradient.abs().max() > 0 for gradient in results["ddp:plain"][0]["gradients"].values())
    lengths = {row.tolist().index(29) if 29 in row else len(row) for row in results["ddp:plain"][0]["samples"][0]}
    assert len(lengths) > 2
