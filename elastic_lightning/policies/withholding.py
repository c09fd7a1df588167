"""Tokens that may not be drawn: they are taken out of the logits, and what they weighed is kept for the total."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic_lightning.policies.special_tokens import Ends, end_ids

if TYPE_CHECKING:
    from elastic_lightning.policies.sampling import Sampling


def withhold_end(logits: Tensor, sampling: Sampling, position: int | Tensor, eos_token_id: Ends) -> Tensor | None:
    """Set the ends' logits to -inf, in place in logits [B, V], at positions where none may be drawn (a number, or a
    tensor of one). Returns the logarithm of what they weighed [B], -inf where they may be drawn; None where they may be
    drawn anywhere."""
    ends = end_ids(eos_token_id)
    if not ends or sampling.first_end == 0:
        return None
    columns = torch.stack([logits[:, end] for end in ends], dim=-1)
    early = torch.as_tensor(position < sampling.first_end, device=logits.device)
    for end, column in zip(ends, columns.unbind(dim=-1), strict=True):
        logits[:, end] = column.masked_fill(early, -torch.inf)
    return columns.logsumexp(dim=-1).masked_fill(~early, -torch.inf)


def withhold_textless(logits: Tensor, textless: Tensor | None) -> Tensor | None:
    """Set the logits of ids without text [N] to -inf, in place in logits [B, V]; returns the logarithm of what they
    weighed [B], None where there are none."""
    if textless is None:
        return None
    weighed = logits.index_select(-1, textless).logsumexp(dim=-1)
    logits.index_fill_(-1, textless, -torch.inf)
    return weighed
