"""A run that is stopped and resumed is the unbroken run, bit for bit: weights, optimizer, counters, logs, data."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from data.question_rows import RANKED
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
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
from elastic_lightning.callbacks.position import Position
from elastic_lightning.data import (
    StackExchangeDataModule,
    ToyReviewsDataModule,
    ToyTranslationDataModule,
    ToyTranslationGameDataModule,
)
from elastic_lightning.data.loader import ResumableLoader
from elastic_lightning.data.sampler import EpochSampler
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

    accumulator = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0})
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


EVERYWHERE = [("ppo", stops) for stops in STOPS]
ELSEWHERE = [
    (case, stops)
    for case in CASES
    if case != "ppo"
    for stops in ("mid_epoch", "before_a_validation", "twice_around_an_epochs_end")
]


@pytest.mark.parametrize(("case", "stops"), [*EVERYWHERE, *ELSEWHERE])
def test_a_resumed_run_is_the_run(case, stops, words, tmp_path, whole):
    for index, (hook, batches) in enumerate(STOPS[stops]):
        run(case, words, tmp_path, StopAt(hook, batches), resume=index > 0)
    assert_same(tmp_path, run(case, words, tmp_path, resume=True), *whole(case))


def test_a_run_of_a_number_of_steps_is_resumed_in_any_epoch(words, tmp_path, whole):
    limits = {"max_epochs": -1, "max_steps": 7, "limit_train_batches": 3, "val_check_interval": 2}
    run("language_model", words, tmp_path, StopAt("on_train_epoch_start", 3), **limits)
    run("language_model", words, tmp_path, StopAt("on_before_optimizer_step", 2), resume=True, **limits)
    resumed = run("language_model", words, tmp_path, resume=True, **limits)
    assert resumed.global_step == 7
    assert_same(tmp_path, resumed, *whole("language_model", **limits))


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 4, "limit_train_batches": 3}], ids=str)
@pytest.mark.parametrize("case", ["ppo", "language_model"])
def test_what_a_run_could_not_write_at_its_end_is_written_when_it_is_resumed(case, limits, words, tmp_path, whole):
    if case == "ppo" and limits:
        limits = limits | {"max_steps": 8}  # optimizer steps, of which a batch has two
    run(case, words, tmp_path, StopAt("on_train_end", 1, first=True), **limits)
    assert not (tmp_path / "run" / "final").exists()
    assert_same(tmp_path, run(case, words, tmp_path, resume=True, **limits), *whole(case, **limits))
    assert (tmp_path / "run" / "final" / "config.json").exists()


def test_a_run_that_was_stopped_early_stays_stopped(words, tmp_path):
    def impatient(patience):  # no perplexity is better than 0
        return [EarlyStopping("val/perplexity", patience=patience, stopping_threshold=None, min_delta=1e9)]

    run("language_model", words, tmp_path, StopAt("on_train_end", 1, first=True), more=impatient(1))
    resumed = run("language_model", words, tmp_path, resume=True, more=impatient(1))
    assert resumed.global_step == 4 and (tmp_path / "run" / "final" / "config.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run("language_model", words, tmp_path, resume=True, more=impatient(50)).global_step > 4


def test_every_loggers_log_goes_back_to_the_checkpoint(words, tmp_path):
    def another():
        return [TensorBoardLogger(tmp_path / "other", name="", version="run", default_hp_metric=False)]

    run("language_model", words, tmp_path, StopAt("on_before_optimizer_step", 3), loggers=another())
    (tmp_path / "run" / "checkpoints" / "batch_000003.ckpt").unlink()
    run("language_model", words, tmp_path, resume=True, loggers=another())
    assert logged(tmp_path / "other") == logged(tmp_path)
    assert [step for step, _ in logged(tmp_path / "other")["train/loss"]] == [*range(8)]


def test_a_loggers_new_folder_keeps_no_other_from_going_back(words, tmp_path, whole):
    def unnumbered():
        return [TensorBoardLogger(tmp_path / "other", default_hp_metric=False)]

    run("ppo", words, tmp_path, StopAt("on_before_optimizer_step", 3), loggers=unnumbered())
    (tmp_path / "run" / "checkpoints" / "batch_000003.ckpt").unlink()
    assert_same(tmp_path, run("ppo", words, tmp_path, resume=True, loggers=unnumbered()), *whole("ppo"))


def test_the_runs_compared_learn_something(whole):
    for case in ("ppo", "ppo_lora", "ppo_anchor"):
        values = logged(whole(case)[0])
        assert min(value for _, value in values["train/grad_norm"]) > 0
        assert len({value for _, value in values["train/reward"]}) > 1


class Numbers(LightningDataModule):
    """Rows that workers fetch, in the order of a `ResumableLoader`."""

    def train_dataloader(self):
        sampler = EpochSampler(8, 2, seed=1)
        return ResumableLoader(
            lambda: Position.of(self.trainer), range(8), batch_size=2, sampler=sampler, num_workers=1, collate_fn=list
        )


class Remembers(LightningModule):
    """Sees rows, and learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("batches", [4, 6])  # at an epoch's end, and inside the next one
def test_a_loader_with_workers_goes_on_in_the_same_order(tmp_path, batches):
    def fit(epochs, path=None, **limits):
        module = Remembers()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        keep = BatchCheckpoint(every=1, keep=9)
        trainer = Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=[keep], **quiet, **limits)
        trainer.fit(module, Numbers(), ckpt_path=path, weights_only=True)
        return module.seen

    whole = fit(3)
    shutil.copy(tmp_path / "checkpoints" / f"batch_{batches:06d}.ckpt", tmp_path / "start.ckpt")
    assert whole[:4] != whole[4:8]
    assert fit(3, tmp_path / "start.ckpt") == whole[batches:]


def test_gradients_on_their_way_are_not_cut(words, tmp_path, whole):
    options = {"accumulate_grad_batches": 2}
    run("language_model", words, tmp_path, StopAt("on_train_batch_start", 3), **options)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["batch_000002.ckpt"]
    assert_same(
        tmp_path, run("language_model", words, tmp_path, resume=True, **options), *whole("language_model", **options)
    )


def test_what_was_logged_after_the_checkpoint_is_removed(words, tmp_path, whole):
    """Also where the run that is resumed was ahead of the checkpoint, as after a kill with all its logs on the disk."""
    run("ppo", words, tmp_path, StopAt("on_train_batch_start", 6))
    (tmp_path / "run" / "checkpoints" / "batch_000005.ckpt").unlink()
    torn = next((tmp_path / "run").glob("events.*"))
    torn.write_bytes(torn.read_bytes()[:-7])  # half a record at the end
    assert max(step for step, _ in logged(tmp_path)["train/reward"]) >= 5
    assert_same(tmp_path, run("ppo", words, tmp_path, resume=True), *whole("ppo"))


def test_another_folders_logs_are_left_alone(words, tmp_path):
    run("ppo", words, tmp_path / "first", max_epochs=1)
    other = tmp_path / "second" / "run"
    other.mkdir(parents=True)
    (other / "samples.jsonl").write_text("another run's\n")
    (other / "checkpoints").mkdir()
    last = max((tmp_path / "first" / "run" / "checkpoints").iterdir())
    (other / "checkpoints" / last.name).write_bytes(last.read_bytes())
    run("ppo", words, tmp_path / "second", resume=True)
    assert (other / "samples.jsonl").read_text().startswith("another run's\n")
