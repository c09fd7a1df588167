"""The oracles: plain loops over the tables and over the paths of a tiny grammar, and statistics of the real one."""

import itertools
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from transformers import AutoTokenizer

from elastic_lightning.data.toy_grammar import OPINIONS, SIDING, build_grammar, review_grammar, toy_tokenizer

WORDS = {"D.one": "this", "D.many": "these the", "N.one": "film cat", "N.many": "films", "VERY": "very so"}
OPINION = {"Q": ("good fine", "bad")}
OPENINGS = {"hello .": 1}
SENTENCES = {"D# N# VERY? Q .": 3, "N# .": 1}
THIRD, FOURTH = 4 / 7, 3 / 7  # 1/3 and 1/4, the weights of a class of two words, made to sum to 1
TINY_VOCABULARY = ["hello", ".", "this", "film", "very", "so", "good", "fine", "bad", "these", "the", "films", "cat"]


def tiny(stop):
    return build_grammar(WORDS, OPINION, OPENINGS, SENTENCES, stop, siding=0.7)


def sentences_by_hand(label):
    """Every sentence of the tiny grammar and its probability given the label, written out from the tables."""
    praise = 0.7 if label else 0.3
    qualities = {"good": praise * THIRD, "fine": praise * FOURTH, "bad": 1 - praise}
    heads = {"one": (0.6, {"this": 1}, {"film": THIRD, "cat": FOURTH})}
    heads["many"] = (0.4, {"these": THIRD, "the": FOURTH}, {"films": 1})
    table = defaultdict(float)
    for share, determiners, nouns in heads.values():
        for noun, p_noun in nouns.items():
            table[f"{noun} ."] += 0.25 * share * p_noun
            for determiner, very, quality in itertools.product(determiners, ["", "very ", "so "], qualities):
                p_very = {"": 0.5, "very ": 0.5 * THIRD, "so ": 0.5 * FOURTH}[very]
                p = 0.75 * share * determiners[determiner] * p_noun * p_very * qualities[quality]
                table[f"{determiner} {noun} {very}{quality} ."] += p
    return table


def reviews_by_hand(stop, longest):
    """Every review of up to `longest` sentences after the opening -> its probability."""
    table = defaultdict(float)
    for label in (0, 1):
        layer = {"hello .": 0.5}
        for _ in range(longest):
            sentences = sentences_by_hand(label).items()
            layer = {f"{a} {b}": p * q for (a, p), (b, q) in itertools.product(layer.items(), sentences)}
            for text, p in layer.items():
                table[text] += p * stop
            layer = {text: p * (1 - stop) for text, p in layer.items()}
    return table


def brute_force(grammar, text, complete, noise):
    """Sum over labels and over every path of states, word by word, without dynamic programming or rescaling."""
    share = noise / len(grammar.words)
    words = text.split()

    def say(label, state, word):
        clean = grammar.emission[label, state, grammar.words.index(word)] if word in grammar.words else 0.0
        return (1 - noise) * clean + share

    def paths(label, state, i):
        end = (1 - noise) * grammar.end[state] + share
        if i == len(words):
            return end if complete else 1.0
        following = np.flatnonzero(grammar.transition[state])
        steps = (grammar.transition[state, s] * say(label, s, words[i]) * paths(label, s, i + 1) for s in following)
        return (1 - end) * sum(steps)

    return 0.5 * paths(0, 0, 0) + 0.5 * paths(1, 0, 0)


@pytest.fixture(scope="module")
def grammar():
    return review_grammar()


@pytest.fixture(scope="module")
def sampled(grammar):
    return grammar.sample(2000, seed=0)


def test_tables_become_vocabulary_and_distributions():
    grammar = tiny(stop=0.5)
    assert sorted(grammar.words) == sorted(TINY_VOCABULARY)
    np.testing.assert_allclose(grammar.transition.sum(1), 1)
    np.testing.assert_allclose(grammar.emission[:, 1:].sum(-1), 1)


def test_whole_reviews_equal_the_enumeration():
    grammar = tiny(stop=0.5)
    expected = reviews_by_hand(0.5, longest=2)
    got = grammar.log_probabilities(list(expected))
    np.testing.assert_allclose(got, np.log(list(expected.values())), rtol=0, atol=1e-10)


def test_finite_grammar_sums_to_one():
    total = np.exp(tiny(stop=1.0).log_probabilities(list(reviews_by_hand(1.0, longest=1)))).sum()
    assert total == pytest.approx(1, abs=1e-10)


def test_infinite_grammar_sums_to_what_has_ended():
    total = np.exp(tiny(stop=0.5).log_probabilities(list(reviews_by_hand(0.5, longest=2)))).sum()
    assert total == pytest.approx(1 - 0.5**2, abs=1e-10)


def test_prefixes_sum_the_reviews_that_start_with_them():
    grammar = tiny(stop=1.0)
    expected = defaultdict(float)
    for text, p in reviews_by_hand(1.0, longest=1).items():
        words = text.split()
        for i in range(len(words) + 1):
            expected[" ".join(words[:i])] += p
    got = grammar.log_probabilities(list(expected), complete=False)
    np.testing.assert_allclose(got, np.log(list(expected.values())), rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("stop", [0.5, 1.0])
def test_noise_equals_the_sum_over_paths(noise, complete, stop):
    grammar = tiny(stop)
    rng = random.Random(0)
    texts = ["", "hello", "hello .", "hello . film .", "hello . this film bad . cat", "good good", "<eos> hello . what"]
    texts += [" ".join(rng.choices(TINY_VOCABULARY, k=5)) for _ in range(5)]
    for text in texts:
        expected = brute_force(grammar, text, complete, noise)
        expected = math.log(expected) if expected else -math.inf
        assert grammar.log_probability(text, complete, noise) == pytest.approx(expected, abs=1e-10), text


def test_noisy_words_and_ends_are_a_distribution():
    grammar = tiny(stop=0.5)
    begun = "hello . this"
    ways_on = [grammar.log_probability(begun, True, 0.1)]
    ways_on += [grammar.log_probability(f"{begun} {word}", False, 0.1) for word in grammar.words]
    assert np.exp(ways_on).sum() == pytest.approx(math.exp(grammar.log_probability(begun, False, 0.1)), abs=1e-12)


def test_noise_is_finite_for_anything(grammar):
    texts = ["", " ", "wonderful " * 200, "<unk> <eos> ???", "wonderful . film the", "zebra"]
    for complete in (True, False):
        assert np.isfinite(grammar.log_probabilities(texts, complete, noise=0.01)).all()


def test_impossible_texts_have_probability_zero(grammar):
    for text in ["zebra", "the film <eos>", "wonderful wonderful wonderful"]:
        assert grammar.log_probability(text, complete=False) == -math.inf
        assert math.isnan(grammar.positive_probability(text))


def test_samples_are_accepted_and_repeat_with_the_seed(grammar, sampled):
    texts, labels = sampled
    assert grammar.accepts_each(texts).all()
    assert np.isfinite(grammar.log_probabilities(texts)).all()
    assert grammar.sample(10, seed=3) == grammar.sample(10, seed=3)
    assert grammar.sample(10, seed=3) != grammar.sample(10, seed=4)
    assert abs(sum(labels) - len(labels) / 2) < 3 * math.sqrt(len(labels)) / 2


def test_word_frequencies_match_the_chain(grammar, sampled):
    """The word after "last" is a WHEN: eight words proportional to 1/3 … 1/10; chi-square with 7 degrees of freedom."""
    follow = Counter(b for text in sampled[0] for a, b in itertools.pairwise(text.split()) if a == "last")
    when = ["night", "week", "month", "monday", "friday", "sunday", "summer", "winter"]
    weights = {word: 1 / (rank + 3) for rank, word in enumerate(when)}
    assert follow.keys() == weights.keys()
    expected = {word: follow.total() * w / sum(weights.values()) for word, w in weights.items()}
    assert sum((follow[w] - e) ** 2 / e for w, e in expected.items()) < 24.3  # 99.9 %


def test_opinions_side_with_the_label(sampled):
    praise = {word for words, _ in OPINIONS.values() for word in words.split()}
    blame = {word for _, words in OPINIONS.values() for word in words.split()}
    sides = [
        (word in praise) == bool(label)
        for text, label in zip(*sampled, strict=True)
        for word in text.split()
        if word in praise | blame
    ]
    assert abs(np.mean(sides) - SIDING) < 3 * math.sqrt(SIDING * (1 - SIDING) / len(sides))


def test_tiny_samples_match_the_enumeration():
    texts, _ = tiny(stop=1.0).sample(20000, seed=0)
    counts, expected = Counter(texts), reviews_by_hand(1.0, longest=1)
    assert counts.keys() <= expected.keys()
    for text, p in expected.items():
        assert abs(counts[text] - 20000 * p) < 4 * math.sqrt(20000 * p * (1 - p)), text


def test_every_prefix_of_a_review_is_accepted(grammar, sampled):
    for text in sampled[0][:40]:
        words = text.split()
        assert grammar.accepts_each([" ".join(words[:i]) for i in range(len(words) + 1)], complete=False).all()
        assert not grammar.accepts(" ".join(words[:-1]))


@pytest.mark.parametrize("text", ["wonderful wonderful wonderful", "", "zebra", "the plot was very ."])
def test_what_is_no_review_is_rejected(grammar, text):
    assert not grammar.accepts(text)


def test_shuffled_reviews_are_rejected(grammar, sampled):
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(), len(text.split()))) for text in sampled[0][:100]]
    assert not grammar.accepts_each(shuffled).any()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("they thought the plot was great .", "they thought the plot were great ."),
        ("they thought these songs are great .", "they thought this songs are great ."),
        ("it is an excellent drama with some songs .", "it is a excellent drama with some songs ."),
        ("it is a great drama with some songs .", "it is a great wonderful drama with some songs ."),
        ("maria is very great as a doctor .", "maria is very as a doctor ."),
        ("the plot seems great to my wife .", "the plot seem great to my wife ."),
    ],
)
def test_one_wrong_word_breaks_a_review(grammar, right, wrong):
    opening = "i saw this film with my wife last night . "
    assert grammar.accepts(opening + right)
    assert not grammar.accepts(opening + wrong)
    assert not grammar.accepts(opening + wrong, complete=False)


def test_acceptance_follows_the_probability(grammar, sampled):
    rng = random.Random(0)
    texts = [text.replace(rng.choice(text.split()), rng.choice(grammar.words), 1) for text in sampled[0][:300]]
    for complete in (True, False):
        finite = np.isfinite(grammar.log_probabilities(texts, complete))
        assert finite.any() and not finite.all()
        np.testing.assert_array_equal(grammar.accepts_each(texts, complete), finite)


def test_one_opinion_word_is_worth_its_siding(grammar):
    opening = "i saw this film with my wife last night ."
    assert grammar.positive_probability("") == 0.5
    assert grammar.positive_probability(opening) == pytest.approx(0.5)
    assert grammar.positive_probability(f"{opening} they thought the plot was great .") == pytest.approx(SIDING)
    assert grammar.positive_probability(f"{opening} they thought the plot was bad") == pytest.approx(1 - SIDING)
    twice = f"{opening} they thought the plot was great . we loved the songs"
    assert grammar.positive_probability(twice) == pytest.approx(SIDING**2 / (SIDING**2 + (1 - SIDING) ** 2))


def test_a_batch_equals_one_by_one(grammar, sampled):
    texts = ["", *sampled[0][:20], "zebra . film", "the  plot"]
    complete = [i % 2 == 0 for i in range(len(texts))]
    batch = grammar.log_probabilities(texts, complete, noise=0.01)
    single = [grammar.log_probability(text, done, noise=0.01) for text, done in zip(texts, complete, strict=True)]
    np.testing.assert_allclose(batch, single, rtol=0, atol=1e-10)
    assert grammar.log_probabilities([]).shape == grammar.accepts_each([]).shape == (0,)


def test_long_texts_do_not_underflow(grammar, sampled):
    opening = "i saw this film with my wife last night . "
    text = opening + "they thought the plot was great . " * 300
    assert grammar.log_probability(text) < -2000
    assert grammar.accepts(text)


def test_spaces_do_not_count(grammar, sampled):
    text = sampled[0][0]
    spaced = "  " + text.replace(" ", "  ") + " "
    assert grammar.accepts(spaced)
    assert grammar.log_probability(spaced) == grammar.log_probability(text)


def test_a_class_without_words_is_named():
    with pytest.raises(KeyError, match="NOUN"):
        build_grammar({}, {}, {"hello .": 1}, {"NOUN .": 1}, stop=0.5, siding=0.7)


def test_tokenizer_round_trip(grammar, sampled, tmp_path):
    tokenizer = toy_tokenizer(grammar.words)
    assert len(tokenizer) == len(grammar.words) + 3
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<pad>", "<eos>", "<unk>")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*sampled[0][:20], "a zebra <eos> film"]
    for one in (tokenizer, loaded):
        assert one.padding_side == "left"
        assert [one.decode(one.encode(text), skip_special_tokens=True) for text in texts[:-1]] == texts[:-1]
        assert one.convert_ids_to_tokens(one.encode(texts[-1])) == ["a", "<unk>", "<eos>", "film"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    first, second = (one(texts, padding=True) for one in (tokenizer, loaded))
    assert first["input_ids"] == second["input_ids"]
    assert first["attention_mask"] == second["attention_mask"]
