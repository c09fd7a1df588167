import gzip
import json
import re

import pytest
from question_rows import PAIRED, RANKED

from elastic_lightning.data.files import read_rows, table_files
from elastic_lightning.data.question_sources import read_questions
from elastic_lightning.data.questions import Shares, collect, key_of
from elastic_lightning.errors import UserError

HUB_ID = "lvwerra/stack-exchange-paired"


def read(path, part="rl", limit=None, held_out=1000):
    return read_questions(path, HUB_ID, part, Shares(), limit, held_out)


def keys(questions):
    return {key_of(question.text) for question in questions}


@pytest.fixture
def hub_copy(write_rows, tmp_path):
    """A folder laid out as the data set on the hub; five held-out rows stand in the other parts too."""
    for part, rows in (("finetune", PAIRED[:40]), ("reward", PAIRED[40:80]), ("rl", PAIRED[80:120])):
        write_rows(PAIRED[150:155] + rows, f"hub/data/{part}/train-00000.jsonl.gz")
    write_rows(PAIRED[120:200], "hub/data/evaluation/train-00000.jsonl.gz")
    return str(tmp_path / "hub")


@pytest.mark.parametrize("layout", ["one file", "folder of files", "paired", "csv", "parquet", "saved", "saved splits"])
def test_every_layout_gives_the_same_questions(layout, write_rows, tmp_path):
    from datasets import Dataset, DatasetDict

    expected = read(write_rows(RANKED))
    (tmp_path / "many").mkdir()
    if layout == "one file":
        path = write_rows(RANKED, "rows.jsonl.gz")
    elif layout == "folder of files":
        write_rows(RANKED[:90], "many/b.jsonl.gz"), write_rows(PAIRED[135:], "many/a.jsonl")
        (tmp_path / "many" / "README.md").write_text("not data")
        path = str(tmp_path / "many")
    elif layout.startswith("saved"):
        path, data = str(tmp_path / "saved"), Dataset.from_list(RANKED)
        halves = {"train": data.select(range(90)), "test": data.select(range(90, len(data)))}
        (data if layout == "saved" else DatasetDict(halves)).save_to_disk(path)
    elif layout == "paired":
        path = write_rows(PAIRED)
    else:
        path = str(tmp_path / f"rows.{layout}")
        getattr(Dataset.from_list(PAIRED), f"to_{layout}")(path)
    found = read(path)
    if layout == "folder of files":  # a.jsonl comes first
        expected, found = ({name: keys(split) for name, split in splits.items()} for splits in (expected, found))
    assert found == expected


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "first"), [("supervised", 0), ("reward", 40), ("rl", 80)])
def test_each_stage_streams_its_folder_of_the_hub(part, first, hub_copy):
    splits = read(hub_copy, part)
    measured = {key_of(row["question"]) for row in PAIRED[120:200]}
    trained = {key_of(row["question"]) for row in PAIRED[first : first + 40]}
    assert keys(splits["train"]) == trained and not trained & measured
    assert keys(splits["validation"]) | keys(splits["test"]) == measured
    assert not keys(splits["validation"]) & keys(splits["test"])


def test_the_hub_is_asked_for_a_stream_of_one_folder(hub_copy, monkeypatch):
    import datasets

    asked, load = [], datasets.load_dataset

    def from_copy(name, **options):
        asked.append((name, *sorted(options.items())))
        return load(hub_copy, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_copy)
    monkeypatch.setattr("elastic_lightning.data.files.hub_offline", lambda: False)
    splits = read(None, "reward", limit=5)
    assert splits == read(hub_copy, "reward", limit=5)
    assert len(splits["train"]) == 1  # four of the five are held out
    folders = [(HUB_ID, ("data_dir", f"data/{name}")) for name in ("reward", "evaluation")]
    assert asked[:2] == [(*folder, ("split", "train"), ("streaming", True)) for folder in folders]


def test_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("elastic_lightning.policies.reading.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"stack-exchange-paired.*data.init_args.path") as raised:
        read(None)
    assert "\n" not in str(raised.value)


# Mistakes -----------------------------------------------------------------------------------------------------------


LINES = "".join(json.dumps(row) + "\n" for row in RANKED).encode()
BAD_FILES = {
    "cut off": ("rows.jsonl.gz", gzip.compress(LINES)[:-200], "cannot read .*rows.jsonl.gz"),
    "not gzip": ("rows.jsonl.gz", LINES, "cannot read .*rows.jsonl.gz"),
    "not UTF-8": ("rows.jsonl", LINES.replace(b"sort", b"s\xff\xferst"), "rows.jsonl holds text that is not UTF-8"),
    "not JSON": ("rows.jsonl", LINES + b"{oh no\n", "cannot read .*rows.jsonl"),
    "empty": ("rows.jsonl", b"", "rows.jsonl.*(empty|no rows)"),
    "other kind": ("rows.txt", LINES, "give .jsonl, .csv"),
    "misspelt": ("rows.jsonl", LINES.replace(b'"answers"', b'"answer"'), "no column 'response_j', only .*'answer'"),
    "empty question": ("rows.jsonl", LINES + b'{"question": "", "answers": ["a"]}\n', "row 201 of .* empty question"),
}


def complaint(path):
    with pytest.raises(UserError) as raised:
        read(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    return str(raised.value)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_line(name, tmp_path):
    file, raw, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(raw)
    assert re.search(message, complaint(str(tmp_path / file)))


@pytest.mark.parametrize("name", ["cut off", "not UTF-8", "not JSON", "empty", "misspelt", "empty question"])
def test_a_bad_stream_is_one_clear_line(name, tmp_path, hub_copy):
    file, raw, message = BAD_FILES[name]
    folder = tmp_path / "hub" / "data" / "rl"
    (folder / "train-00000.jsonl.gz").unlink()
    (folder / file).write_bytes(raw)
    by_row = name in ("misspelt", "empty question")
    assert re.search(message if by_row else "cannot read .*hub/data/rl: ", complaint(hub_copy))


def test_nothing_to_read(tmp_path, write_rows):
    assert "nowhere does not exist" in complaint(str(tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    assert "no .jsonl(.gz), .csv or .parquet file" in complaint(str(tmp_path / "bare"))
    assert "no question for" in complaint(write_rows(RANKED[:2]))


# Real text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "questions"), [("stackoverflow", 8996), ("stackexchange", 1680)])
def test_real_questions(folder, questions, shared_data):
    """Counts that are known of these files."""
    if not (shared_data / folder).is_dir():
        pytest.skip(f"no {folder} in {shared_data}")
    (file,) = table_files(shared_data / folder)
    parts, _ = collect([(folder, read_rows(file))], Shares().part_of, dict.fromkeys(vars(Shares())))
    texts = [keys(part) for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == questions
    margins = [pair.margin for part in parts.values() for question in part for pair in question.pairs]
    assert min(margins) >= 1 if folder == "stackexchange" else set(margins) == {0.0}
