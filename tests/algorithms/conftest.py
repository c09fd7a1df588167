"""A world small enough to check by hand: a word-level tokenizer, models of width 16, a reward that counts a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from elastic_lightning.algorithms import PPO, PPOConfig
from elastic_lightning.algorithms.ppo.update import TrainingBatch
from elastic_lightning.policies import LoRA, ModelSource, Prompts, Sampling
from elastic_lightning.rewards import Reward

WORDS = [f"w{number}" for number in range(27)]
EOS, PAD = 28, 29  # the pad id is not 0, so that a forgotten mask is seen


class WordShare(Reward):
    """Share of a response's words that are `word`."""

    def __init__(self, word: str = "w3") -> None:
        super().__init__()
        self.word = word

    def forward(self, prompts: list[str], responses: list[str]) -> torch.Tensor:
        return torch.tensor([words.count(self.word) / max(len(words), 1) for words in map(str.split, responses)])


class Recording(PPO):
    """Keeps what each PPO batch learned from."""

    def log_ppo_batch(self, scored, experience, losses):
        batch = TrainingBatch(scored.prompts, scored.rollout, experience, scored.frozen_hidden)
        self.__dict__.setdefault("seen", []).append(batch)
        super().log_ppo_batch(scored, experience, losses)


class Toy:
    """Builders over one saved model."""

    eos, pad, reward_class = EOS, PAD, WordShare

    def __init__(self, folder: Path, auto_class: type = AutoModelForCausalLM) -> None:
        self.folder, self.auto_class = str(folder), auto_class

    def source(self, lora: bool = False, **options) -> ModelSource:
        return ModelSource(self.folder, lora=LoRA(rank=4, alpha=8.0) if lora else None, **options)

    def ppo(self, *, lora=False, reward=None, sampling=None, seed=0, head_noise=0.3, **options) -> Recording:
        """A PPO module; `options` are those of `PPOConfig`, `PPO` takes the rest. The value head is not left at 0."""
        rest = {k: options.pop(k) for k in ("separate_value_trunk", "execution", "reference") if k in options}
        config = PPOConfig(**{"epochs": 2, "mini_batches": 2, "learning_rate": 1e-3} | options)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # a fresh adapter is random
            module = Recording(
                self.source(lora=lora),
                reward if reward is not None else WordShare(),
                config,
                Sampling(**{"max_new_tokens": 6} | (sampling or {})),
                seed=seed,
                **rest,
            )
        generator = torch.Generator().manual_seed(1)
        head = module.actor.value_head
        for parameter in [] if head is None else head.parameters():
            parameter.data.copy_(head_noise * torch.randn(parameter.shape, generator=generator))
        return module

    def perturb(self, module: PPO, scale: float = 0.1) -> None:
        """Move the policy away from its reference."""
        generator = torch.Generator().manual_seed(2)
        for parameter in module.shadowed_parameters().values():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)

    def prompts(self, rows: int = 6, seed: int = 0, ragged: bool = True, length: int = 4) -> Prompts:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, len(WORDS), (rows, length), generator=generator)
        lengths = torch.tensor([length - row % length if ragged else length for row in range(rows)])
        mask = torch.arange(length) >= length - lengths[:, None]
        return Prompts(tokens.masked_fill(~mask, PAD), mask)

    def loader(self, batches: list) -> DataLoader:
        return DataLoader(batches, batch_size=None)

    def trainer(self, root: Path | str, **options) -> Trainer:
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
        return Trainer(**defaults | options)

    def fit(self, module: PPO, root: Path | str, batches: list | None = None, **options) -> Trainer:
        trainer = self.trainer(root, **options)
        trainer.fit(module, self.loader(batches if batches is not None else [self.prompts()]))
        return trainer

    def plain_model(self) -> PreTrainedModel:
        return self.auto_class.from_pretrained(self.folder).eval()


def events(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of a TensorBoard folder: tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are many times slower on two threads of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_tokenizer(folder: Path) -> int:
    """The tokenizer of WORDS; returns its size."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, "<unk>", "<eos>", "<pad>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return len(vocabulary)


def save_policy(folder: Path) -> None:
    """A tiny GPT-2 and the tokenizer of WORDS."""
    config = GPT2Config(
        vocab_size=save_tokenizer(folder),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.3,
        resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    with torch.no_grad():  # random biases too, and an end of text that comes before the last token now and then
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.transformer.ln_f.bias.fill_(0.5)
        model.transformer.wte.weight[EOS] += 0.2
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    folder = tmp_path_factory.mktemp("policy")
    save_policy(folder)
    return Toy(folder)


@pytest.fixture(scope="session")
def encoder_decoder_toys(tmp_path_factory, encoder_decoder) -> dict[str, Toy]:
    toys = {}
    for kind in ("marian", "bart", "t5"):
        folder = tmp_path_factory.mktemp(kind)
        encoder_decoder(kind, save_tokenizer(folder), PAD, EOS).save_pretrained(folder)
        toys[kind] = Toy(folder, AutoModelForSeq2SeqLM)
    return toys


@pytest.fixture(params=["marian", "bart", "t5"])
def seq2seq_toy(request, encoder_decoder_toys) -> Toy:
    return encoder_decoder_toys[request.param]


@pytest.fixture(params=["gpt2", "marian", "bart", "t5"])
def any_toy(request, toy, encoder_decoder_toys) -> Toy:
    return {"gpt2": toy, **encoder_decoder_toys}[request.param]


@pytest.fixture
def read_events():
    return events
