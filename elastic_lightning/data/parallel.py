"""Reading parallel text: aligned plain text files, TSV files, tables of `datasets`, the hub."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from elastic_lightning.data.corpus import Corpus
from elastic_lightning.data.files import at_home, column, read_hub, read_splits
from elastic_lightning.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


HEADERS = {"source", "target", "src", "tgt", "trg"}  # what a header calls columns beside the languages' names


@dataclass(frozen=True)
class ParallelText:
    """Where parallel text lies. Languages go by the names that files or columns give them: fr, en, de.

    Attributes:
        path: one of these, or a list of them, which are joined:
            the stem of aligned text files, e.g. ``multi30k/train`` for ``train.fr[.gz]`` beside ``train.en[.gz]``;
            a ``.tsv[.gz]`` file, whose languages are in `columns`; a first line that names them is no sentence;
            a table (.jsonl, .csv, .parquet) or a folder of them, with a column a language, or one column
            ``translation`` of dicts by language;
            a folder that `datasets` wrote with ``save_to_disk``, or an id on the hub.
        columns: languages of a TSV's first columns, e.g. ``[en, fr]``; further columns are ignored.
        split: which one of a folder's or of the hub's splits.
    """

    path: str | list[str]
    columns: list[str] | None = None
    split: str = "train"


def read_parallel(text: ParallelText, languages: Sequence[str]) -> Corpus:
    """Read these languages; files of other languages are not opened.

    Raises:
        UserError: a file is missing or damaged, or the languages' rows do not match.
    """
    paths = [text.path] if isinstance(text.path, str) else text.path
    parts = [_read(path, text, languages) for path in paths]
    return {language: [sentence for part in parts for sentence in part[language]] for language in languages}


def read_lines(file: Path, most: int | None = None) -> list[str]:
    """The lines of a UTF-8 text file, gzipped where its name ends in ``.gz``. Only a line feed ends a line.

    Args:
        file: to be read whole.
        most: bytes, unpacked; all by default, but then the file must not be a device, which may have no end.

    Raises:
        UserError: the file is missing, damaged, empty, too long or in another encoding.
    """
    if most is None and file.is_char_device():
        raise UserError(f"cannot read {file}: it is a device, not a file")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            raw = stream.read(-1 if most is None else most + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"cannot read {file}: its gzip stream is damaged or cut off; fetch the file again") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    if most is not None and len(raw) > most:
        raise UserError(f"{file} holds more than {most // 2**20} MiB: cut it into parts")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: this is not UTF-8; convert the file") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{file} holds no rows")
    return lines


def _read(path: str, text: ParallelText, languages: Sequence[str]) -> Corpus:
    place = at_home(path)
    if place.name.removesuffix(".gz").endswith(".tsv"):
        return _read_tsv(place, text.columns, languages)
    for stem in (place, place / text.split):
        if any(_side(stem, language) for language in languages):
            return _read_aligned(stem, languages)
    if place.exists():
        return _read_table(read_splits(place), path, text.split, languages)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or (place.parent != Path() and place.parent.is_dir()):
        wanted = " or ".join(f"{place.name}.{language}" for language in languages)
        raise UserError(f"there is no {place}, and no {wanted} (.gz) beside it")
    hub = read_hub(path, "the path of data's corpus")
    return _read_table(hub, path, text.split, languages)


def _side(stem: Path, language: str) -> Path | None:
    """The file of one language: plain or gzipped."""
    files = [stem.parent / f"{stem.name}.{language}{suffix}" for suffix in ("", ".gz")]
    return next((file for file in files if file.is_file()), None)


def _read_aligned(stem: Path, languages: Sequence[str]) -> Corpus:
    files = {language: _side(stem, language) for language in languages}
    missing = [language for language, file in files.items() if file is None]
    if missing:
        found = ", ".join(file.name for file in files.values() if file is not None)
        raise UserError(f"no {stem}.{missing[0]} or {stem}.{missing[0]}.gz beside {found}")
    corpus = {language: read_lines(file) for language, file in files.items()}
    first, *others = languages
    for language in others:
        if len(corpus[language]) != len(corpus[first]):
            raise UserError(
                f"{files[first]} has {len(corpus[first])} lines and {files[language].name} {len(corpus[language])}: "
                "aligned files hold the same sentence in the same line"
            )
    return corpus


def _read_tsv(file: Path, columns: list[str] | None, languages: Sequence[str]) -> Corpus:
    if columns is None or not set(languages) <= set(columns):
        raise UserError(
            f"say which languages the columns of {file.name} are: `columns`, such as [en, fr], must hold "
            f"{' and '.join(languages)}, and is {columns}"
        )
    cells = [line.split("\t") for line in read_lines(file)]
    if _is_header(cells[0], columns):
        rank_zero_info(f"{file}: the first line names the columns, and is left out")
        cells = cells[1:]
    for number, row in enumerate(cells, start=1):
        if len(row) < len(columns):
            raise UserError(f"{file}, line {number}: {len(row)} column(s) where {', '.join(columns)} were expected")
    return {language: [row[columns.index(language)] for row in cells] for language in languages}


def _read_table(splits: dict[str, Dataset], path: str, split: str, languages: Sequence[str]) -> Corpus:
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}, only {', '.join(splits)}; set `split`")
    table = splits[split]
    if "translation" in table.column_names:  # the layout of WMT, IWSLT and OPUS: one column of a dict a row
        corpus = _of_dicts(column(table, "translation", ""), path, languages)
    else:
        corpus = {language: column(table, language, "the columns' names to the languages'") for language in languages}
    for language, texts in corpus.items():
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"the column {language!r} of {path} holds other things than text: drop those rows")
    return corpus


def _of_dicts(rows: list, path: str, languages: Sequence[str]) -> Corpus:
    known = {*languages}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not known <= row.keys():
            held = sorted(row) if isinstance(row, dict) else row
            raise UserError(f"row {number} of {path}: the translation must hold {', '.join(languages)}, got {held}")
    return {language: [row[language] for row in rows] for language in languages}


def _is_header(cells: list[str], columns: list[str]) -> bool:
    """Whether the first line of a TSV names its columns, all of them."""
    names = {cell.strip().casefold() for cell in cells[: len(columns)]}
    return names <= {*map(str.casefold, columns), *HEADERS}
