"""What a text of the toy world means, and whether it is English: both exact."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping

from elastic_lightning.data.toy_languages import Clause, Meaning, article_for, english, entries, french
from elastic_lightning.data.toy_lexicon import (
    ACTIONS,
    AGENTS,
    LINKS,
    LOOKS,
    PAST_TIMES,
    PLACES,
    THINGS,
    TIMES,
    TRAITS,
)

Slot = tuple[int, str]  # number of the clause, name of the slot
Reading = dict[Slot, set]  # what the words of a text fill each slot with

OF_THE_SENTENCE = ("time", "link")  # slots that count for clause 0 wherever their words stand
NEEDED = ("agent", "many", "action", "past", "thing", "things")


def parse_english(text: str) -> Meaning | None:
    """What an English sentence means, genders left out; None where it is not English."""
    return _parse(text, read_english(text), english)


def parse_french(text: str) -> Meaning | None:
    """What a French sentence means; None where it is not French."""
    return _parse(text, _read(text, _french_words()), french)


def read_english(text: str) -> Reading:
    """What the words fill the slots with, in whatever order and form they stand.

    Every word that carries meaning has a slot of its own, so this needs no grammar; a linking word begins a new clause.
    """
    return _read(text, _english_words())


def without_gender(meaning: Meaning) -> Meaning:
    """All of a meaning that English can say."""
    return meaning._replace(clauses=tuple(clause._replace(female=False) for clause in meaning.clauses))


def preserved(meaning: Meaning, text: str) -> float:
    """Share of the slots, of those that the meaning or the text fills, that both fill alike; what English can say."""
    wanted, got = read_english(english(meaning)), read_english(text)
    slots = wanted.keys() | got.keys()
    return sum(wanted.get(slot) == got.get(slot) for slot in slots) / len(slots)


def is_english(text: str, complete: bool = True) -> bool:
    """Whether `text` is an English sentence, or with `complete=False` the beginning of one."""
    return _english_automaton().accepts(text.split(), complete)


# Reading words ------------------------------------------------------------------------------------------------------


def _read(text: str, words: Mapping[str, Mapping[str, object]]) -> Reading:
    reading: Reading = defaultdict(set)
    clause = 0
    for word in text.split():
        fills = words.get(word, {})
        clause += "link" in fills
        for slot, value in fills.items():
            reading[0 if slot in OF_THE_SENTENCE else clause, slot].add(value)
    return dict(reading)


def _parse(text: str, reading: Reading, realise) -> Meaning | None:
    """The meaning of which `text` is the realisation, where there is one."""
    if any(len(values) > 1 for values in reading.values()):
        return None
    facts = {slot: next(iter(values)) for slot, values in reading.items()}
    numbers = range(2 if (0, "link") in facts else 1)
    if max((number for number, _ in facts), default=0) > numbers[-1]:
        return None
    if any((number, slot) not in facts for number in numbers for slot in NEEDED):
        return None
    clauses = tuple(
        Clause(**{slot: facts.get((number, slot), False if slot == "female" else None) for slot in Clause._fields})
        for number in numbers
    )
    meaning = Meaning(clauses, facts.get((0, "time")), facts.get((0, "link")))
    if meaning.time is not None and clauses[0].past != (meaning.time in PAST_TIMES):
        return None
    return meaning if realise(meaning) == " ".join(text.split()) else None


@functools.cache
def _english_words() -> dict[str, dict[str, object]]:
    """Word -> the slots it fills."""
    words = _Words()
    for name, entry in entries(AGENTS).items():
        words.add(entry.english[:1], agent=name, many=False)
        words.add(entry.english[1:], agent=name, many=True)
    for name, entry in entries(ACTIONS).items():
        words.add(entry.english[:2], action=name, past=False)
        words.add(entry.english[2:], action=name, past=True)
    for name, entry in entries(THINGS).items():
        words.add(entry.english[:1], thing=name, things=False)
        words.add(entry.english[1:], thing=name, things=True)
    words.add_simple(lambda entry: entry.english)
    return words.slots


@functools.cache
def _french_words() -> dict[str, dict[str, object]]:
    """Word -> the slots it fills."""
    words = _Words()
    for name, entry in entries(AGENTS).items():
        if len(entry.french) == 4:
            for number, form in enumerate(entry.french):
                words.add([form], agent=name, many=number >= 2, female=number % 2 == 1)
        else:
            words.add(entry.french[:1], agent=name, many=False)
            words.add(entry.french[1:2], agent=name, many=True)
    for name, entry in entries(ACTIONS).items():
        words.add(entry.french[:2], action=name, past=False)
        words.add(entry.french[2:], action=name, past=True)
    for name, entry in entries(THINGS).items():
        words.add(entry.french[:1], thing=name, things=False)
        words.add(entry.french[1:2], thing=name, things=True)
    words.add_simple(lambda entry: entry.french)
    return words.slots


class _Words:
    """Word -> the slots it fills, each word in one way."""

    def __init__(self) -> None:
        self.slots: dict[str, dict[str, object]] = {}

    def add(self, forms: Iterable[str], **fills: object) -> None:
        for form in forms:
            if self.slots.setdefault(form, fills) != fills:
                raise ValueError(f"{form!r} is in the lexicon twice")

    def add_simple(self, side) -> None:
        """Words of one slot each: all forms of an adjective, the last word of a phrase, the first one of a link."""
        for slot, table in (("trait", TRAITS), ("look", LOOKS)):
            for name, entry in entries(table).items():
                self.add(side(entry), **{slot: name})
        for slot, table in (("place", PLACES), ("time", TIMES)):
            for name, entry in entries(table).items():
                self.add(side(entry)[-1:], **{slot: name})
        for name, entry in entries(LINKS).items():
            self.add(side(entry)[:1], link=name)


# The English grammar as an automaton, which also knows the beginnings of sentences -----------------------------------


class _Automaton:
    """States with steps to sets of states; 0 is the first. Every state leads to a final one."""

    def __init__(self) -> None:
        self.steps: list[dict[str, set[int]]] = [defaultdict(set)]
        self.final: set[int] = set()

    def add(self, start: int, *words: Iterable[str], end: int | None = None) -> int:
        """A path from `start`, of which each step takes any of its words; returns the state it ends in."""
        for number, step in enumerate(words, start=1):
            last = number == len(words)
            target = end if last and end is not None else self.state()
            for word in step:
                self.steps[start][word].add(target)
            start = target
        return start

    def state(self) -> int:
        self.steps.append(defaultdict(set))
        return len(self.steps) - 1

    def accepts(self, words: list[str], complete: bool) -> bool:
        reached = {0}
        for word in words:
            reached = {target for state in reached for target in self.steps[state].get(word, ())}
        return bool(reached & self.final) if complete else bool(reached)


@functools.cache
def _english_automaton() -> _Automaton:
    automaton = _Automaton()
    second = automaton.state()
    for past in (False, True):
        times = [entry.english for name, entry in entries(TIMES).items() if (name in PAST_TIMES) == past]
        ends = _add_clause(automaton, 0, past)
        timed = automaton.state()
        for end in ends:
            for time in times:
                automaton.add(end, *([word] for word in time), end=timed)
        for end in [*ends, timed]:
            automaton.add(end, entries(LINKS), end=second)
        automaton.final.update(*(ends, [timed], _add_clause(automaton, second, past)))
    return automaton


def _add_clause(automaton: _Automaton, start: int, past: bool) -> list[int]:
    """A clause from `start`; returns the states in which it may end: without and with a place."""
    before_thing, after_thing, after_place = automaton.state(), automaton.state(), automaton.state()
    for many in (False, True):
        subject = automaton.state()
        _add_noun(automaton, start, AGENTS, TRAITS, many, subject)
        form = 2 if past else 0 if many else 1
        automaton.add(subject, [entry.english[form] for entry in entries(ACTIONS).values()], end=before_thing)
        _add_noun(automaton, before_thing, THINGS, LOOKS, many, after_thing)
    for entry in entries(PLACES).values():
        automaton.add(after_thing, *([word] for word in entry.english), end=after_place)
    return [after_thing, after_place]


def _add_noun(automaton: _Automaton, start: int, nouns: str, adjectives: str, many: bool, end: int) -> None:
    """Article, perhaps an adjective, and a noun."""
    forms = [entry.english[many] for entry in entries(nouns).values()]
    for article in ["some"] if many else ["a", "an"]:
        after = automaton.add(start, [article])
        agreeing = [
            [word for word in words if many or article_for(word) == article] for words in (forms, entries(adjectives))
        ]
        automaton.add(after, agreeing[0], end=end)
        automaton.add(after, agreeing[1], forms, end=end)
