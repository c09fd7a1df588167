"""What a run holds between its steps: freed pages, and cast weights."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from elastic_lightning.algorithms.memory import weights_cast_once

# Allocates and frees 100 MB a few times; prints the page faults of the last time.
FAULTS = """
import resource, sys, torch
from elastic_lightning.algorithms.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults, kept)
"""


def faults(keep: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-c", FAULTS, keep]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    number, kept = output.stdout.split()
    return int(number), kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told to keep memory")
def test_freed_memory_is_used_again():
    returned, _ = faults("return")
    kept, told = faults("keep")
    assert told == "True"
    assert kept < 100 < returned
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[1] == "False", "what the user has set wins"


def test_weights_are_cast_once_and_anew_after_a_change():
    layer, inputs = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        plain = layer(inputs)
        with weights_cast_once("cpu"):
            assert torch.equal(layer(inputs), plain)
            layer.weight.mul_(2)
            assert torch.equal(layer(inputs), plain), "cast once: not seen within the context"
        assert torch.equal(layer(inputs), 2 * plain)
        with weights_cast_once("cpu"):
            assert torch.equal(layer(inputs), 2 * plain)


def test_without_autocast_nothing_is_cast():
    layer, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    with weights_cast_once("cpu"):
        assert layer(inputs).dtype == torch.float32
