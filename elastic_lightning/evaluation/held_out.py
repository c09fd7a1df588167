"""Held-out texts and questions, read from files, as documents to score and prompts to answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from elastic_lightning.data.dialogue import QuestionAnswer
from elastic_lightning.data.files import column, read_splits, read_table, table_files
from elastic_lightning.data.questions import Shares, evaluation_half
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.perplexity import Document

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
) -> list[Document]:
    """Documents of a file: the column `name` of a table, its questions with their best answers, or a plain text as one.

    Of a question with an answer, the answer's tokens are scored and the question is context. The tokenizer's own token
    at the beginning of a text (Llama's has one) stands before each; an end of text is not scored.

    Args:
        path: JSONL, CSV (both also gzipped), Parquet, or anything else as plain text; with `shares` a folder of such
            tables too.
        tokenizer: of the model that will read them.
        name: of the column; where there is none, `question` and `answers` or `response_j`.
        limit: only the first so many rows.
        shares: of a file of questions that stages share: read those alone that are held out for a test.

    Raises:
        UserError: no such file, or nothing in it that can be read.
    """
    if _is_plain_text(path):
        return [Document(encode(tokenizer, _read_text(path)))]
    table = _table(path, limit, shares)
    if name in table.column_names:
        return [Document(encode(tokenizer, text)) for text in column(table, name, "texts.column") if text]
    answers = next((known for known in ANSWERS if known in table.column_names), None)
    if "question" not in table.column_names or answers is None:
        raise UserError(
            f"{path} has no column {name!r}, nor questions with {' or '.join(ANSWERS)}, only {table.column_names}: "
            "set texts.column"
        )
    pairs = zip(table["question"], map(_best, table[answers]), strict=True)
    return [_answered(tokenizer, question, answer) for question, answer in pairs if answer]


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
    texts = [text for text in column(_table(path, limit, shares), name, "questions.column") if text]
    if not texts:
        raise UserError(f"{path} holds no text in its column {name!r}")
    before, after = template.split("{}")
    return [before + text + after for text in texts]


def _table(path: str | Path, limit: int | None, shares: Shares | None) -> Dataset:
    table = read_splits(path)["train"] if shares is None else _all_tables(Path(path))
    rows = range(len(table))
    if shares is not None:
        questions = column(table, "question", "shares: null")
        rows = [row for row in rows if shares.part_of(questions[row]) == "evaluation"]
        rows = [row for row in rows if evaluation_half(questions[row]) == "test"]
        if not rows:
            raise UserError(f"{path} holds no question for a test: give more data, or other shares")
    return table.select(rows[:limit])


def _all_tables(path: Path) -> Dataset:
    """A file, or all files of a folder one after the other, as stages that share them read them."""
    from datasets import concatenate_datasets

    if not path.is_dir():
        return read_splits(path)["train"]
    files = table_files(path)
    if not files:
        raise UserError(f"no .jsonl(.gz), .csv or .parquet file in {path}")
    return concatenate_datasets([read_table(file) for file in files])


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with what the tokenizer puts before a text, and without an end of text after it."""
    tokens = tokenizer(text, verbose=False)["input_ids"]
    return tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens


def _answered(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Document:
    whole = encode(tokenizer, DIALOGUE.text(question, answer))
    before = encode(tokenizer, DIALOGUE.prompt(question))
    # The tokens of the prompt are the first of the whole, but for the last one where the answer's first joins it.
    same = next((i for i, (one, two) in enumerate(zip(whole, before, strict=False)) if one != two), len(before))
    return Document(whole, same)


def _best(answers: Any) -> str | None:
    return answers if isinstance(answers, str) else next(iter(answers or ()), None)


def _is_plain_text(path: str | Path) -> bool:
    return Path(path).is_file() and not {".jsonl", ".json", ".csv", ".parquet"} & set(Path(path).suffixes)


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text in {path}: {error}") from error
