"""A small trilingual world: one meaning, said in a French, an English and a German that are known exactly.

A meaning is one clause or two, each with an agent, an action and a thing, perhaps with a trait, a look and a place, and
perhaps a time for the first. Each language has its own order and agreement: French puts the time first and adjectives
last and inflects them; English is strict about a/an, number and tense; German puts its verb second, its participle
last, after "weil" both at the end, and has three genders and two cases. What is in a language is exactly what can be
said in it, so whether a text is English, and what it means, is known and not estimated.

Some agents have a gender that French and German must say and English cannot (voisin, voisine: neighbour). A sender that
is rewarded for the German is tempted to say it anyhow, and then it no longer speaks English: that is language drift.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from elastic_lightning.data.corpus import Corpus
from elastic_lightning.data.toy_lexicon import (
    ACTIONS,
    AGENTS,
    LINKS,
    LOOKS,
    PAST_TIMES,
    PLACES,
    SUBORDINATE,
    THINGS,
    TIMES,
    TRAITS,
)


class Clause(NamedTuple):
    """Who does what to which thing; fillers go by their English names. `female` counts where `agent` leaves it open."""

    agent: str
    female: bool
    many: bool
    trait: str | None
    action: str
    past: bool
    thing: str
    things: bool  # more than one
    look: str | None
    place: str | None


class Meaning(NamedTuple):
    """One clause, or two and the word that links them."""

    clauses: tuple[Clause, ...]
    time: str | None
    link: str | None


class Topic(NamedTuple):
    """What is talked about: the probability that a filler is of outdoors, that a slot is filled, of a second clause."""

    outdoor: float
    trait: float
    look: float
    place: float
    time: float
    second: float


# Translators are pretrained on short sentences about the home, and play on longer ones about outdoors.
TOPICS = {"home": Topic(0.03, 0.35, 0.35, 0.4, 0.3, 0.15), "outdoor": Topic(0.85, 0.5, 0.5, 0.6, 0.4, 0.7)}


def sample_meanings(n: int, topic: Topic, seed: int) -> list[Meaning]:
    """Draw `n` meanings."""
    rng = random.Random(seed)

    def filler(table: str, probability: float = 1.0) -> str | None:
        if rng.random() >= probability:
            return None
        names = list(entries(table))
        half = len(names) // 2
        return rng.choice(names[half:] if rng.random() < topic.outdoor else names[:half])

    def clause(time: str | None) -> Clause:
        agent = filler(AGENTS)
        female = len(entries(AGENTS)[agent].french) == 4 and rng.random() < 0.5
        past = rng.random() < 0.5 if time is None else time in PAST_TIMES
        who = (agent, female, rng.random() < 0.4, filler(TRAITS, topic.trait))
        what = (filler(THINGS), rng.random() < 0.4, filler(LOOKS, topic.look))
        return Clause(*who, filler(ACTIONS), past, *what, filler(PLACES, topic.place))

    meanings = []
    for _ in range(n):
        time = filler(TIMES, topic.time)
        first = clause(time)
        two = rng.random() < topic.second
        link = rng.choice(list(entries(LINKS))) if two else None
        meanings.append(Meaning((first, clause(None)) if two else (first,), time, link))
    return meanings


def corpus_of(meanings: Sequence[Meaning]) -> Corpus:
    """What is said of each meaning in the three languages."""
    say = {"fr": french, "en": english, "de": german}
    return {language: [realise(meaning) for meaning in meanings] for language, realise in say.items()}


# Words --------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One line of a table of `toy_lexicon`: the words of each language."""

    english: list[str]
    french: list[str]
    german: list[str]


@functools.cache
def entries(table: str) -> dict[str, Entry]:
    """The entries of a table by their names: the English word by which each is read."""
    lines = [Entry(*(column.split() for column in line.split("|"))) for line in table.strip().splitlines()]
    name = -1 if table in (PLACES, TIMES) else 0
    return {entry.english[name]: entry for entry in lines}


def all_words() -> list[str]:
    """Every word of the three languages."""
    words = {"a", "an", "some", "un", "une", "des", "ont", "ein", "eine", "einen", "einige", "hat", "haben"}
    for table in (AGENTS, ACTIONS, THINGS, PLACES, TIMES, LINKS):
        words.update(word for entry in entries(table).values() for side in entry for word in side)
    for table, endings in ((TRAITS, NOMINATIVE), (LOOKS, ACCUSATIVE)):
        for entry in entries(table).values():
            words.update(entry.english, entry.french, (entry.german[0] + ending for ending in endings.values()))
    return sorted(words - {"m", "f", "n"})


# The three languages ------------------------------------------------------------------------------------------------

NOMINATIVE = {"m": "er", "f": "e", "n": "es", "many": "e"}  # endings of German adjectives
ACCUSATIVE = {"m": "en", "f": "e", "n": "es", "many": "e"}
NOMINATIVE_ARTICLE = {"m": "ein", "f": "eine", "n": "ein", "many": "einige"}
ACCUSATIVE_ARTICLE = {**NOMINATIVE_ARTICLE, "m": "einen"}


def english(meaning: Meaning) -> str:
    """`a shy neighbour opens some red letters in the kitchen today`"""
    sentence: list[str] = []
    for number, clause in enumerate(meaning.clauses):
        sentence += [meaning.link] if number else []
        many, one, past = entries(ACTIONS)[clause.action].english
        sentence += _english_noun(AGENTS, clause.agent, clause.many, clause.trait)
        sentence += [past if clause.past else many if clause.many else one]
        sentence += _english_noun(THINGS, clause.thing, clause.things, clause.look)
        sentence += entries(PLACES)[clause.place].english if clause.place else []
        sentence += entries(TIMES)[meaning.time].english if meaning.time and not number else []
    return " ".join(sentence)


def french(meaning: Meaning) -> str:
    """`aujourd'hui un voisin timide ouvre des lettres rouges dans la cuisine`"""
    sentence = list(entries(TIMES)[meaning.time].french) if meaning.time else []
    for number, clause in enumerate(meaning.clauses):
        sentence += entries(LINKS)[meaning.link].french if number else []
        one, many, participle = entries(ACTIONS)[clause.action].french
        sentence += _french_noun(entries(AGENTS)[clause.agent], clause.many, clause.female, TRAITS, clause.trait)
        sentence += ["ont" if clause.many else "a", participle] if clause.past else [many if clause.many else one]
        sentence += _french_noun(entries(THINGS)[clause.thing], clause.things, False, LOOKS, clause.look)
        sentence += entries(PLACES)[clause.place].french if clause.place else []
    return " ".join(sentence)


def german(meaning: Meaning) -> str:
    """`heute öffnet ein schüchterner nachbar in der küche einige rote briefe`"""
    sentence = list(entries(TIMES)[meaning.time].german) if meaning.time else []
    for number, clause in enumerate(meaning.clauses):
        sentence += entries(LINKS)[meaning.link].german if number else []
        one, many, participle = entries(ACTIONS)[clause.action].german
        auxiliary = "haben" if clause.many else "hat"
        finite, end = ([auxiliary], [participle]) if clause.past else ([many if clause.many else one], [])
        agent = entries(AGENTS)[clause.agent].german
        subject = _german_noun(agent, clause.many, clause.female, TRAITS, clause.trait, NOMINATIVE_ARTICLE, NOMINATIVE)
        thing = entries(THINGS)[clause.thing].german
        middle = entries(PLACES)[clause.place].german if clause.place else []
        middle = middle + _german_noun(thing, clause.things, False, LOOKS, clause.look, ACCUSATIVE_ARTICLE, ACCUSATIVE)
        if number and meaning.link in SUBORDINATE:
            sentence += [*subject, *middle, *end, *finite]
        elif meaning.time and not number:
            sentence += [*finite, *subject, *middle, *end]
        else:
            sentence += [*subject, *finite, *middle, *end]
    return " ".join(sentence)


def article_for(word: str) -> str:
    """a or an."""
    return "an" if word[0] in "aeiou" else "a"


def _english_noun(table: str, name: str, many: bool, adjective: str | None) -> list[str]:
    words = [adjective] if adjective else []
    words += [entries(table)[name].english[many]]
    return ["some" if many else article_for(words[0]), *words]


def _noun(words: list[str], many: bool, female: bool) -> tuple[str, str]:
    """The form of a French or German noun, and its gender."""
    return (words[2 * many + female], "f" if female else "m") if len(words) == 4 else (words[many], words[2])


def _french_noun(noun: Entry, many: bool, female: bool, table: str, adjective: str | None) -> list[str]:
    form, gender = _noun(noun.french, many, female)
    article = "des" if many else "une" if gender == "f" else "un"
    return [article, form, *([entries(table)[adjective].french[2 * many + (gender == "f")]] if adjective else [])]


def _german_noun(
    noun: list[str],
    many: bool,
    female: bool,
    table: str,
    adjective: str | None,
    articles: Mapping[str, str],
    endings: Mapping[str, str],
) -> list[str]:
    form, gender = _noun(noun, many, female)
    agreement = "many" if many else gender
    adjectives = [entries(table)[adjective].german[0] + endings[agreement]] if adjective else []
    return [articles[agreement], *adjectives, form]
