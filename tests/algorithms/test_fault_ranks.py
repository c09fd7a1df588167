"""A fault on one rank is one on all of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_bad_reward_on_one_rank_is_skipped_by_both(toy, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "algorithms" / "fault_on_one_rank.py"), toy.folder, str(tmp_path)]
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
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for rank in (first, second):
        assert rank["skipped"] == {"reward": 1} and rank["ppo_step"] == 3
        assert rank["updates"] == 2 * 4  # of the two batches that were not skipped
        assert len(rank["told"]) == 1 and "PPO batch 2 is skipped" in rank["told"][0]
    assert "on another rank" in first["told"][0] and "returned nan for 1 of 4" in second["told"][0]
    for kind in ("weights", "average"):
        for name, weight in first[kind].items():
            assert torch.equal(weight, second[kind][name]), name
