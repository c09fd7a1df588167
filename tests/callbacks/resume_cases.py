"""Small runs of every kind, what stops them, and what of two runs must be the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data.question_rows import RANKED
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from elastic_lightning.algorithms import (
    PPO,
    AdamWConfig,
    LanguageModel,
    PPOConfig,
    PreferenceModel,
    RewardModel,
    TranslationGame,
    TranslationModel,
)
from elastic_lightning.callbacks import (
    BatchCheckpoint,
    ElasticReset,
    EMAAnchor,
    EMAOnly,
    IteratedLearning,
    SampleLogger,
    SavePretrained,
)
from elastic_lightning.data import (
    StackExchangeDataModule,
    ToyReviewsDataModule,
    ToyTranslationDataModule,
    ToyTranslationGameDataModule,
)
from elastic_lightning.data.toy_grammar import review_grammar, toy_tokenizer
from elastic_lightning.data.toy_languages import all_words
from elastic_lightning.policies import LoRA, ModelSource, Sampling
from elastic_lightning.rewards import FunctionReward

EPOCHS, BATCHES, VALIDATE = 2, 4, 2  # of each run: batches an epoch, and between validations
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 96, **DROPOUT}
MARIAN = {"model_type": "marian", "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8}
MARIAN |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
MARIAN |= {"max_position_embeddings": 96}
BERT = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
BERT |= {"intermediate_size": 16, "max_position_embeddings": 128}


class Stopped(Exception):
    """Stands for whatever ends a process."""


class StopAt(Callback):
    """Raises where a process might die: in a hook's call after `batches` training batches."""

    def __init__(self, hook: str, batches: int, first: bool = False) -> None:
        self.batches, self.done, self.first = batches, 0, first
        setattr(self, hook, self._stop)

    def on_train_batch_end(self, *args) -> None:
        self.done += 1

    def _stop(self, *args) -> None:
        if self.done >= self.batches:
            raise Stopped


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> str:
    """One tokenizer for the reviews and the three languages of the toy worlds."""
    folder = tmp_path_factory.mktemp("words")
    toy_tokenizer([*dict.fromkeys([*review_grammar().words, *all_words()])]).save_pretrained(folder)
    return str(folder)


def length(prompts, responses):
    """A reward that differs between the responses of any policy: there is something to learn."""
    return [len(response) / 10 for response in responses]


def reviews(task, seed=5):
    sizes = {"eval_prompts": 4, "eval_texts": 4, "eval_batch_size": 4, "batch_size": 4, "block_size": 16}
    return ToyReviewsDataModule(task, train_texts=24, seed=seed, **sizes)


def ppo(words, lora=False, **options):
    config = {"epochs": 1, "mini_batches": 2, "learning_rate": 1e-2, "schedule": "cosine", "warmup": 2}
    config |= {"kl_penalty": "adaptive", "kl_horizon": 60, "kl_target": 0.01, "target_kl": 0.05}
    source = ModelSource(architecture=GPT2, tokenizer=words, lora=LoRA(rank=2) if lora else None)
    torch.manual_seed(0)
    return PPO(source, FunctionReward(length), PPOConfig(**config | options), Sampling(max_new_tokens=5), seed=3)


def language_model(words):
    torch.manual_seed(0)
    return LanguageModel(ModelSource(architecture=GPT2, tokenizer=words), AdamWConfig(1e-2, warmup=3))


def reward_model(words):
    torch.manual_seed(0)
    return RewardModel(ModelSource(architecture=BERT, tokenizer=words), optimizer=AdamWConfig(1e-2, warmup=0))


def game(words, **options):
    torch.manual_seed(0)
    source = ModelSource(architecture=MARIAN, tokenizer=words)
    config = PPOConfig(epochs=1, mini_batches=1, kl_penalty="none", learning_rate=1e-2)
    return TranslationGame(source, source, config, Sampling(max_new_tokens=5), 1e-3, seed=3, **options)


PAIRS = {"train_pairs": 40, "eval_pairs": 4, "batch_size": 8, "eval_batch_size": 4}


def toy_pairs(**languages):
    return ToyTranslationDataModule(**languages, **PAIRS)


def pairs(beside=False):
    return ToyTranslationGameDataModule(**PAIRS, **({"fr_en": toy_pairs(source="fr", target="en")} if beside else {}))


def translation_model(words):
    torch.manual_seed(0)
    return TranslationModel(ModelSource(architecture=MARIAN, tokenizer=words), AdamWConfig(1e-2, warmup=0))


def preference_model(words):
    torch.manual_seed(0)
    source = ModelSource(architecture=GPT2 | {"n_positions": 512}, tokenizer=words)
    return PreferenceModel(source, optimizer=AdamWConfig(1e-2, warmup=0))


def questions(task, words):
    """Those of `question_rows`, in a folder beside the tokenizer."""
    file = Path(words) / "questions.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in RANKED))
    sizes = {"batch_size": 4, "eval_batch_size": 4, "eval_questions": 6, "eval_texts": 4, "block_size": 24}
    return StackExchangeDataModule(str(file), task=task, max_tokens=200, **sizes)


CASES = {
    "ppo": lambda words: (ppo(words), reviews("prompts"), [ElasticReset(every=3, decay=0.9)]),
    "ppo_lora": lambda words: (ppo(words, lora=True), reviews("prompts"), [ElasticReset(every=3, decay=0.9)]),
    "ppo_anchor": lambda words: (ppo(words), reviews("prompts"), [EMAAnchor(decay=0.9)]),
    "language_model": lambda words: (language_model(words), reviews("language_model"), [ElasticReset(every=3)]),
    "translation_game": lambda words: (game(words), pairs(), [ElasticReset(every=3, decay=0.9)]),
    "self_play": lambda words: (game(words), pairs(beside=True), []),
    "iterated_learning": lambda words: (game(words), pairs(), [IteratedLearning(every=3, steps=2)]),
    "reward_model": lambda words: (reward_model(words), reviews("reward_model"), []),
    "preference_model": lambda words: (preference_model(words), questions("pairs", words), [EMAOnly(decay=0.9)]),
    "translation_model": lambda words: (translation_model(words), toy_pairs(source="fr", target="en"), []),
    "fine_tuning": lambda words: (language_model(words), questions("supervised", words), []),
}


def run(case: str, words: str, folder: Path, stop: Callback | None = None, resume: bool = False, **options) -> Trainer:
    """One process's part of a run."""
    module, data, callbacks = CASES[case](words)
    if isinstance(module, PPO):
        own = [SampleLogger(samples=2), SavePretrained(monitor="val/reward")]
    else:
        own = [SavePretrained()]
    first = stop is not None and stop.first
    last = stop is not None and not stop.first
    logger = TensorBoardLogger(folder, name="", version="run", default_hp_metric=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=[logger, *options.pop("loggers", [])],
        callbacks=[
            *([stop] if first else []),
            *callbacks,
            *options.pop("more", []),
            *own,
            BatchCheckpoint(every=1),
            *([stop] if last else []),
        ],
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

    accumulator = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("time/")]
    # Files of one second and one process are read in the order of their numbers as text.
    return {tag: sorted((event.step, event.value) for event in accumulator.Scalars(tag)) for tag in tags}


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
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else repr(ours[name]) == repr(value)
        assert same, (name, ours[name], value)
    assert repr(logged(folder)) == repr(logged(whole_folder))  # NaN is NaN
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
