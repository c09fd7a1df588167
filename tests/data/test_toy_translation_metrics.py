"""The metrics against a loop over the samples, and by hand."""

import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from elastic_lightning.data import ToyEnglishAcceptance, ToyExactMeaning, ToyMeaning
from elastic_lightning.errors import UserError

FRENCH = [
    "un voisin timide ouvre des lettres",
    "une voisine timide ouvre des lettres",
    "hier un chien a vu une clé",
    "hier un chien a vu une clé",
    "hier un chien a vu une clé",
    "hier un chien a vu une clé",
    "hier un chien a vu une clé",
]
ENGLISH = [
    "a shy neighbour opens some letters",
    " a shy  neighbour opens some letters",  # English cannot say whether she is a woman
    "a dog saw a key",  # good English, and the time is lost
    "dog saw key yesterday",  # the meaning in bad English
    "a dog saw a key last",  # broken off; where it did not end by itself it is a beginning
    "a dog saw a key yesterday",  # all is well, but it was cut off before its end
    "",
]
COMPLETE = [True, True, True, True, False, False, True]
ACCEPTED = [1, 1, 1, 0, 1, 1, 0]
EXACT = [1, 1, 0, 0, 0, 0, 0]
PRESERVED = [1, 1, 6 / 7, 1, 6 / 7, 1, 0]
METRICS = {ToyEnglishAcceptance: ACCEPTED, ToyExactMeaning: EXACT, ToyMeaning: PRESERVED}


@pytest.mark.parametrize("metric_class", METRICS)
def test_by_hand(metric_class):
    metric = metric_class()
    metric.update(FRENCH, ENGLISH, COMPLETE)
    assert metric.compute().item() == pytest.approx(sum(METRICS[metric_class]) / len(ENGLISH), abs=1e-12)
    for row, expected in enumerate(METRICS[metric_class]):
        metric.reset()
        metric.update(FRENCH[row : row + 1], ENGLISH[row : row + 1], COMPLETE[row : row + 1])
        assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric_class", METRICS)
def test_batches_and_ranks_add_up(metric_class):
    whole, parts = metric_class(), [metric_class(), metric_class()]
    whole.update(FRENCH, ENGLISH, COMPLETE)
    parts[0].update(FRENCH[:2], ENGLISH[:2], COMPLETE[:2])
    parts[1].update(FRENCH[2:4], ENGLISH[2:4], torch.tensor(COMPLETE[2:4]))
    parts[1].update(FRENCH[4:], ENGLISH[4:], COMPLETE[4:])
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("numerator", "denominator")}
    assert sums["numerator"] / sums["denominator"] == whole.compute()
    assert all(
        reduction is torch.sum or reduction.__name__ == "dim_zero_sum" for reduction in whole._reductions.values()
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric_class", METRICS)
def test_nothing_is_nan(metric_class):
    metric = metric_class()
    metric.update([], [], [])
    assert metric.compute().isnan()


@pytest.mark.parametrize("metric_class", METRICS)
def test_unequal_lengths_are_refused(metric_class):
    with pytest.raises(ValueError):
        metric_class().update(
            FRENCH, ENGLISH[:2], COMPLETE[:2] if metric_class is not ToyEnglishAcceptance else COMPLETE
        )


@pytest.mark.parametrize("metric_class", [ToyMeaning, ToyExactMeaning])
def test_a_prompt_that_was_cut(metric_class):
    with pytest.raises(UserError, match="max_prompt_tokens"):
        metric_class().update(["hier un chien a vu"], ["a dog saw a key"], [True])


def test_together_under_their_names():
    metrics = MetricCollection({metric.name: metric for metric in (made() for made in METRICS)})
    metrics = pickle.loads(pickle.dumps(metrics))
    metrics.update(FRENCH, ENGLISH, COMPLETE)
    assert metrics.compute().keys() == {"toy_english", "toy_meaning", "toy_exact"}
