"""What goes into a policy and what comes out of it, as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Prompts(NamedTuple):
    """What a policy is asked: `tokens` [B, P] int64, left-padded; `mask` [B, P] bool, True on real tokens."""

    tokens: Tensor
    mask: Tensor


class Responses(NamedTuple):
    """What a policy answered: `tokens` [B, T] int64, padded at the end; `mask` [B, T] bool, True up to and with eos."""

    tokens: Tensor
    mask: Tensor


class PairedTexts(NamedTuple):
    """Texts and what they are to be answered with: B `source` prompts and their B `target` responses."""

    source: Prompts
    target: Responses

    def rows(self, index: Tensor) -> PairedTexts:
        """The given rows."""
        return PairedTexts(*(type(part)(*(tensor[index] for tensor in part)) for part in self))

    def trimmed(self) -> PairedTexts:
        """Without the columns that are padding in every row."""
        source, target = (int(part.mask.sum(dim=1).max()) for part in self)
        skipped = self.source.tokens.shape[1] - source
        return PairedTexts(
            Prompts(*(tensor[:, skipped:] for tensor in self.source)),
            Responses(*(tensor[:, :target] for tensor in self.target)),
        )


def right_padded(prompts: Prompts) -> Prompts:
    """The same prompts with their padding at the end: encoders with absolute positions count from the first column."""
    length = prompts.tokens.shape[1]
    first = length - prompts.mask.sum(dim=1, keepdim=True)
    columns = (torch.arange(length, device=prompts.tokens.device) + first) % length
    return Prompts(prompts.tokens.gather(1, columns), prompts.mask.gather(1, columns))
