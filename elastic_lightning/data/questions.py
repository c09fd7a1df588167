"""Questions with better and worse answers: the layouts they come in, and parts of them that share no question."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from elastic_lightning.errors import UserError

Row = Mapping[str, Any]
LAYOUTS = "question, response_j, response_k (better and worse) and perhaps score_j, score_k; or question, answers"


class AnswerPair(NamedTuple):
    """Two answers to a question; `margin` is by how much the better one scored more, 0 where the data has no scores."""

    better: str
    worse: str
    margin: float = 0.0


Reader = Callable[[Row, str, Counter[str]], tuple[list[str], list[AnswerPair]]]


@dataclass
class Question:
    """A question, its good answers (each better than another one, or the only one) and what was preferred to what."""

    text: str
    answers: list[str] = field(default_factory=list)
    pairs: list[AnswerPair] = field(default_factory=list)

    def add(self, answers: Iterable[str], pairs: Iterable[AnswerPair]) -> None:
        """What another row says of the same question."""
        self.answers += [answer for answer in dict.fromkeys(answers) if answer not in self.answers]
        self.pairs += [pair for pair in dict.fromkeys(pairs) if pair not in self.pairs]


@dataclass(frozen=True)
class Shares:
    """How the questions of one source are shared out among the stages; the shares sum to 1.

    Attributes:
        supervised: for supervised fine-tuning.
        reward: for the reward model.
        rl: for reinforcement learning.
        evaluation: held out of all three; one half of it validates, the other one tests.
    """

    supervised: float = 0.4
    reward: float = 0.3
    rl: float = 0.2
    evaluation: float = 0.1

    def __post_init__(self) -> None:
        shares = vars(self)
        if min(shares.values()) < 0 or self.evaluation == 0 or not math.isclose(sum(shares.values()), 1):
            raise UserError(f"data's shares must be 0 or more, evaluation above 0, and sum to 1, got {shares}")

    def part_of(self, question: str) -> str:
        """The part that a question belongs to: a function of its text alone, so all stages and all seeds agree."""
        place, end = position(question), 0.0
        for part, share in vars(self).items():
            end += share
            if place < end:
                return part
        return "evaluation"


def key_of(question: str) -> str:
    """What makes two questions the same: the text, whatever its white space and case."""
    return " ".join(question.split()).casefold()


def position(question: str) -> float:
    """A place in [0, 1) that is drawn from the question's text."""
    return int.from_bytes(_digest(question)[:8], "big") / 2**64


def evaluation_half(question: str) -> str:
    """Which half of the held-out questions this one is in; independent of its `position`."""
    return "test" if _digest(question)[-1] % 2 else "validation"


def collect(
    tables: Iterable[tuple[str, Iterable[Row]]],
    split_of: Callable[[str], str | None],
    limits: Mapping[str, int | None],
) -> tuple[dict[str, list[Question]], Counter[str]]:
    """The first so many questions of each split, in the order of the rows; equal questions become one.

    Reading stops at the first new question after all splits are full: a question whose rows lie further apart loses
    the later ones.

    Args:
        tables: what messages call each, and its rows in one of the two layouts.
        split_of: the split that a question's text belongs to, or None for none of these.
        limits: questions of each split; None for all.

    Returns:
        the questions of each split, and how many rows or answers were left out for each reason.

    Raises:
        UserError: a column is missing, or a row does not hold what it should.
    """
    found: dict[str, dict[str, Question]] = {split: {} for split in limits}
    left_out: Counter[str] = Counter()
    for place, row, read in _rows(tables):
        text = _text(row, "question", place)
        if not text:
            raise UserError(f"{place} has an empty question: drop that row")
        split, key = split_of(text), key_of(text)
        if split is None:
            continue
        if key not in found[split]:
            if all(_full(found[name], limit) for name, limit in limits.items()):
                break
            if _full(found[split], limits[split]):
                continue
            found[split][key] = Question(text)
        found[split][key].add(*read(row, place, left_out))
    return {split: list(questions.values()) for split, questions in found.items()}, left_out


def _rows(tables: Iterable[tuple[str, Iterable[Row]]]) -> Iterator[tuple[str, Row, Reader]]:
    """Where each row lies, the row, and how to read its answers."""
    for source, rows in tables:
        read = None
        for number, row in enumerate(rows, start=1):
            read = read or _layout(row, source)
            yield f"row {number} of {source}", row, read


def _full(questions: dict[str, Question], limit: int | None) -> bool:
    return limit is not None and len(questions) >= limit


def _layout(row: Row, source: str) -> Reader:
    """How to read the answers of rows with these columns."""
    columns = set(row)
    if {"question", "response_j", "response_k"} <= columns:
        return _read_pair
    if {"question", "answers"} <= columns:
        return _read_ranked
    wanted = ("question", "answers") if "answers" in columns else ("question", "response_j", "response_k")
    missing = next(name for name in wanted if name not in columns)
    raise UserError(f"{source} has no column {missing!r}, only {sorted(columns)}; its rows must hold {LAYOUTS}")


def _read_pair(row: Row, place: str, left_out: Counter[str]) -> tuple[list[str], list[AnswerPair]]:
    better, worse = (_text(row, name, place) for name in ("response_j", "response_k"))
    margin = _margin(row, place)
    if not better or not worse:
        left_out["with an empty answer"] += 1
    elif better == worse:
        left_out["of two equal answers"] += 1
    else:
        return [better], [AnswerPair(better, worse, margin)]
    return [better] if better else [], []


def _read_ranked(row: Row, place: str, left_out: Counter[str]) -> tuple[list[str], list[AnswerPair]]:
    given = row.get("answers")
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
        raise UserError(f"{place}: answers must be a list of texts, best first")
    ranked = [answer.strip() for answer in given]
    answers = list(dict.fromkeys(answer for answer in ranked if answer))
    left_out["with an empty answer"] += sum(not answer for answer in ranked)
    return answers[:1], [AnswerPair(answers[0], worse) for worse in answers[1:]]


def _text(row: Row, name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} must be text, got {str(value)[:50]}")
    return value.strip()


def _margin(row: Row, place: str) -> float:
    if "score_j" not in row or "score_k" not in row:
        return 0.0
    scores = (row["score_j"], row["score_k"])
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise UserError(f"{place}: score_j and score_k must be numbers, got {scores[0]} and {scores[1]}")
    if scores[0] < scores[1]:
        raise UserError(
            f"{place}: score_j {scores[0]} is below score_k {scores[1]}; response_j is to be the better one"
        )
    return float(scores[0] - scores[1])


def _digest(question: str) -> bytes:
    return hashlib.sha256(key_of(question).encode("utf-8", "surrogatepass")).digest()
