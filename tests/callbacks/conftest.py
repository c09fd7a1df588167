"""Ten-line modules to reset, and a PPO small enough to run in a blink."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from elastic_lightning.algorithms import PPO, PPOConfig
from elastic_lightning.policies import LoRA, ModelSource, Prompts, Sampling
from elastic_lightning.rewards import Reward

WORDS = [f"w{number}" for number in range(12)]


class Plain(LightningModule):
    """Automatic optimization; a frozen layer and a buffer stand beside what is trained."""

    def __init__(self, optimizer: type = torch.optim.AdamW) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net, self.frozen, self.optimizer = nn.Linear(3, 2), nn.Linear(2, 2), optimizer
        self.register_buffer("steps", torch.zeros(()))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.frozen.requires_grad_(False)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return (self.frozen(self.net(batch)) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer(self.net.parameters(), lr=0.1)


class Manual(Plain):
    """Three optimizer steps a batch."""

    def __init__(self, optimizer: type = torch.optim.AdamW) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(3):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()


class WordShare(Reward):
    """Share of a response's words that are w3."""

    def forward(self, prompts, responses):
        return torch.tensor([words.count("w3") / max(len(words), 1) for words in map(str.split, responses)])


class Lab:
    """Builders over one tokenizer."""

    plain, manual = Plain, Manual

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def batches(self, count: int = 6, rows: int = 4) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(rows, 3, generator=generator) for _ in range(count)]

    def prompts(self, count: int = 4, rows: int = 4) -> list[Prompts]:
        generator = torch.Generator().manual_seed(4)
        shape = (rows, 3)
        return [
            Prompts(torch.randint(0, len(WORDS), shape, generator=generator), torch.ones(shape, dtype=torch.bool))
            for _ in range(count)
        ]

    def ppo(self, lora: bool = False, **options) -> PPO:
        architecture = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
        source = ModelSource(
            architecture=architecture | {"initializer_range": 0.3},
            tokenizer=self.folder,
            lora=LoRA(rank=2) if lora else None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = PPOConfig(**{"epochs": 2, "mini_batches": 2, "learning_rate": 1e-2} | options)
            return PPO(source, WordShare(), config, Sampling(max_new_tokens=4), seed=0)

    def trainer(self, root: Path, callbacks: list | None = None, **options) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "default_root_dir": root,
        }
        return Trainer(**defaults | {"callbacks": callbacks or []} | options)

    def loader(self, batches: list) -> DataLoader:
        return DataLoader(batches, batch_size=None)

    def fit(self, module, root: Path, callbacks: list, batches: list | None = None, **options) -> Trainer:
        if batches is None:
            batches = self.prompts() if isinstance(module, PPO) else self.batches()
        trainer = self.trainer(root, callbacks, **options)
        trainer.fit(module, self.loader(batches))
        return trainer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are many times slower on two threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {word: index for index, word in enumerate([*WORDS, "<unk>", "<eos>", "<pad>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return Lab(folder)


@pytest.fixture
def logger(tmp_path):
    return TensorBoardLogger(tmp_path, name="", version="run")


@pytest.fixture
def read_events():
    def read(folder: str | Path, kind: str = "scalars") -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
        accumulator.Reload()
        if kind == "text":
            tags = accumulator.Tags()["tensors"]
            return {
                tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in accumulator.Tensors(tag)] for tag in tags
            }
        return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}

    return read
