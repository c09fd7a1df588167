"""Reading tables of text from the hub or from files, through `datasets`, with errors that say what to change."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_lightning.data.nesting import check_nesting
from elastic_lightning.errors import UserError
from elastic_lightning.policies.reading import hub_offline

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")


def read_splits(path: str | Path) -> dict[str, Dataset]:
    """Read a folder of ``train.*``, ``test.*`` (and ``validation.*`` or ``dev.*``) files, or one file, which becomes
    "train".

    A split may lie in several files, as ``train-00000-of-00002.parquet``.

    JSONL, CSV (both also gzipped) and Parquet; or a folder that `datasets` wrote with ``save_to_disk``.

    Raises:
        UserError: nothing there that can be read.
    """
    path = at_home(path)
    if not path.exists():
        raise UserError(f"data path {path} does not exist")
    if path.is_file():
        return {"train": read_table(path)}
    if not path.is_dir():
        raise UserError(f"data path {path} is neither a file nor a folder")
    if is_saved(path):
        return read_saved(path)
    files: dict[str, list[Path]] = {}
    for file in table_files(path):
        if _stem(file) in SPLIT_NAMES:
            files.setdefault(SPLIT_NAMES[_stem(file)], []).append(file)
    for split, parts in files.items():
        if len(parts) > 1 and not all("-of-" in part.name for part in parts):
            raise UserError(f"{path} holds {parts[0].name} and {parts[1].name}, both {split}: keep one of them")
    if "train" not in files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise UserError(f"no train.jsonl(.gz), train.csv or train.parquet in {path}; it holds {found}")
    return {split: read_tables(parts) for split, parts in files.items()}


def at_home(path: str | Path) -> Path:
    """A path whose ``~`` stands for a home folder.

    Raises:
        UserError: nobody has that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no user of that name has a home folder here") from error


def table_files(folder: Path) -> list[Path]:
    """The files of a folder that `read_table` reads, in the order of their names."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and _kind(file)]


def read_table(file: Path) -> Dataset:
    """Read one file of JSONL, CSV (both also gzipped) or Parquet.

    Raises:
        UserError: it cannot be read, or holds no rows.
    """
    import datasets

    kind = _kind(file)
    if kind is None:
        raise UserError(f"cannot read {file}: give .jsonl, .csv (both also .gz) or .parquet")
    pattern = one_file(file)
    _check(file)
    log = datasets.utils.logging
    level = log.get_verbosity()
    try:
        log.set_verbosity(log.CRITICAL)  # it prints the traceback of what it raises
        data = datasets.load_dataset(kind, data_files=pattern, split="train")
    except Exception as error:
        raise UserError(f"cannot read {file} as {kind}: {_cause(error)}; is it empty or damaged?") from error
    finally:
        log.set_verbosity(level)
    if len(data) == 0:
        raise UserError(f"{file} holds no rows")
    return data


def one_file(file: Path) -> str:
    """A path as the pattern by which `datasets` finds this file and no other.

    Raises:
        UserError: it cannot be said in a pattern.
    """
    if "::" in str(file):
        raise UserError(f"cannot read {file}: `datasets` takes '::' in a path for a chain of file systems; rename it")
    return glob.escape(str(file))


def read_tables(files: list[Path]) -> Dataset:
    """The rows of several files one after the other."""
    from datasets import concatenate_datasets

    return concatenate_datasets([read_table(file) for file in files])


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of such a file, one by one.

    Raises:
        UserError: it cannot be read, or holds no rows.
    """
    yield from rows_of(read_table(file), str(file))


def rows_of(table: Dataset, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table, one by one; `name` is for the message of a `UserError` where it is not UTF-8."""
    try:
        for chunk in table.iter(batch_size=1000):
            for values in zip(*chunk.values(), strict=True):
                yield dict(zip(chunk, values, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{name} holds text that is not UTF-8: convert the file") from error


def read_hub(name: str, option: str = "data.init_args.path") -> dict[str, Dataset]:
    """Read a data set from the hub.

    Raises:
        UserError: it cannot be reached; the message names the `option` to give for local files.
    """
    import datasets

    if hub_offline():
        datasets.config.HF_HUB_OFFLINE = True  # look at once for what was downloaded before
    try:
        return dict(datasets.load_dataset(name))
    except Exception as error:
        raise UserError(
            f"cannot fetch the data set {name!r} from the hub ({type(error).__name__}); "
            f"for local files give {option}: a folder with train.jsonl(.gz) and test.jsonl(.gz)"
        ) from error


def stream_rows(name: str, folder: str, option: str = "data.init_args.path") -> Iterator[dict[str, Any]]:
    """The rows below one folder of a data set on the hub, or of a local copy of it, read one by one as they are needed.

    Raises:
        UserError: it cannot be reached or read; the message names the `option` to give for local files.
    """
    import datasets

    local = at_home(name)
    if local.is_dir():
        yield from _stream_folder(local / folder)
        return
    if hub_offline():
        datasets.config.HF_HUB_OFFLINE = True  # look at once for what was downloaded before
    try:
        yield from datasets.load_dataset(name, data_dir=folder, split="train", streaming=True)
    except Exception as error:
        raise UserError(
            f"cannot read {folder} of the data set {name!r} from the hub ({_cause(error)}); for local files give "
            f"{option}"
        ) from error


def _stream_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of all files below a folder, in the order of their names, read as they are needed."""
    import datasets

    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and _kind(file)]
    if not files:
        raise UserError(f"cannot read {folder}: no .jsonl(.gz), .csv or .parquet file in it; is it empty?")
    for file in files:
        _check(file)
        try:
            yield from datasets.load_dataset(_kind(file), data_files=one_file(file), split="train", streaming=True)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"cannot read {folder}: {file.name}: {_cause(error)}; is it empty or damaged?") from error


def column(data: Dataset, name: str, option: str) -> list:
    """One column as a list.

    Raises:
        UserError: it is not there (the message lists those that are and names the `option` to set), or is not UTF-8.
    """
    if name not in data.column_names:
        raise UserError(f"the data has no column {name!r}, only {data.column_names}; set {option}")
    try:
        return list(data[name])
    except UnicodeDecodeError as error:
        raise UserError(f"the column {name!r} holds text that is not UTF-8: convert the file") from error


def text_column(data: Dataset, name: str, option: str) -> list[str | None]:
    """`column`, of texts.

    Raises:
        UserError: see `column`; or it holds something else.
    """
    values = column(data, name, option)
    other = next((value for value in values if not isinstance(value, str | None)), None)
    if other is not None:
        raise UserError(f"the column {name!r} holds {str(other)[:50]!r}, which is no text; set {option}")
    return values


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `datasets` writes with ``save_to_disk``."""
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def read_saved(folder: Path) -> dict[str, Dataset]:
    """The splits of such a folder; "train" where it has none.

    Raises:
        UserError: it is damaged.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"cannot read {folder} as a folder of `datasets` ({type(error).__name__})") from error
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _check(file: Path) -> None:
    """What would end the process, and not with an exception."""
    if _kind(file) == "json":
        check_nesting(file)


def _stem(file: Path) -> str:
    return file.name.split(".")[0].split("-")[0]


def _cause(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{error.__cause__ or error}".strip().split("\n")[0][:200] or type(error).__name__


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return LOADERS.get(suffixes[-1]) if suffixes else None
