"""The metrics against a loop over the samples, one text at a time."""

import math
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from elastic_lightning.data.toy_grammar import build_grammar, review_grammar
from elastic_lightning.data.toy_metrics import ToyAcceptance, ToyNLL

OPENING = "i saw this film with my wife last night ."
PROMPTS = [OPENING, OPENING, f"{OPENING} they thought the", OPENING, "i saw", OPENING, OPENING, ""]
RESPONSES = [
    "we loved the plot of the movie .",
    "we loved the",
    "plot was  great .",
    "wonderful wonderful wonderful",
    "<unk> film <eos>",
    "",
    "we loved the",
    OPENING,
]
COMPLETE = [True, False, True, False, True, False, True, False]
ACCEPTED = [True, True, True, False, False, True, False, True]


def test_acceptance_by_hand():
    metric = ToyAcceptance()
    metric.update(PROMPTS, RESPONSES, COMPLETE)
    assert metric.compute().item() == sum(ACCEPTED) / len(ACCEPTED)


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_acceptance_of_one_sample(i):
    metric = ToyAcceptance()
    metric.update(PROMPTS[i : i + 1], RESPONSES[i : i + 1], COMPLETE[i : i + 1])
    assert metric.compute().item() == ACCEPTED[i]


def test_nll_equals_a_loop():
    grammar, nats, words = review_grammar(), 0.0, 0
    for prompt, response, complete in zip(PROMPTS, RESPONSES, COMPLETE, strict=True):
        nats -= grammar.log_probability(f"{prompt} {response}", complete=complete, noise=0.01)
        nats += grammar.log_probability(prompt, complete=False, noise=0.01)
        words += len(response.split())
    metric = ToyNLL()
    metric.update(PROMPTS, RESPONSES, COMPLETE)
    assert metric.compute().item() == pytest.approx(nats / words, abs=1e-10)


def test_nll_by_hand():
    """`x .` opens, then `a .` or `b .` with 1/2 each, then the end: the word costs ln 2 and the rest nothing."""
    grammar = build_grammar({}, {}, {"x .": 1}, {"a .": 1, "b .": 1}, stop=1.0, siding=0.5)
    metric = ToyNLL(grammar)
    metric.update(["x ."], ["a"], [False])
    v = 4  # x . a b; with noise a word is right with 0.99 + 0.01/v, and the review goes on with 1 - 0.01/v
    told_right, goes_on, other = 0.99 + 0.01 / v, 1 - 0.01 / v, 0.01 / v
    assert metric.compute().item() == pytest.approx(-math.log(goes_on * (told_right + other) / 2), abs=1e-12)


def test_a_sentence_broken_off_costs():
    open_end, broken = ToyNLL(), ToyNLL()
    open_end.update([OPENING], ["we loved the"], [False])
    broken.update([OPENING], ["we loved the"], [True])
    end = -math.log(0.01 / len(review_grammar().words))
    assert broken.compute().item() - open_end.compute().item() == pytest.approx(end / 3, abs=1e-10)


@pytest.mark.parametrize("metric_class", [ToyAcceptance, ToyNLL])
def test_batches_add_up_and_reset(metric_class):
    whole, parts = metric_class(), metric_class()
    whole.update(PROMPTS, RESPONSES, COMPLETE)
    parts.update(PROMPTS[:3], RESPONSES[:3], COMPLETE[:3])
    parts.update(PROMPTS[3:], RESPONSES[3:], torch.tensor(COMPLETE[3:]))
    torch.testing.assert_close(whole.compute(), parts.compute(), rtol=0, atol=1e-12)
    assert parts.compute().dtype == torch.float64
    parts.reset()
    assert parts.denominator == 0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric_class", [ToyAcceptance, ToyNLL])
def test_nothing_is_nan(metric_class):
    metric = metric_class()
    assert metric.compute().isnan()
    metric.reset()
    metric.update([], [], [])
    assert metric.compute().isnan()


def test_nll_without_a_word_is_nan():
    metric = ToyNLL()
    metric.update([OPENING], [""], [True])
    assert metric.compute().isnan()


@pytest.mark.parametrize("metric_class", [ToyAcceptance, ToyNLL])
def test_unequal_lengths_are_refused(metric_class):
    with pytest.raises(ValueError):
        metric_class().update(PROMPTS, RESPONSES[:2], COMPLETE)


def test_together_under_their_names():
    metrics = MetricCollection({metric.name: metric for metric in (ToyAcceptance(), ToyNLL())})
    metrics = pickle.loads(pickle.dumps(metrics))
    metrics.update(PROMPTS, RESPONSES, COMPLETE)
    assert metrics.compute().keys() == {"toy_accept", "toy_nll"}
