"""A fault on one rank is one on all of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch

TESTS = Path(__file__).parents[1]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks made of the runs of `fault_on_one_rank`."""
    folder = tmp_path_factory.mktemp("faults")
    rank_cases.save_models(folder / "models")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [
        sys.executable,
        str(TESTS / "algorithms" / "fault_on_one_rank.py"),
        str(folder / "models" / "policy"),
        str(folder),
    ]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_a_bad_reward_on_one_rank_is_skipped_by_both(ranks):
    first, second = (rank["skipped"] for rank in ranks)
    for rank in (first, second):
        assert rank["skipped"] == {"reward": 1} and rank["ppo_step"] == 3
        assert rank["updates"] == 2 * 4  # of the two batches that were not skipped
        assert len(rank["told"]) == 1 and "PPO batch 2 is skipped" in rank["told"][0]
    assert "on another rank" in first["told"][0] and "returned nan for 1 of 4" in second["told"][0]
    for kind in ("weights", "average"):
        for name, weight in first[kind].items():
            assert torch.equal(weight, second[kind][name]), name


@pytest.mark.parametrize(
    ("case", "rank", "reason"),
    [
        ("reward raises", 1, "the reward Lengths raised ConnectionError: no answer"),
        ("reward raises in validation", 1, "the reward Lengths raised ConnectionError: no answer"),
        ("a sharded part beside one that raises", 1, "lengths: the reward Lengths raised ConnectionError: no answer"),
        ("samples", 0, "Is a directory"),
        ("empty prompt", 1, "a prompt of no tokens"),
        ("checkpoint", 0, "batch_000001.ckpt: Is a directory; there is none before it"),
        ("export", 0, "Not a directory"),
    ],
)
def test_what_stops_one_rank_stops_both(ranks, case, rank, reason):
    own, other = ranks[rank][case], ranks[1 - rank][case]
    assert reason in own[1]
    assert other == ("UserError", "another process cannot go on, and says why")


def test_responses_are_masked_by_themselves_whichever_rank_they_are_on(ranks):
    for rank in ranks:
        assert rank["all of one rank are masked"] == {"ppo_step": 3, "skipped": {}, "masked": 4}
        assert rank["all of one rank are masked, in parts"] == {"ppo_step": 3, "skipped": {}, "masked": 4}


def test_a_part_is_asked_again_where_another_one_is_sharded(ranks):
    for rank in ranks:
        found = rank["a sharded part beside one that is asked again"]
        assert found == {"ppo_step": 3, "skipped": {}, "masked": 0}
