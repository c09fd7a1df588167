"""A run that is stopped and resumed is the unbroken run, bit for bit: weights, optimizer, counters, logs, data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from elastic_lightning.algorithms import (
    PPO,
    AdamWConfig,
    LanguageModel,
    PPOConfig,
    RewardModel,
)
from elastic_lightning.callbacks import (
    BatchCheckpoint,
    ElasticReset,
    EMAAnchor,
    SampleLogger,
    SavePretrained,
)
from elastic_lightning.data import ToyReviewsDataModule
from elastic_lightning.policies import LoRA, ModelSource, Sampling
from elastic_lightning.rewards import FunctionReward

EPOCHS, BATCHES, VALIDATE = 2, 4, 2  # of each run: batches an epoch, and between validations
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 96, **DROPOUT}
BERT = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
BERT |= {"intermediate_size": 16, "max_position_embeddings": 128}


class Stopped(Exception):
    """Stands for whatever ends a process."""


class StopAt(Callback):
    """Raises where a process might die: in a hook's call after `batches` training batches."""

    def __init__(self, hook: str, batches: int) -> None:
        self.batches, self.done = batches, 0
        setattr(self, hook, self._stop)

    def on_train_batch_end(self, *args) -> None:
        self.done += 1

    def _stop(self, *args) -> None:
        if self.done >= self.batches:
            raise Stopped


class StopInTraining(StopAt):
    """Dies in the middle of a batch, in an optimizer step."""

    def __init__(self, batches: int) -> None:
        super().__init__("on_before_optimizer_step", batches)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    """The tokenizer of the toy world."""
    from elastic_lightning.data.toy_grammar import review_grammar, toy_tokenizer

    folder = tmp_path_factory.mktemp("words")
    toy_tokenizer(review_grammar().words).save_pretrained(folder)
    return str(folder)


def share_of_the(prompts, responses):
    return [words.count("the") / max(len(words), 1) for words in map(str.split, responses)]


def reviews(task, seed=5):
    sizes = {"eval_prompts": 4, "eval_texts": 4, "eval_batch_size": 4, "batch_size": 4, "block_size": 16}
    return ToyReviewsDataModule(task, train_texts=24, seed=seed, **sizes)


def ppo(words, lora=False, **options):
    config = {"epochs": 1, "mini_batches": 2, "learning_rate": 1e-2, "schedule": "cosine", "warmup": 2}
    config |= {"kl_penalty": "adaptive", "kl_horizon": 60, "kl_target": 0.01, "target_kl": 0.05}
    source = ModelSource(architecture=GPT2, tokenizer=words, lora=LoRA(rank=2) if lora else None)
    torch.manual_seed(0)
    return PPO(source, FunctionReward(share_of_the), PPOConfig(**config | options), Sampling(max_new_tokens=5), seed=3)


def language_model(words):
    torch.manual_seed(0)
    return LanguageModel(ModelSource(architecture=GPT2, tokenizer=words), AdamWConfig(1e-2, warmup=3))


def reward_model(words):
    torch.manual_seed(0)
    return RewardModel(ModelSource(architecture=BERT, tokenizer=words), optimizer=AdamWConfig(1e-2, warmup=0))


CASES = {
    "ppo": lambda words: (ppo(words), reviews("prompts"), [ElasticReset(every=3, decay=0.9)]),
    "ppo_lora": lambda words: (ppo(words, lora=True), reviews("prompts"), [ElasticReset(every=3, decay=0.9)]),
    "ppo_anchor": lambda words: (ppo(words), reviews("prompts"), [EMAAnchor(decay=0.9)]),
    "language_model": lambda words: (language_model(words), reviews("language_model"), [ElasticReset(every=5)]),
    "reward_model": lambda words: (reward_model(words), reviews("reward_model"), []),
}


def run(case: str, words: str, folder: Path, stop: Callback | None = None, resume: bool = False, **options) -> Trainer:
    """One process's part of a run."""
    module, data, callbacks = CASES[case](words)
    if not case.startswith("ppo") and case != "game":
        own = [SavePretrained()]
    else:
        own = [SampleLogger(samples=2), SavePretrained(monitor="val/reward")]
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version="run", default_hp_metric=False),
        callbacks=[*callbacks, *own, BatchCheckpoint(every=1), *([stop] if stop else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **{"max_epochs": EPOCHS, "limit_train_batches": BATCHES, "val_check_interval": VALIDATE}
        | {"num_sanity_val_steps": -1}
        | options,
    )
    path = max((folder / "run" / "checkpoints").glob("*.ckpt")) if resume else None
    torch.manual_seed(torch.seed())  # nothing may depend on the generator
    if stop is None:
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    else:
        with pytest.raises(Stopped):
            trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return trainer


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def leaves(value, name=""):
    """Every tensor and number of a nested state by its name, times apart."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, f"{name}/{key}")]
    if isinstance(value, (list, tuple)):
        return [leaf for index, part in enumerate(value) for leaf in leaves(part, f"{name}/{index}")]
    return [(name, value)]


def state(trainer: Trainer, folder: Path) -> dict:
    """The last checkpoint, but for what tells how the run came about."""
    path = max((folder / "run" / "checkpoints").glob("*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["run_log"]
    loops = checkpoint.pop("loops")["fit_loop"]
    loops = {name: value for name, value in loops.items() if "val_loop" not in name and "optim" not in name}
    return dict(leaves(checkpoint)) | dict(leaves(loops, "loops"))


def assert_same(folder: Path, trainer: Trainer, whole_folder: Path, whole: Trainer) -> None:
    ours, theirs = state(trainer, folder), state(whole, whole_folder)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same or value != value, (name, ours[name], value)
    assert logged(folder) == logged(whole_folder)
    for tag, steps in logged(folder).items():
        assert tag == "epoch" or len({step for step, _ in steps}) == len(steps)
    samples = folder / "run" / "samples.jsonl"
    if samples.exists():
        assert samples.read_text() == (whole_folder / "run" / "samples.jsonl").read_text()
    for name in ("final", "best"):
        for path in (whole_folder / "run" / name).rglob("*.safetensors"):
            assert path.read_bytes() == (folder / path.relative_to(whole_folder)).read_bytes(), path


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Unbroken runs by case, each made once."""
    runs = {}

    def get(case, **options):
        key = case + json.dumps(options)
        if key not in runs:
            folder = tmp_path_factory.mktemp(case)
            runs[key] = folder, run(case, words, folder, **options)
        return runs[key]

    return get


STOPS = {
    "mid_epoch": [("on_before_optimizer_step", 1)],
    "before_a_reset": [("on_before_optimizer_step", 2)],
    "in_the_batch_of_a_reset": [("on_before_reset", 2)],
    "after_a_reset": [("on_before_optimizer_step", 3)],
    "before_a_validation": [("on_validation_start", 2)],
    "after_a_validation": [("on_validation_end", 6)],
    "at_an_epochs_end": [("on_train_epoch_end", 4)],
    "at_an_epochs_start": [("on_train_epoch_start", 4)],
    "in_a_step": [("on_before_optimizer_step", 5)],
    "twice_around_an_epochs_end": [("on_train_epoch_start", 4), ("on_before_optimizer_step", 2)],
    "many_times": [("on_before_optimizer_step", 2), ("on_before_optimizer_step", 1), ("on_validation_end", 2)],
    "at_the_end": [("on_train_end", 8)],
}


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("case", ["ppo", "language_model"])
def test_a_resumed_run_is_the_run(case, stops, words, tmp_path, whole):
    if case != "ppo" and "before_reset" in STOPS[stops][0][0]:
        pytest.skip("a reset of PPO's")
    for index, (hook, batches) in enumerate(STOPS[stops]):
        run(case, words, tmp_path, StopAt(hook, batches), resume=index > 0)
    assert_same(tmp_path, run(case, words, tmp_path, resume=True), *whole(case))
