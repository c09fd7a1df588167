"""The two sides on which a batch is padded."""

import torch

from elastic_lightning.policies.causal import Prompts


def right_padded(prompts: Prompts) -> Prompts:
    """The same prompts with their padding at the end: encoders with absolute positions count from the first column."""
    length = prompts.tokens.shape[1]
    first = length - prompts.mask.sum(dim=1, keepdim=True)
    columns = (torch.arange(length, device=prompts.tokens.device) + first) % length
    return Prompts(prompts.tokens.gather(1, columns), prompts.mask.gather(1, columns))
