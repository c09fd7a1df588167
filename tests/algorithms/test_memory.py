"""What a run holds between its steps: freed pages, and cast weights."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from elastic_lightning.algorithms import PPO, LanguageModel, RewardModel, TranslationModel, memory
from elastic_lightning.algorithms.memory import keep_freed_memory
from elastic_lightning.cli import main
from elastic_lightning.policies.sampler import weights_cast_once

# Prints the page faults of allocating 100 MB once more, before and after; a process of its own, for it is for good.
FAULTS = """
import resource, torch
from elastic_lightning.algorithms import PPO, LanguageModel, RewardModel, TranslationModel, memory
from elastic_lightning.algorithms.memory import keep_freed_memory

def faults():
    for _ in range(4):  # the first ones may find a small object in the way of a tensor that is aligned
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told to keep memory")
def test_freed_memory_is_used_again():
    output = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    returned, told, kept = output.split()
    assert told == "True"
    assert int(kept) < 100 < int(returned)


@pytest.mark.parametrize("name", ["TRIM_THRESHOLD_", "MMAP_THRESHOLD_", "MMAP_MAX_", "TOP_PAD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_wins(monkeypatch, name):
    value = "glibc.malloc.trim_threshold=1000000" if name == "GLIBC_TUNABLES" else "1000000"
    monkeypatch.setenv(name if name == "GLIBC_TUNABLES" else f"MALLOC_{name}", value)
    assert not keep_freed_memory()


def test_the_command_line_leaves_the_allocator_to_the_training(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=lambda *setting: told.append(setting)))
    assert main(["fit", "--config", str(tmp_path / "none.yaml")]) == 2
    assert not told
    assert keep_freed_memory() is False and len(told) == 1, "the spy is what the training would call"


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


def test_nothing_that_was_cast_is_left_behind():
    layer, inputs = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # with a cache of its own, unlike Lightning's
        with weights_cast_once("cpu"):
            plain = layer(inputs)
        layer.weight.mul_(2)
        assert torch.equal(layer(inputs), 2 * plain)


def test_without_autocast_nothing_is_cast():
    layer, inputs = nn.Linear(3, 2), torch.randn(4, 3)
    with weights_cast_once("cpu"):
        assert layer(inputs).dtype == torch.float32


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel, TranslationModel, PPO])
def test_every_module_keeps_its_memory_when_it_trains_on_a_cpu(kind, monkeypatch):
    kept = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: kept.append(kind))
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.lm = SimpleNamespace(longest_text=None, longest_source=None, longest_target=None, model=None)
    module.initial = module.reference = None
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, callbacks=[], loggers=[], datamodule=None, precision="32-true")
    monkeypatch.setattr(kind, "trainer", trainer)
    monkeypatch.setattr(kind, "model", SimpleNamespace(config=PreTrainedConfig()), raising=False)
    module.max_new_tokens = 1
    module.setup("validate")
    assert not kept
    module.setup("fit")
    assert kept == [kind]
