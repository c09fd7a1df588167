"""Every number that an option takes has bounds: what lies beyond them is one line before anything is done with it."""

import inspect
import math

import pytest

from elastic_lightning.algorithms import AdamWConfig, PPOConfig
from elastic_lightning.cli import main
from elastic_lightning.data import (
    IMDBDataModule,
    StackExchangeDataModule,
    ToyReviewsDataModule,
    ToyTranslationDataModule,
    ToyTranslationGameDataModule,
)
from elastic_lightning.data.game import GameDataModule
from elastic_lightning.data.pairs import PairsDataModule
from elastic_lightning.data.parallel import ParallelText
from elastic_lightning.data.sentences import SentencesDataModule
from elastic_lightning.data.translation import Corpora
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.evaluate import QuestionOptions, TextOptions
from elastic_lightning.evaluation.generate import main as generate
from elastic_lightning.evaluation.humaneval import HumanEvalOptions
from elastic_lightning.evaluation.sandbox import Limits
from elastic_lightning.policies import Sampling

TEXT = ParallelText("nowhere")
OWNERS = {  # what takes options -> those it cannot do without
    IMDBDataModule: {},
    ToyReviewsDataModule: {},
    SentencesDataModule: {"train": TEXT, "validation": TEXT},
    StackExchangeDataModule: {},
    PairsDataModule: {},
    GameDataModule: {},
    ToyTranslationDataModule: {},
    ToyTranslationGameDataModule: {},
    Corpora: {"train": TEXT},
    TextOptions: {"path": "nowhere"},
    QuestionOptions: {"path": "nowhere"},
    HumanEvalOptions: {"path": "nowhere"},
    Limits: {},
    Sampling: {},
    AdamWConfig: {},
    PPOConfig: {},
}
MAY_BE_0 = {"seed", "min_words", "min_new_tokens", "top_k", "warmup", "max_skipped"}


def options_of(kind):
    """Owner and name of each option that is a number of this kind, perhaps null."""
    for owner in OWNERS:
        for name, parameter in inspect.signature(owner).parameters.items():
            if parameter.annotation in (kind, f"{kind} | None"):
                yield owner, name


@pytest.mark.parametrize("value", [-1, 0, 2**70])
def test_whole_numbers_have_bounds(value):
    checked, taken = 0, []
    for owner, name in options_of("int"):
        if value == 0 and name in MAY_BE_0:
            continue
        checked += 1
        try:
            owner(**OWNERS[owner], **{name: value})
        except UserError as error:
            if name not in str(error) and "batch_size" not in str(error) and name not in ("length", "stride"):
                taken.append(f"{owner.__name__}.{name}: {error}")
        else:
            taken.append(f"{owner.__name__}.{name}")
    assert not taken and checked > 60


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_number_is_a_number(value):
    taken = []
    for owner, name in options_of("float"):
        try:
            owner(**OWNERS[owner], **{name: value})
        except UserError as error:
            assert name.removeprefix("adam_") in str(error)
        else:
            taken.append(f"{owner.__name__}.{name}")
    assert not taken


@pytest.mark.parametrize("data", [IMDBDataModule, StackExchangeDataModule])
def test_a_block_holds_something_to_predict(data):
    with pytest.raises(UserError, match="block_size must be 2 or more, got 1"):
        data(block_size=1)


def test_a_sandbox_ends_some_time():
    with pytest.raises(UserError, match="wall_seconds must be above 0 and at most"):
        Limits(wall_seconds=math.inf)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed=-1"], "--seed must be from 0 to 4294967295, got -1"),
        ([f"--seed={2**70}"], "--seed must be from 0 to"),
        (["--samples=-1"], "--samples must be 1 or more, got -1"),
        ([f"--samples={10**9}"], "more than 1000000 responses"),
        ([f"--samples={10**12}"], "--samples must be at most"),
        ([f"--max_new_tokens={10**12}"], "max_new_tokens must be at most"),
        (["--prompt=caf\udce9"], r"--prompt 'caf\\udce9' is not UTF-8"),
        (["--prompts_file=/dev/zero"], "/dev/zero holds more than 256 MiB"),
    ],
)
def test_generate_is_bounded(gpt2_folder, flags, message):
    with pytest.raises(UserError, match=message):
        generate([f"--model={gpt2_folder}", "--prompt=w5 w9", *flags])


@pytest.mark.parametrize("option", ["--data.train_texts=-1", "--data.seed=-1", f"--data.seed={2**70}"])
def test_it_is_one_line_on_the_command_line(gpt2_folder, option, capsys):
    """Through the parser, which wraps what a constructor raises."""
    model = ["--model=LanguageModel", f"--model.policy={{path: {gpt2_folder}}}"]
    assert main(["fit", *model, "--data=ToyReviewsDataModule", option]) != 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert option.split("=")[0].removeprefix("--data.") in line
