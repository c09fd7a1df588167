"""A path is a path: no pattern, no device, and a file that would end the process is refused."""

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from elastic_lightning.data.files import read_splits, read_table
from elastic_lightning.data.nesting import DEEPEST, check_nesting
from elastic_lightning.data.parallel import ParallelText, read_lines, read_parallel
from elastic_lightning.data.question_sources import read_questions
from elastic_lightning.data.questions import Shares
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.held_out import read_prompts
from elastic_lightning.evaluation.humaneval import read_problems

NAMES = ["run[1]", "set*", "[ ]"]
NEIGHBOURS = ["run1", "seta", " "]  # what they would be patterns of


@pytest.fixture
def folders(tmp_path):
    """Each with a table that holds the folder's name."""
    for name in [*NAMES, *NEIGHBOURS]:
        (tmp_path / name).mkdir()
        row = {"text": name, "question": name, "answers": [name, "worse"], "fr": name, "en": name}
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
        for part in ("rl", "evaluation"):
            below = tmp_path / name / "hub" / "data" / part
            below.mkdir(parents=True)
            held_out = [row | {"question": f"{name} {part} {number}"} for number in range(9)]
            (below / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_pattern(folders, name):
    folder = folders / name
    assert list(read_splits(folder)["train"]["text"]) == [name]
    assert list(read_splits(folder / "train.jsonl")["train"]["text"]) == [name]
    assert read_parallel(ParallelText(str(folder)), ("fr", "en")) == {"fr": [name], "en": [name]}
    assert read_prompts(folder, template="{}") == [name]
    splits = read_questions(str(folder / "hub"), "hub", "rl", Shares(), None, 10)
    read = {question.text for split in splits.values() for question in split}
    assert read == {f"{name} {part} {number}" for part in ("rl", "evaluation") for number in range(9)}


def test_a_home_folder_of_nobody():
    stages = [read_splits, lambda path: read_questions(path, "hub", "rl", Shares(), None, 10), read_prompts]
    for read in [*stages, lambda path: read_parallel(ParallelText(path), ("fr", "en"))]:
        with pytest.raises(UserError, match=r"^~nobody-here/data: no user of that name"):
            read("~nobody-here/data")


def test_a_chain_is_no_path(tmp_path):
    (tmp_path / "a::b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UserError, match=r"^cannot read .*a::b.jsonl: `datasets` takes '::' in a path"):
        read_table(tmp_path / "a::b.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device here")
def test_what_has_no_end_is_not_read():
    for read in (read_splits, lambda path: read_questions(path, "hub", "rl", Shares(), None, 10)):
        with pytest.raises(UserError, match="/dev/zero is neither a file nor a folder"):
            read("/dev/zero")
    with pytest.raises(UserError, match="/dev/zero: it is a device"):
        read_lines(Path("/dev/zero"))
    with pytest.raises(UserError, match="/dev/zero"):
        read_problems("/dev/zero")


def deep(levels, kind="list", newline=""):
    opening, closing = ("[", "]") if kind == "list" else ('{"a":', "}")
    return f'{{"text": "t", "x": {(opening + newline) * levels}1{(closing + newline) * levels}}}\n'


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.jsonl.gz", "deep.json"])
@pytest.mark.parametrize(("kind", "newline"), [("list", ""), ("dict", ""), ("list", "\n")])
def test_values_that_are_nested_too_deep_are_refused(tmp_path, name, kind, newline):
    raw = f'{{"text": "fine"}}\n{deep(20_000, kind, newline)}'.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(UserError, match=f"{re.escape(name)} holds a value that is nested more than {DEEPEST} levels"):
        read_table(tmp_path / name)


def test_brackets_in_text_are_no_nesting(tmp_path):
    smiley = json.dumps({"text": 50 * ':[ "[[{{ \\ ', "x": [[[1]]]}) + "\n"
    (tmp_path / "flat.jsonl").write_text(200 * smiley)
    check_nesting(tmp_path / "flat.jsonl")
    assert len(read_table(tmp_path / "flat.jsonl")) == 200
    (tmp_path / "just.jsonl").write_text(deep(DEEPEST - 1))
    assert len(read_table(tmp_path / "just.jsonl")) == 1
    (tmp_path / "beyond.jsonl").write_text(deep(DEEPEST))
    with pytest.raises(UserError, match="nested more than"):
        read_table(tmp_path / "beyond.jsonl")


def test_lines_are_bounded_where_they_are_asked_to_be(tmp_path):
    for name, raw in (("a.txt", b"x" * 2**21), ("a.txt.gz", gzip.compress(b"x" * 2**21))):
        (tmp_path / name).write_bytes(raw)
        assert read_lines(tmp_path / name, 2**21) == ["x" * 2**21]
        with pytest.raises(UserError, match=f"{name} holds more than 1 MiB"):
            read_lines(tmp_path / name, 2**20)
