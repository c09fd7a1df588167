"""Metrics of preferences against plain loops over all pairs."""

import math

import numpy as np
import pytest
import torch

from elastic_lightning.functional import wilson_interval
from elastic_lightning.metrics import LengthBias, Moments, PairAccuracy, PairCalibration


def pairs(rows=40):
    """Scores with ties among them, and lengths with ties among them."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (torch.randint(-3, 4, (rows,), generator=generator).float() for _ in range(2))
    lengths = [torch.randint(1, 6, (rows,), generator=generator) for _ in range(2)]
    return chosen + lengths[0], rejected + lengths[1], *lengths


def feed(chosen, rejected, chosen_length, rejected_length, size=7):
    """The values of all four metrics, fed `size` pairs at a time."""
    metrics = PairAccuracy(), PairCalibration(), LengthBias(), Moments()
    for start in range(0, len(chosen), size):
        part = [column[start : start + size] for column in (chosen, rejected, chosen_length, rejected_length)]
        metrics[0].update(*part[:2])
        metrics[1].update(*part[:2])
        metrics[2].update(*part)
        metrics[3].update(part[0])
    return {name: float(value) for metric in metrics for name, value in metric.compute().items()}


def half(difference):
    return 0.5 if difference == 0 else float(difference > 0)


def oracle():
    """The numbers in plain Python and numpy."""
    chosen, rejected, longer, other = (column.tolist() for column in pairs())
    right = [half(c - r) for c, r in zip(chosen, rejected, strict=True)]
    gaps = [a - b for a, b in zip(longer, other, strict=True)]
    confidence = [1 / (1 + math.exp(-abs(c - r))) for c, r in zip(chosen, rejected, strict=True)]
    bins = [min(int((c - 0.5) * 20), 9) for c in confidence]
    error = sum(
        abs(sum(confidence[i] - right[i] for i in range(len(right)) if bins[i] == number)) for number in range(10)
    )
    low, high = wilson_interval(sum(right), len(right))
    return {
        "accuracy": np.mean(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "pairs": len(right),
        "calibration_error": error / len(right),
        "confidence": np.mean(confidence),
        "length_correlation": np.corrcoef(chosen + rejected, longer + other)[0, 1],
        "accuracy_worse_longer": np.mean([r for r, gap in zip(right, gaps, strict=True) if gap < 0]),
        "accuracy_better_longer": np.mean([r for r, gap in zip(right, gaps, strict=True) if gap > 0]),
        "accuracy_longest": np.mean([half(gap) for gap in gaps]),
        "mean": np.mean(chosen),
        "deviation": np.std(chosen),
    }


@pytest.mark.parametrize("size", [1, 7, 40])
def test_all_values_are_those_of_a_loop(size):
    expected = oracle()
    assert len(set(expected.values())) == len(expected), "the case should tell the values apart"
    assert feed(*pairs(), size=size) == pytest.approx(expected)


def test_length_alone_by_hand():
    """A model that scores by length: right where the better answer is longer, wrong where the worse one is."""
    chosen, rejected = torch.tensor([5, 2, 3, 4]), torch.tensor([1, 6, 3, 2])
    values = feed(chosen.float() * 2, rejected.float() * 2, chosen, rejected)
    assert values["length_correlation"] == pytest.approx(1)
    assert (values["accuracy_worse_longer"], values["accuracy_better_longer"]) == (0, 1)
    assert values["accuracy"] == values["accuracy_longest"] == (1 + 0 + 0.5 + 1) / 4


def test_kinds_of_pairs_that_are_not_there_are_nan():
    lengths = torch.tensor([2, 2])
    values = feed(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), lengths, lengths)
    assert math.isnan(values["accuracy_worse_longer"]) and math.isnan(values["accuracy_better_longer"])
    assert math.isnan(values["length_correlation"]) and values["accuracy_longest"] == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_an_empty_metric_is_nan():
    values = {
        n: float(v)
        for m in (PairAccuracy(), PairCalibration(), LengthBias(), Moments())
        for n, v in m.compute().items()
    }
    assert values.pop("pairs") == 0 and all(map(math.isnan, values.values()))


def test_what_was_reset_in_inference_mode_counts_on_outside_of_it():
    metric = LengthBias()
    with torch.inference_mode():
        metric.update(*pairs())
        metric.reset()
    metric.update(*pairs())
    assert metric.compute()["accuracy_longest"].item() == pytest.approx(oracle()["accuracy_longest"])


def test_low_precision_scores_do_not_blur_the_sums():
    metric = Moments()
    for _ in range(600):
        metric.update(torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
    values = metric.compute()
    assert (values["mean"].item(), values["deviation"].item()) == (2.0, 1.0)


def test_bins_are_positive():
    with pytest.raises(ValueError, match="bins must be positive, got 0"):
        PairCalibration(bins=0)


def test_states_of_ranks_are_summed():
    """What two ranks hold, put together as it is between ranks: by each state's `dist_reduce_fx`."""
    whole, expected = {}, oracle()
    for kind, columns in ((PairAccuracy, 2), (PairCalibration, 2), (LengthBias, 4), (Moments, 1)):
        ranks = kind(), kind()
        for rank, part in zip(ranks, (slice(0, 9), slice(9, None)), strict=True):
            rank.update(*[column[part] for column in pairs()[:columns]])
        ranks[0].merge_state(ranks[1])
        whole |= {name: float(value) for name, value in ranks[0].compute().items()}
    assert whole == pytest.approx(expected)
