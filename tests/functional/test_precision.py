import pytest
import torch

from elastic_lightning.functional import at_least_float32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bool, torch.float32),
    ],
)
def test_low_precision_is_raised_and_high_precision_kept(given, expected):
    assert at_least_float32(torch.zeros(2, dtype=given)).dtype == expected
