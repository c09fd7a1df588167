"""A copy of the policy to decode with, in a precision of its own."""

from __future__ import annotations

import copy

import torch
from torch import nn

from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.reading import usable


class RolloutCopy(nn.Module):
    """The policy's weights in another type. Decoding reads every weight once a token: half the bytes, half the time.

    Buffers (rotary frequencies) keep their type: in bfloat16 a position beyond 256 has no exact number. Tables of
    sinusoids are added to embeddings, so they have the type of these.

    Raises:
        UserError: the model does not compute in this type what it is to compute.
    """

    def __init__(self, lm: PolicyLM, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm = copy.deepcopy(lm).requires_grad_(False)
        for parameter in self.lm.parameters():
            parameter.data = parameter.data.to(dtype)
        for module in self.lm.modules():
            if "Sinusoidal" in type(module).__name__:
                module.to(dtype)
        with usable(f"{type(lm.model).__name__} in {str(dtype).removeprefix('torch.')} (execution.rollout_dtype)"):
            self.lm.check_reading()

    @torch.no_grad()
    def refresh(self, lm: PolicyLM) -> None:
        """Take over the policy's trained weights; the others are what they were."""
        own = dict(self.lm.named_parameters())
        trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
        torch._foreach_copy_([own[name] for name in trained], list(trained.values()))
