"""How many of our functions one PPO batch crosses: what a reader has to open to follow it.

    python benchmarks/functions.py [--list]

Traces `training_step` of PPO on a tiny GPT-2 (random weights, CPU, float32, one process) and counts the package's
functions that run in it, and the files they lie in. Lambdas and comprehensions count with the function they stand in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from lightning.pytorch import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import elastic_lightning
from elastic_lightning.algorithms import PPO, PPOConfig
from elastic_lightning.policies import ModelSource, Prompts, Sampling
from elastic_lightning.rewards import FunctionReward

PACKAGE = Path(elastic_lightning.__file__).parent
WORDS = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, 30))]


def functions_called(work: Callable[[], object]) -> dict[str, set[str]]:
    """The package's functions that `work` runs, by their file."""
    found: dict[str, set[str]] = defaultdict(set)

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            found[str(Path(code.co_filename).relative_to(PACKAGE))].add(code.co_qualname.replace(".<locals>", ""))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return dict(found)


def tiny_policy(folder: str) -> None:
    """A GPT-2 of random weights and its tokenizer, as a folder."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, **special)
    GPT2LMHeadModel(config).save_pretrained(folder)


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


class Traced(PPO):
    """Notes what its second batch runs: the first one also builds what is built once."""

    called: dict[str, set[str]]

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        self.called = functions_called(lambda: super(Traced, self).training_step(batch, batch_idx))


def trace() -> dict[str, set[str]]:
    """Functions of one PPO batch by file."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tiny_policy(folder)
        config = PPOConfig(epochs=2, mini_batches=2)
        module = Traced(ModelSource(folder), FunctionReward(lengths), config, Sampling(max_new_tokens=6), seed=0)
    batch = Prompts(torch.randint(2, len(WORDS), (8, 5)), torch.ones(8, 5, dtype=torch.bool))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader([batch, batch], batch_size=None))
    return module.called


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print their names, file by file")
    arguments = parser.parse_args()
    called = trace()
    if arguments.list:
        for file, names in sorted(called.items()):
            print(f"{file} ({len(names)})", *sorted(names), sep="\n    ")
    print(f"{sum(map(len, called.values()))} functions in {len(called)} files")


if __name__ == "__main__":
    main()
