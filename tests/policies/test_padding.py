import torch
from policy_cases import ROWS, left_padded

from elastic_lightning.policies import Prompts, right_padded


def test_rows_begin_at_the_first_column():
    tokens, mask = right_padded(left_padded(ROWS, extra=2, pad=99))
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == ROWS
    assert mask.int().diff(dim=1).max() == 0, "real tokens after padding"
    assert tokens[~mask].unique().tolist() == [99]


def test_full_rows_and_empty_ones_stay():
    tokens = torch.tensor([[1, 2, 3], [7, 7, 7]])
    prompts = Prompts(tokens, torch.tensor([[True] * 3, [False] * 3]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(right_padded(prompts), prompts, strict=True))
