"""Where questions are read from: files that are shared out by the questions' text, or the hub's ready-made parts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from elastic_lightning.data.files import at_home, is_saved, read_rows, read_saved, rows_of, stream_rows, table_files
from elastic_lightning.data.questions import Question, Shares, collect, evaluation_half, key_of
from elastic_lightning.errors import UserError

HUB_FOLDERS = {"supervised": "data/finetune", "reward": "data/reward", "rl": "data/rl"}  # of stack-exchange-paired
HUB_EVALUATION = "data/evaluation"
Splits = dict[str, list[Question]]


def read_questions(
    path: str | None, hub_id: str, part: str, shares: Shares, limit: int | None, held_out: int
) -> Splits:
    """The splits train (`limit` questions of a part), validation and test (`held_out` questions each).

    Args:
        path: file, folder of files, folder that `datasets` saved, or local copy of the hub's data set; None for the
            hub.
        hub_id: data set on the hub.
        part: supervised, reward or rl.
        shares: how files are shared out.
        limit: most questions to train on.
        held_out: most questions of validation, and of test.

    Raises:
        UserError: there is nothing to read, it is damaged, or a split stays empty.
    """
    place = None if path is None else at_home(path)
    limits = {"validation": held_out, "test": held_out}
    if place is None or (place / HUB_EVALUATION).is_dir():
        splits, left_out = _from_parts(hub_id if place is None else str(place), part, limit, limits)
    else:
        splits, left_out = _from_files(place, part, shares, {"train": limit, **limits})
    for reason, count in (+left_out).items():
        rank_zero_info(f"{count} answers or pairs {reason} are left out")
    empty = [name for name in ("train", "validation", "test") if not splits[name]]
    if empty:
        raise UserError(
            f"no question for {empty[0]} in {path or hub_id} (part {part}): give more data, or other shares"
        )
    return splits


def _from_files(place: Path, part: str, shares: Shares, limits: dict[str, int | None]) -> tuple[Splits, Counter[str]]:
    def split_of(question: str) -> str | None:
        mine = shares.part_of(question)
        return evaluation_half(question) if mine == "evaluation" else "train" if mine == part else None

    if not place.exists():
        raise UserError(f"data path {place} does not exist")
    if is_saved(place):  # its splits are shared out like files
        saved = ((f"{place} ({split})", table) for split, table in read_saved(place).items())
        return collect(((name, rows_of(table, name)) for name, table in saved), split_of, limits)
    if not place.is_file() and not place.is_dir():
        raise UserError(f"data path {place} is neither a file nor a folder")
    files = [place] if place.is_file() else table_files(place)
    if not files:
        raise UserError(f"no .jsonl(.gz), .csv or .parquet file in {place}, and no folder {HUB_EVALUATION}")
    return collect(((str(file), read_rows(file)) for file in files), split_of, limits)


def _from_parts(name: str, part: str, limit: int | None, limits: dict[str, int]) -> tuple[Splits, Counter[str]]:
    """The hub's data set has a folder for each part; held-out questions are kept out of training all the same."""

    def stream(folder):
        return [(f"{name}/{folder}", stream_rows(name, folder))]

    train, left_out = collect(stream(HUB_FOLDERS[part]), lambda _: "train", {"train": limit})
    held_out, left_out_too = collect(stream(HUB_EVALUATION), evaluation_half, limits)
    measured = {key_of(question.text) for split in held_out.values() for question in split}
    kept = [question for question in train["train"] if key_of(question.text) not in measured]
    return {"train": kept, **held_out}, left_out + left_out_too
