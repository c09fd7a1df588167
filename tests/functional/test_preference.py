"""Losses and measures of preferences against hand-computed numbers and plain loops."""

import math

import numpy as np
import pytest
import torch

from elastic_lightning.functional import (
    bradley_terry_loss,
    confidence_bins,
    correlation,
    correlation_sums,
    expected_calibration_error,
    right_pairs,
    wilson_interval,
)


def test_the_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    margin = torch.tensor([0.5, 1.0])
    expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(3))) / 2
    assert bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(expected)
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2))


def test_the_loss_is_finite_where_the_scores_are_far_apart():
    scores = torch.tensor([0.0], requires_grad=True)
    loss = bradley_terry_loss(scores, torch.tensor([1000.0]))
    loss.backward()
    assert loss.item() == 1000.0 and scores.grad.item() == -1.0


def test_equal_scores_are_half_right():
    assert right_pairs(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (1, 10), (81, 263), (15, 148), (2.5, 5)])
def test_wilsons_interval_solves_its_equation(right, total):
    """Its ends are the two shares p that lie z standard errors of their own away from what was seen."""
    z, seen = 1.959963984540054, right / total
    grid = np.linspace(0, 1, 2_000_001)
    inside = grid[(seen - grid) ** 2 <= z * z * grid * (1 - grid) / total + 1e-18]
    assert wilson_interval(right, total) == pytest.approx((inside.min(), inside.max()), abs=1e-6)


def test_wilsons_interval_as_published():
    # Newcombe (1998), table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert all(map(math.isnan, wilson_interval(0, 0)))


def test_calibration_by_hand():
    odds = torch.tensor([0.6, 0.6, 0.9, 0.95], dtype=torch.float64).logit()  # confidence of each pair
    chosen, rejected = torch.stack([odds[0], torch.zeros(()), odds[2], odds[3]]), torch.zeros(4).double()
    rejected[1] = odds[1]  # the second pair is wrong
    sums = confidence_bins(chosen, rejected, 2)
    torch.testing.assert_close(
        sums, torch.tensor([[2, 2], [1.2, 1.85], [1, 2]], dtype=torch.float64), rtol=0, atol=1e-12
    )
    # |1.2 - 1| pairs too sure in the first bin, |1.85 - 2| too modest in the second, of four
    assert expected_calibration_error(sums).item() == pytest.approx((0.2 + 0.15) / 4)


def test_calibration_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (3 * torch.randn(500, generator=generator) for _ in range(2))
    chosen[:3] = rejected[:3]  # no choice: confidence 0.5, half right
    chosen[3], rejected[3] = 500.0, 0.0  # confidence 1 belongs to the last bin
    bins = [[] for _ in range(10)]
    for better, worse in zip(chosen.tolist(), rejected.tolist(), strict=True):
        confidence = 1 / (1 + math.exp(-abs(better - worse)))
        bins[min(int((confidence - 0.5) * 20), 9)].append(
            (confidence, 0.5 if better == worse else float(better > worse))
        )
    expected = sum(
        len(pairs) / 500 * abs(np.mean([c for c, _ in pairs]) - np.mean([r for _, r in pairs]))
        for pairs in bins
        if pairs
    )
    assert expected_calibration_error(confidence_bins(chosen, rejected, 10)).item() == pytest.approx(expected)


def test_correlation_is_numpys():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator) + 20
    y = (x * 3 + 5 * torch.randn(200, generator=generator)).round().long()
    expected = np.corrcoef(x.double().numpy(), y.numpy())[0, 1]
    assert correlation(correlation_sums(x, y)).item() == pytest.approx(expected, rel=1e-9)
    halves = correlation_sums(x[:50], y[:50]) + correlation_sums(x[50:], y[50:])
    assert correlation(halves).item() == pytest.approx(expected, rel=1e-9)
    assert correlation(correlation_sums(x, torch.full((200,), 7))).isnan()
