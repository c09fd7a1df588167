"""Reading tables of text from the hub or from files, through `datasets`, with errors that say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elastic_lightning.errors import UserError
from elastic_lightning.policies.loading import hub_offline

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLIT_NAMES = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}


def read_splits(path: str | Path) -> dict[str, Dataset]:
    """Read a folder of ``train.*``, ``test.*`` (and ``validation.*``) files, or one file, which becomes "train".

    JSONL, CSV (both also gzipped) and Parquet; or a folder that `datasets` wrote with ``save_to_disk``.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"data path {path} does not exist")
    if path.is_file():
        return {"train": _read(path)}
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _read_saved(path)
    files = {
        SPLIT_NAMES[_stem(file)]: file for file in sorted(path.iterdir()) if _stem(file) in SPLIT_NAMES and _kind(file)
    }
    if "train" not in files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise UserError(f"no train.jsonl(.gz), train.csv or train.parquet in {path}; it holds {found}")
    return {split: _read(file) for split, file in files.items()}


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


def column(data: Dataset, name: str, option: str) -> list:
    """One column as a list.

    Raises:
        UserError: it is not there, where the message lists those that are and names the `option` to set; or it is not
            UTF-8.
    """
    if name not in data.column_names:
        raise UserError(f"the data has no column {name!r}, only {data.column_names}; set {option}")
    try:
        return list(data[name])
    except UnicodeDecodeError as error:  # text is decoded where it is read, not where the file is
        raise UserError(f"the column {name!r} holds text that is not UTF-8: convert the file") from error


def _read(file: Path) -> Dataset:
    import datasets

    kind = _kind(file)
    if kind is None:
        raise UserError(f"cannot read {file}: give .jsonl, .csv (both also .gz) or .parquet")
    log = datasets.utils.logging
    level = log.get_verbosity()
    try:
        log.set_verbosity(log.CRITICAL)  # it prints the traceback of what it raises
        data = datasets.load_dataset(kind, data_files=str(file), split="train")
    except Exception as error:
        cause = f"{error.__cause__ or error}".strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"cannot read {file} as {kind}: {cause}; is it empty or damaged?") from error
    finally:
        log.set_verbosity(level)
    if len(data) == 0:
        raise UserError(f"{file} holds no rows")
    return data


def _read_saved(folder: Path) -> dict[str, Dataset]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"cannot read {folder} as a folder of `datasets` ({type(error).__name__})") from error
    return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _stem(file: Path) -> str:
    return file.name.split(".")[0].split("-")[0]


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix != ".gz"]
    return LOADERS.get(suffixes[-1]) if suffixes else None
