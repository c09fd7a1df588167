"""The reference policy theta_0: what drift is measured against, and what Elastic Reset returns to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from elastic_lightning.errors import UserError
from elastic_lightning.policies.batches import Prompts, Responses
from elastic_lightning.policies.language_model import PolicyLM

ReferenceKind = Literal["auto", "adapter_off", "frozen_copy"]


class FrozenCopy(nn.Module):
    """A copy of the policy as it was at the start. Its weights are also theta_0 for Elastic Reset.

    Weights that are not trained (below `trainable_layers`, or the base of an adapter) are the policy's own: the copy
    costs what is trained.
    """

    def __init__(self, lm: PolicyLM) -> None:
        super().__init__()
        self.lm = lm.copy()

    @torch.no_grad()
    def logprobs(
        self, prompts: Prompts, responses: Responses, temperature: float = 1.0, trunk: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities [B, T] of the responses, 0 at padding."""
        hidden = self.lm.response_hidden(prompts, responses, trunk=trunk)
        return self.lm.token_statistics(hidden, responses, temperature).logprobs

    @torch.no_grad()
    def response_logits(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Logits [B, T, V] that predict each response token."""
        return self.lm.response_logits(prompts, responses)

    def weights(self) -> dict[str, Tensor]:
        """Weights by the names that the policy's own parameters have."""
        return dict(self.lm.named_parameters())


class AdapterOff:
    """The policy with its adapter switched off: no memory, but only theta_0 while the base model is theta_0."""

    def __init__(self, lm: PolicyLM) -> None:
        self.lm = lm

    @torch.no_grad()
    def logprobs(
        self, prompts: Prompts, responses: Responses, temperature: float = 1.0, trunk: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities [B, T] of the responses, 0 at padding."""
        with self.lm.adapter_off():
            hidden = self.lm.response_hidden(prompts, responses, trunk=trunk)
            return self.lm.token_statistics(hidden, responses, temperature).logprobs

    @torch.no_grad()
    def response_logits(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Logits [B, T, V] that predict each response token."""
        with self.lm.adapter_off():
            return self.lm.response_logits(prompts, responses)


def make_reference(lm: PolicyLM, kind: ReferenceKind = "auto", unmerged_adapter: bool = False):
    """The reference for a policy: adapter off where there is a fresh adapter, else a frozen copy.

    Raises:
        UserError: `adapter_off` without an adapter, or with one that was trained before (adapter off would then be the
            model *before* supervised fine-tuning, so KL and resets would pull towards the wrong model).
    """
    if kind == "auto":
        kind = "adapter_off" if lm.has_adapter and not unmerged_adapter else "frozen_copy"
    if kind == "frozen_copy":
        return FrozenCopy(lm)
    if not lm.has_adapter:
        raise UserError("reference: adapter_off needs a LoRA policy; use frozen_copy, or give `policy.lora`")
    if unmerged_adapter:
        raise UserError(
            "reference: adapter_off is wrong for a policy loaded from an unmerged adapter: with the adapter off it is "
            "the model before fine-tuning, not the policy you start from; merge the adapter first, or use frozen_copy"
        )
    return AdapterOff(lm)
