"""Parallel text: a made-up corpus in files, and the real one where it lies beside the project."""

import gzip
import json
from pathlib import Path

import pytest

from elastic_lightning.data.tokenizers import train_bpe

SHARED = Path(__file__).parents[3] / "shared" / "data"
LANGUAGES = ("fr", "en", "de")


def sentence(language, row):
    """Row 7 says `fr7 fr7 …` in French; row r is 1 + r % 12 words long, so lengths differ."""
    return " ".join([f"{language}{row}"] * (1 + row % 12))


@pytest.fixture
def say():
    return sentence


@pytest.fixture(scope="session")
def parallel_bpe(tmp_path_factory):
    """Folder of a tokenizer for all languages of the made-up corpus."""
    folder = str(tmp_path_factory.mktemp("parallel_bpe"))
    texts = [sentence(language, row) for row in range(60) for language in LANGUAGES]
    train_bpe(texts, 400).save_pretrained(folder)
    return folder


@pytest.fixture
def aligned(tmp_path):
    """Writes the rows as aligned files `<name>.<language>[.gz]`; returns the stem."""

    def write(name="train", rows=range(60), languages=LANGUAGES, suffix=""):
        folder = tmp_path / "text"
        folder.mkdir(exist_ok=True)
        for language in languages:
            raw = "".join(sentence(language, row) + "\n" for row in rows).encode()
            path = folder / f"{name}.{language}{suffix}"
            path.write_bytes(gzip.compress(raw) if suffix == ".gz" else raw)
        return str(folder / name)

    return write


@pytest.fixture(scope="session")
def shared_data():
    if not (SHARED / "multi30k").is_dir():
        pytest.skip(f"the real corpora are not in {SHARED}")
    return SHARED


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSONL, gzipped where the name ends in .gz; returns the path."""

    def write(rows, name="questions.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return str(path)

    return write
