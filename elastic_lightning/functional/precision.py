"""The precision in which the rest of the package computes."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is already float64.

    bfloat16 carries three decimal digits: a difference of two log-probabilities would be all rounding.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
