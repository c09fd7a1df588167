"""The oracles: sentences written by hand, and a parser and an automaton that know nothing of each other."""

import random

import pytest

from elastic_lightning.data.toy_languages import (
    TOPICS,
    Clause,
    Meaning,
    all_words,
    corpus_of,
    english,
    entries,
    french,
    german,
    sample_meanings,
)
from elastic_lightning.data.toy_lexicon import ACTIONS, AGENTS, LOOKS, THINGS, TRAITS
from elastic_lightning.data.toy_reading import (
    is_english,
    parse_english,
    parse_french,
    preserved,
    read_english,
    without_gender,
)

LETTERS = Clause("neighbour", False, False, "shy", "open", False, "letter", True, "red", "kitchen")
AXE = Clause("dancer", True, True, "angry", "throw", True, "axe", False, "ugly", None)
BARE = Clause("baby", False, False, None, "see", True, "umbrella", False, None, "bridge")

BY_HAND = [
    (
        Meaning((LETTERS,), "today", None),
        "aujourd'hui un voisin timide ouvre des lettres rouges dans la cuisine",
        "a shy neighbour opens some red letters in the kitchen today",
        "heute öffnet ein schüchterner nachbar in der küche einige rote briefe",
    ),
    (
        Meaning((LETTERS._replace(female=True, many=True, things=False),), None, None),
        "des voisines timides ouvrent une lettre rouge dans la cuisine",
        "some shy neighbours open a red letter in the kitchen",
        "einige schüchterne nachbarinnen öffnen in der küche einen roten brief",
    ),
    (
        Meaning((AXE, BARE), "yesterday", "because"),
        "hier des danseuses furieuses ont lancé une hache laide parce que un bébé a vu un parapluie sous le pont",
        "some angry dancers threw an ugly axe yesterday because a baby saw an umbrella under the bridge",
        "gestern haben einige wütende tänzerinnen eine hässliche axt geworfen weil ein baby unter der brücke einen "
        "regenschirm gesehen hat",
    ),
    (
        Meaning((BARE, AXE._replace(female=False, many=False)), None, "and"),
        "un bébé a vu un parapluie sous le pont et un danseur furieux a lancé une hache laide",
        "a baby saw an umbrella under the bridge and an angry dancer threw an ugly axe",
        "ein baby hat unter der brücke einen regenschirm gesehen und ein wütender tänzer hat eine hässliche axt "
        "geworfen",
    ),
    (
        Meaning((BARE._replace(trait="wet", past=False), LETTERS._replace(look=None)), "often", "while"),
        "souvent un bébé mouillé voit un parapluie sous le pont pendant que un voisin timide ouvre des lettres dans la "
        "cuisine",
        "a wet baby sees an umbrella under the bridge often while a shy neighbour opens some letters in the kitchen",
        "oft sieht ein nasses baby unter der brücke einen regenschirm während ein schüchterner nachbar in der küche "
        "einige briefe öffnet",
    ),
]


@pytest.fixture(scope="module", params=TOPICS)
def meanings(request):
    return sample_meanings(1500, TOPICS[request.param], seed=1)


@pytest.mark.parametrize("number", range(len(BY_HAND)))
def test_sentences_by_hand(number):
    meaning, *sentences = BY_HAND[number]
    assert [french(meaning), english(meaning), german(meaning)] == sentences
    assert parse_french(sentences[0]) == meaning
    assert parse_english(sentences[1]) == without_gender(meaning)


def test_what_is_said_is_read(meanings):
    corpus = corpus_of(meanings)
    for row, meaning in enumerate(meanings):
        assert parse_french(corpus["fr"][row]) == meaning
        assert parse_english(corpus["en"][row]) == without_gender(meaning)
        assert is_english(corpus["en"][row])
        assert preserved(meaning, corpus["en"][row]) == 1


def test_the_languages_are_as_long_as_said():
    lengths = {
        topic: [len(text.split()) for text in corpus_of(sample_meanings(1500, TOPICS[topic], 2))["en"]]
        for topic in TOPICS
    }
    assert 7 < sum(lengths["home"]) / 1500 < 10 < 13 < sum(lengths["outdoor"]) / 1500 < 16
    assert max(lengths["outdoor"]) <= 24


def test_topics_differ_in_their_words():
    for topic, expected in (("home", 0.03), ("outdoor", 0.85)):
        clauses = [clause for meaning in sample_meanings(1500, TOPICS[topic], 2) for clause in meaning.clauses]
        outdoor = {
            name for table in (AGENTS, ACTIONS, THINGS) for name in list(entries(table))[len(entries(table)) // 2 :]
        }
        fillers = [filler for clause in clauses for filler in (clause.agent, clause.action, clause.thing)]
        share = sum(filler in outdoor for filler in fillers) / len(fillers)
        assert share == pytest.approx(expected, abs=0.02)
        assert set(fillers) == {name for table in (AGENTS, ACTIONS, THINGS) for name in entries(table)}  # all are met


def test_samples_are_those_of_their_seed():
    assert sample_meanings(20, TOPICS["home"], 1) == sample_meanings(20, TOPICS["home"], 1)
    assert sample_meanings(20, TOPICS["home"], 1) != sample_meanings(20, TOPICS["home"], 2)


def corrupted(text, rng):
    """One small mistake: a word lost, doubled, moved, or replaced by another of the language."""
    words = text.split()
    place = rng.randrange(len(words))
    kind = rng.randrange(4)
    if kind == 0:
        del words[place]
    elif kind == 1:
        words.insert(place, words[place])
    elif kind == 2:
        words.insert(rng.randrange(len(words)), words.pop(place))
    else:
        words[place] = rng.choice(ENGLISH_WORDS)
    return " ".join(words)


ENGLISH_WORDS = sorted(
    {word for topic in TOPICS.values() for m in sample_meanings(800, topic, 3) for word in english(m).split()}
)


def test_two_grammars_of_english_agree(meanings):
    rng, accepted = random.Random(0), 0
    for meaning in meanings:
        text = corrupted(english(meaning), rng)
        assert is_english(text) == (parse_english(text) is not None), text
        accepted += is_english(text)
    assert 0.02 < accepted / len(meanings) < 0.4  # some mistakes only change what is said


def test_beginnings_are_those_of_sentences(meanings):
    for meaning in meanings[:200]:
        words = english(meaning).split()
        assert all(is_english(" ".join(words[:end]), complete=False) for end in range(len(words) + 1))


def test_every_beginning_can_be_ended():
    """Walks that go on with any word that may come end in sentences which the parser knows."""
    rng = random.Random(0)
    for _ in range(30):
        text = ""
        while not is_english(text) or rng.random() < 0.5:
            text = rng.choice(
                [t for word in ENGLISH_WORDS if is_english(t := f"{text} {word}".strip(), complete=False)] or [""]
            )
        assert parse_english(text) is not None


@pytest.mark.parametrize(
    ("text", "whole", "beginning"),
    [
        ("", False, True),
        ("a", False, True),
        ("a apple", False, False),
        ("an aunt", False, True),
        ("a aunt", False, False),
        ("a man sees", False, True),
        ("a man see", False, False),
        ("some men see a dog", False, False),  # a dog is no thing
        ("a man sees a red ball", True, True),
        ("a man sees a ball yesterday", False, False),
        ("a man saw a ball yesterday", True, True),
        ("a man saw a ball last", False, True),
        ("a man saw a ball while", False, True),
        ("a man saw a ball while a man sees a ball yesterday", False, False),  # the time is the first clause's
        ("a man saw a ball while a man sees a ball while", False, False),  # two clauses at most
        ("a man saw a ball in kitchen", False, False),
        ("a man saw a ball zebra", False, False),
    ],
)
def test_english_by_hand(text, whole, beginning):
    assert is_english(text) == whole
    assert is_english(text, complete=False) == beginning
    assert (parse_english(text) is not None) == whole


def test_gender_is_what_english_cannot_say():
    open_gender = [name for name, entry in entries(AGENTS).items() if len(entry.french) == 4]
    assert len(open_gender) == 10
    for name in open_gender:
        one, other = (Meaning((LETTERS._replace(agent=name, female=female),), None, None) for female in (False, True))
        assert english(one) == english(other)
        assert french(one) != french(other) and german(one) != german(other)


def test_nothing_but_gender_is_lost_in_english(meanings):
    said = {}
    for meaning in meanings:
        assert said.setdefault(english(meaning), without_gender(meaning)) == without_gender(meaning)


HAND = BY_HAND[0][0]  # a shy neighbour opens some red letters in the kitchen today: ten slots


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a shy neighbour opens some red letters in the kitchen today", 1),
        ("shy neighbour open red letters kitchen today", 1),  # broken, and all is said
        ("today in the kitchen letters red red opens neighbour shy", 1),
        ("a shy neighbour opens a red letter in the kitchen today", 9 / 10),  # one letter
        ("a shy neighbour opened some red letters in the kitchen today", 9 / 10),
        ("a shy neighbour opens some red letters today", 9 / 10),
        ("a shy neighbour opens some red blue letters in the kitchen today", 9 / 10),  # both colours are neither
        ("a shy farmer closes some red letters in the kitchen today", 7 / 10),  # no such action: two slots are gone
        ("a shy neighbour opens some red letters in the kitchen today and a dog", 10 / 13),  # a link, a dog, one
        ("", 0),
        ("some dogs saw an axe", 0),
    ],
)
def test_meaning_by_hand(text, share):
    assert preserved(HAND, text) == pytest.approx(share, abs=1e-12)


def test_a_second_clause_has_slots_of_its_own():
    meaning = BY_HAND[3][0]
    swapped = "an angry dancer threw an ugly axe and a baby saw an umbrella under the bridge"
    assert is_english(swapped) and parse_english(swapped) != without_gender(meaning)
    wanted, got = read_english(english(meaning)), read_english(swapped)
    alike = {slot for slot in wanted if wanted[slot] == got.get(slot)}
    assert {slot for _, slot in alike} == {"link", "many", "past", "things"}
    assert preserved(meaning, swapped) == len(alike) / len(wanted.keys() | got.keys())


def test_all_words_are_those_in_use():
    used = {
        word
        for topic in TOPICS.values()
        for texts in corpus_of(sample_meanings(6000, topic, 5)).values()
        for text in texts
        for word in text.split()
    }
    assert used == set(all_words())
    assert len(all_words()) == len(set(all_words()))


def test_half_of_each_table_is_of_outdoors():
    assert all(len(entries(table)) % 2 == 0 for table in (AGENTS, TRAITS, ACTIONS, THINGS, LOOKS))
