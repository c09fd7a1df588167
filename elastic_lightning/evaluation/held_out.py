"""Held-out texts and questions, read from files, as documents to score and prompts to answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from elastic_lightning.data.dialogue import QuestionAnswer
from elastic_lightning.data.files import (
    at_home,
    is_saved,
    read_saved,
    read_splits,
    read_tables,
    table_files,
    text_column,
)
from elastic_lightning.data.question_sources import HUB_EVALUATION
from elastic_lightning.data.questions import Shares, evaluation_half, key_of
from elastic_lightning.data.reviews import pack
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.perplexity import Document
from elastic_lightning.policies.special_tokens import encode_open

if TYPE_CHECKING:
    from datasets import Dataset

DIALOGUE = QuestionAnswer()
QUESTION = DIALOGUE.prompt("{}")
ANSWERS = ("answers", "response_j")  # the best first, or the better one of a pair


def read_documents(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "text",
    limit: int | None = None,
    shares: Shares | None = None,
    block: int | None = None,
) -> list[Document]:
    """Documents of a file: the column `name` of a table, its questions with their best answers, or a plain text as one.

    Of a question with an answer, the answer's tokens are scored and the question is context. The tokenizer's own token
    at the beginning of a text (Llama's has one) stands before each; an end of text is not scored.

    Args:
        path: JSONL, CSV (both also gzipped), Parquet, or anything else as plain text; with `shares` a folder of such
            tables too.
        tokenizer: of the model that will read them.
        name: of the column; where there is none, `question` and `answers` or `response_j`.
        limit: only the first so many rows; of questions, each once, so many questions.
        shares: of a file of questions that stages share: read those alone that are held out for a test.
        block: not one document a text, but blocks of so many tokens as data modules pack them for a validation: texts
            end to end with an end of text after each, all scored.

    Raises:
        UserError: no such file, or nothing in it that can be read.
    """
    if _is_plain_text(path):
        return _documents(tokenizer, [_read_text(path)], block)
    table = _table(path, shares)
    if name in table.column_names:
        texts = text_column(table.select(range(min(limit or len(table), len(table)))), name, "texts.column")
        return _documents(tokenizer, [text for text in texts if text], block)
    answers = next((known for known in ANSWERS if known in table.column_names), None)
    if "question" not in table.column_names or answers is None:
        raise UserError(
            f"{path} has no column {name!r}, nor questions with {' or '.join(ANSWERS)}, only {table.column_names}: "
            "set texts.column"
        )
    answered: dict[str, tuple[str, str]] = {}  # rows of pairs hold a question once for each of its pairs
    questions = text_column(table, "question", "texts.column")
    for question, answer in zip(questions, map(_best, table[answers]), strict=True):
        if question and answer:
            answered.setdefault(key_of(question), (question, answer))
    pairs = [*answered.values()][:limit]
    if block is not None:
        return _documents(tokenizer, [DIALOGUE.text(*pair) for pair in pairs], block)
    return [_answered(tokenizer, *pair) for pair in pairs]


def read_prompts(
    path: str | Path,
    name: str = "question",
    template: str = QUESTION,
    limit: int | None = None,
    shares: Shares | None = None,
) -> list[str]:
    """Prompts of a table: `template` with each text of the column `name` in the place of ``{}``; see `read_documents`.

    Raises:
        UserError: no such file or column, or no prompt in it.
    """
    if template.count("{}") != 1:
        raise UserError(f"questions.template must hold {{}} once, for the text of the column, got {template!r}")
    first: dict[str, str] = {}
    for text in text_column(_table(path, shares), name, "questions.column"):
        if text:
            first.setdefault(key_of(text), text)
    texts = [*first.values()][:limit]
    if not texts:
        raise UserError(f"{path} holds no text in its column {name!r}")
    before, after = template.split("{}")
    return [before + text + after for text in texts]


def _table(path: str | Path, shares: Shares | None) -> Dataset:
    """The rows to measure on: of a file or folder all, or where stages share them those held out for a test."""
    place = at_home(path)
    if (place / HUB_EVALUATION).is_dir():  # a local copy of the hub's data set has a part for it
        return _all_tables(place / HUB_EVALUATION)
    table = _all_tables(place) if shares is not None else _test_tables(place)
    if shares is not None:
        questions = text_column(table, "question", "shares: null")
        rows = [row for row in range(len(table)) if shares.part_of(questions[row]) == "evaluation"]
        rows = [row for row in rows if evaluation_half(questions[row]) == "test"]
        if not rows:
            raise UserError(f"{path} holds no question for a test: give more data, or other shares")
        table = table.select(rows)
    return table


def _test_tables(path: Path) -> Dataset:
    """A file, or the files of a folder: of those that are named after splits the test's alone."""
    if not path.is_dir():
        return _all_tables(path)
    if is_saved(path):
        splits = read_saved(path)
        return splits.get("test", splits["train"])
    tests = [file for file in table_files(path) if file.name.split(".")[0].split("-")[0] == "test"]
    return read_tables(tests) if tests else _all_tables(path)


def _all_tables(path: Path) -> Dataset:
    """A file, or all files of a folder one after the other, as stages that share them read them."""
    if not path.is_dir():
        return read_splits(path)["train"]
    if is_saved(path):
        from datasets import concatenate_datasets

        return concatenate_datasets([*read_saved(path).values()])
    files = table_files(path)
    if not files:
        raise UserError(f"no .jsonl(.gz), .csv or .parquet file in {path}")
    return read_tables(files)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with what the tokenizer puts before a text, and nothing after it."""
    return encode_open(tokenizer, [text])[0]


def _documents(tokenizer: PreTrainedTokenizerBase, texts: list[str], block: int | None) -> list[Document]:
    if block is None:
        return [Document(encode(tokenizer, text)) for text in texts]
    return [Document(row) for row in pack(tokenizer, texts, block).tolist()]


def _answered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Document:
    whole = encode(tokenizer, DIALOGUE.text(question, answer))
    before = encode(tokenizer, DIALOGUE.prompt(question))
    # The tokens of the prompt are the first of the whole, but for the last one where the answer's first joins it.
    same = next((i for i, (one, two) in enumerate(zip(whole, before, strict=False)) if one != two), len(before))
    return Document(whole, same)


def _best(answers: Any) -> str | None:
    given = [answers] if isinstance(answers, str) else answers or []
    return next((answer for answer in given if isinstance(answer, str) and answer.strip()), None)


def _is_plain_text(path: str | Path) -> bool:
    return Path(path).is_file() and not {".jsonl", ".json", ".csv", ".parquet"} & set(Path(path).suffixes)


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text in {path}: {error}") from error
