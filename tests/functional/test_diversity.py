import math

import pytest
import torch

from elastic_lightning.functional import distinct_n, ngrams, unique_rows

TOKENS = torch.tensor([[1, 2, 1, 2, 9], [1, 2, 3, 9, 9], [9, 9, 9, 9, 9]])
MASK = torch.tensor([[True] * 4 + [False], [True] * 3 + [False] * 2, [False] * 5])


def ngram_oracle(n):
    rows = [row[keep].tolist() for row, keep in zip(TOKENS, MASK, strict=True)]
    return [tuple(row[at : at + n]) for row in rows for at in range(len(row) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_ngrams_stay_inside_the_valid_tokens_of_a_row(n):
    got = ngrams(TOKENS, MASK, n)
    assert got.shape[1] == n
    assert [tuple(row) for row in got.tolist()] == ngram_oracle(n)


def test_unique_rows_of_some_and_of_none():
    assert unique_rows(torch.tensor([[2, 1], [1, 2], [2, 1]])).tolist() == [[1, 2], [2, 1]]
    assert unique_rows(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_distinct_n_by_hand():
    assert distinct_n(TOKENS, MASK, 1).item() == pytest.approx(3 / 7)  # 1 2 3
    assert distinct_n(TOKENS, MASK, 2).item() == pytest.approx(3 / 5)  # 12 21 23
    assert distinct_n(TOKENS, MASK, 3).item() == pytest.approx(3 / 3)  # 121 212 123
    assert math.isnan(distinct_n(TOKENS, MASK, 6).item())
