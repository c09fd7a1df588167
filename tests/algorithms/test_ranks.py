"""Two processes against one: the same global batch gives the same run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch

from elastic_lightning.data import ToyTranslationDataModule
from elastic_lightning.policies import load_policy

TESTS = Path(__file__).parents[1]
SIZE = {"model_type": "marian", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
SIZE |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
SIZE |= {"max_position_embeddings": 48, "dropout": 0.0}


@pytest.fixture(scope="session")
def models(toy, tmp_path_factory):
    """Folders of a policy, a sender and a receiver."""
    folders = {"policy": toy.folder}
    words = str(tmp_path_factory.mktemp("words"))
    ToyTranslationDataModule().train_tokenizer(0).save_pretrained(words)
    for seed, name in enumerate(("sender", "receiver")):
        torch.manual_seed(seed)
        loaded = load_policy(architecture=SIZE, tokenizer=words)
        folders[name] = str(tmp_path_factory.mktemp(name))
        loaded.model.save_pretrained(folders[name])
        loaded.tokenizer.save_pretrained(folders[name])
    return folders


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
def results(models, tmp_path_factory):
    """What one process and each of two made of every case: name -> (one, [first, second])."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(models, folder / "models.pt")
    processes = launch(folder)
    one = {}
    for strategy, (_, cases) in rank_cases.STRATEGIES.items():
        for name, case in cases.items():
            if name not in one:
                one[name] = case(rank_cases.Setup(models, folder / "one" / strategy / name, 1, dict))
    for process in processes:
        output, _ = process.communicate(timeout=300)
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


def difference(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


NAMES = [f"{strategy}:{name}" for strategy, (_, cases) in rank_cases.STRATEGIES.items() for name in cases]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(results, name):
    one, two = results[name]
    for rank in two:
        worst = differences(one, rank)
        print(name, worst)
        assert max(worst.values()) <= 1e-6, worst


@pytest.mark.slow
def test_the_cases_are_what_they_say(results):
    one = results["ddp:early_stop"][0]["metrics"]
    assert one["train/stopped_early"] == 1 and 0 < one["train/optimizer_steps"] < 8
    assert results["ddp:plain"][0]["coefficient"] != 0.05  # adapted
    assert all(gradient.abs().max() > 0 for gradient in results["ddp:plain"][0]["gradients"].values())
    lengths = {row.tolist().index(29) if 29 in row else len(row) for row in results["ddp:plain"][0]["samples"][0]}
    assert len(lengths) > 2
