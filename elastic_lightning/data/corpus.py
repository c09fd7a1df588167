"""What is done to parallel text before a model sees it: cleaning, choosing rows, and splits that share no sentence."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from elastic_lightning.errors import UserError

Corpus = dict[str, list[str]]  # language -> sentences; the sentences of a row say the same in every language


def rows(corpus: Corpus) -> int:
    """Number of rows."""
    return len(next(iter(corpus.values())))


def take(corpus: Corpus, indices: Sequence[int]) -> Corpus:
    """The rows of these indices, in their order."""
    return {language: [sentences[index] for index in indices] for language, sentences in corpus.items()}


def in_languages(corpus: Corpus, *languages: str) -> Corpus:
    """These languages alone; nothing of the others is kept."""
    return {language: corpus[language] for language in languages}


def cleaned(corpus: Corpus, lower_case: bool = False) -> Corpus:
    """White space as single spaces; rows of which a side is empty are left out."""
    spaced = {language: [" ".join(text.split()) for text in texts] for language, texts in corpus.items()}
    if lower_case:
        spaced = {language: [text.lower() for text in texts] for language, texts in spaced.items()}
    return take(spaced, [row for row, sides in enumerate(zip(*spaced.values(), strict=True)) if all(sides)])


def with_words(corpus: Corpus, language: str, words: int) -> Corpus:
    """The rows with so many words or more, divided by white space, in `language`."""
    return take(corpus, [row for row, text in enumerate(corpus[language]) if len(text.split()) >= words])


def some_of(corpus: Corpus, number: int | None, seed: int) -> Corpus:
    """`number` rows at random, in the order of the corpus; all of them where it has no more."""
    if number is None or rows(corpus) <= number:
        return corpus
    return take(corpus, sorted(random.Random(seed).sample(range(rows(corpus)), number)))


def cut_out(corpus: Corpus, language: str, sizes: Sequence[int], seed: int) -> list[Corpus]:
    """The corpus without some sentences of `language`, then parts that hold `sizes` of them, one row each.

    No sentence of `language` is in two of the results, whatever its case.

    Raises:
        UserError: there are too few different sentences.
    """
    first: dict[str, int] = {}
    for row, text in enumerate(corpus[language]):
        first.setdefault(_key(text), row)
    if len(first) <= sum(sizes):
        raise UserError(
            f"the corpus has {len(first)} different sentences in {language!r}: too few to hold out {sum(sizes)}; "
            "lower data's eval_pairs or give data's corpora.validation"
        )
    chosen = random.Random(seed).sample(list(first.values()), sum(sizes))
    parts, start = [], 0
    for size in sizes:
        parts.append(take(corpus, chosen[start : start + size]))
        start += size
    return [without(corpus, language, (text for part in parts for text in part[language])), *parts]


def without(corpus: Corpus, language: str, texts: Iterable[str]) -> Corpus:
    """The rows whose sentence in `language` is none of `texts`, whatever its case."""
    held_out = {_key(text) for text in texts}
    return take(corpus, [row for row, text in enumerate(corpus[language]) if _key(text) not in held_out])


def _key(text: str) -> str:
    return text.casefold()
