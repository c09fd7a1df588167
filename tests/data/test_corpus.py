import pytest

from elastic_lightning.data.corpus import cleaned, cut_out, rows, some_of, take, with_words, without
from elastic_lightning.errors import UserError

CORPUS = {  # five English sentences, three of them with several translations
    "en": ["Go .", "go .", "Run !", "Run !", "RUN !", "I see a dog .", "Yes", "Yes", "No"],
    "fr": ["Va .", "Allez .", "Cours !", "Fuis !", "File !", "Je vois un chien .", "Oui", "Si", "Non"],
}


def test_cleaning_keeps_rows_together():
    corpus = {"en": [" A\u00a0dog\t. ", "", "Cat", "Ox"], "fr": ["Un  chien\u202f!", "rien", " \u00a0", "Bœuf"]}
    assert cleaned(corpus) == {"en": ["A dog .", "Ox"], "fr": ["Un chien !", "Bœuf"]}
    assert cleaned(corpus, lower_case=True) == {"en": ["a dog .", "ox"], "fr": ["un chien !", "bœuf"]}


def test_rows_by_words():
    assert with_words(CORPUS, "en", 2)["fr"] == CORPUS["fr"][:6]
    assert with_words(CORPUS, "fr", 5) == {"en": ["I see a dog ."], "fr": ["Je vois un chien ."]}


@pytest.mark.parametrize("seed", range(5))
def test_no_sentence_is_in_two_parts(seed):
    train, *parts = cut_out(CORPUS, "en", [1, 2], seed)
    assert [rows(part) for part in parts] == [1, 2]
    seen = [{text.lower() for text in part["en"]} for part in (train, *parts)]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 5
    pairs = set(zip(*CORPUS.values(), strict=True))
    assert all(set(zip(*part.values(), strict=True)) <= pairs for part in (train, *parts))
    # All that is not held out stays, with every translation.
    assert train == without(CORPUS, "en", [text for part in parts for text in part["en"]])
    assert cut_out(CORPUS, "en", [1, 2], seed) == [train, *parts]


def test_which_sentences_are_held_out_is_the_seeds():
    assert len({cut_out(CORPUS, "en", [1], seed)[1]["en"][0].lower() for seed in range(20)}) > 1


def test_too_few_sentences():
    with pytest.raises(UserError, match="5 different sentences in 'en': too few to hold out 5"):
        cut_out(CORPUS, "en", [2, 3], 0)


def test_without_heeds_no_case():
    assert without(CORPUS, "en", ["GO .", "yes"])["en"] == ["Run !", "Run !", "RUN !", "I see a dog .", "No"]


def test_some_rows_at_random_in_order():
    few = some_of(CORPUS, 4, seed=1)
    assert rows(few) == 4 and few == some_of(CORPUS, 4, seed=1)
    places = [list(zip(*CORPUS.values(), strict=True)).index(pair) for pair in zip(*few.values(), strict=True)]
    assert places == sorted(places) != [0, 1, 2, 3]
    assert some_of(CORPUS, None, 1) == some_of(CORPUS, 9, 1) == some_of(CORPUS, 100, 1) == CORPUS


def test_take_follows_the_indices():
    assert take(CORPUS, [8, 0]) == {"en": ["No", "Go ."], "fr": ["Non", "Va ."]}
