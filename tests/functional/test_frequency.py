"""Token counts and the divergence between them, against plain Python."""

import math
from collections import Counter

import pytest
import torch

from elastic_lightning.functional import jensen_shannon, token_counts


def divergence(first, second):
    """By the definition: the mean KL of the two shares to their middle."""
    p, q = ({token: n / sum(counts.values()) for token, n in counts.items()} for counts in (first, second))
    middle = {token: (p.get(token, 0) + q.get(token, 0)) / 2 for token in p.keys() | q.keys()}
    return sum(share * math.log(share / middle[token]) / 2 for side in (p, q) for token, share in side.items() if share)


def test_counts_are_those_of_the_valid_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.randint(7, (6, 9), generator=generator), torch.rand(6, 9, generator=generator) < 0.6
    pairs = zip(tokens.flatten().tolist(), mask.flatten().tolist(), strict=True)
    counted = Counter(token for token, valid in pairs if valid)
    counts = token_counts(tokens.masked_fill(~mask, 99), mask, 8)  # padding may lie outside the vocabulary
    assert counts.tolist() == [counted[token] for token in range(8)]
    assert counts.dtype == torch.int64
    with pytest.raises(IndexError):
        token_counts(torch.tensor([[8]]), torch.tensor([[True]]), 8)


def test_divergence_by_hand():
    # Shares (1, 0) and (1/2, 1/2), middle (3/4, 1/4).
    expected = (math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2
    assert jensen_shannon(torch.tensor([3, 0]), torch.tensor([5, 5])).item() == pytest.approx(expected)


def test_divergence_is_the_definition():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        first, second = (torch.randint(5, (12,), generator=generator) for _ in range(2))
        expected = divergence(dict(enumerate(first.tolist())), dict(enumerate(second.tolist())))
        assert jensen_shannon(first, second).item() == pytest.approx(expected)
        assert jensen_shannon(second, first).item() == pytest.approx(expected)
        assert jensen_shannon(1000 * first, second).item() == pytest.approx(expected)  # shares, not counts


def test_bounds_and_nothing():
    assert jensen_shannon(torch.tensor([4, 2, 0]), torch.tensor([2, 1, 0])).item() == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(torch.tensor([4, 0]), torch.tensor([0, 1])).item() == pytest.approx(math.log(2))
    assert math.isnan(jensen_shannon(torch.tensor([4, 0]), torch.tensor([0, 0])))


def test_the_bias_is_as_stated():
    # Twice 2,000 tokens of one uniform distribution over 101: (K - 1) * (1/n + 1/m) / 8 = 0.0125.
    draws = torch.randint(101, (40, 2, 2000), generator=torch.Generator().manual_seed(0))
    counts = [[torch.bincount(side, minlength=101) for side in pair] for pair in draws]
    mean = torch.stack([jensen_shannon(*pair) for pair in counts]).mean().item()
    assert mean == pytest.approx(100 * (2 / 2000) / 8, rel=0.05)
