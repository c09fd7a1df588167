"""The policy and its value function."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic_lightning.functional import TokenLoss
from elastic_lightning.policies.batches import Prompts, Responses
from elastic_lightning.policies.language_model import PolicyLM


class Evaluation(NamedTuple):
    """A policy's view of given responses, each [B, T]: log-probabilities and entropy in nats, and a critic's values."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class ActorCritic(nn.Module):
    """A language model with a value head on its last hidden state; without one where no `critic` is wanted.

    The head starts at zero, so the first advantages are the rewards themselves. `separate_value_trunk` gives the value
    function a transformer of its own, a copy of the policy's: twice the memory and time, no interference.
    """

    def __init__(self, lm: PolicyLM, separate_value_trunk: bool = False, critic: bool = True) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.hidden_size, 1) if critic else None
        for weight in [] if self.value_head is None else self.value_head.parameters():
            nn.init.zeros_(weight)
        self.value_trunk = _trunk_copy(lm) if separate_value_trunk else None

    def forward(
        self,
        prompts: Prompts,
        responses: Responses,
        loss: TokenLoss,
        temperature: float = 1.0,
        trunk: Tensor | None = None,
    ) -> tuple[Tensor, Evaluation]:
        """A loss of each token's log-probability and entropy, differentiable, and the evaluation it was made from.

        In the evaluation only the values carry a gradient: `loss` is differentiated on the way, see
        `elastic_lightning.functional.output_loss`. `trunk` is that of `PolicyLM.response_hidden`.
        """
        hidden = self.lm.response_hidden(prompts, responses, trunk=trunk)
        total, statistics = self.lm.token_loss(hidden, responses, loss, temperature)
        return total, Evaluation(*statistics, self.values(prompts, responses, hidden, trunk))

    def evaluate(
        self, prompts: Prompts, responses: Responses, temperature: float = 1.0, trunk: Tensor | None = None
    ) -> Evaluation:
        """Log-probabilities and entropy of the temperature-scaled, untruncated distribution, without gradient; values
        with."""
        hidden = self.lm.response_hidden(prompts, responses, trunk=trunk)
        statistics = self.lm.token_statistics(hidden, responses, temperature)
        return Evaluation(*statistics, self.values(prompts, responses, hidden, trunk))

    def value(self, hidden: Tensor) -> Tensor | None:
        """Values [...] of hidden states [..., H], in float32 under autocast too; None without a critic."""
        if self.value_head is None:
            return None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()

    def values(
        self, prompts: Prompts, responses: Responses, hidden: Tensor | None = None, trunk: Tensor | None = None
    ) -> Tensor | None:
        """Values [B, T] before each response token; `hidden` are the policy's own states, where they are there."""
        if self.value_trunk is not None:
            hidden = self.lm.response_hidden(prompts, responses, self.value_trunk, trunk)
        elif hidden is None:
            hidden = self.lm.response_hidden(prompts, responses, trunk=trunk)
        return self.value(hidden)


def scale(logits: Tensor, temperature: float) -> Tensor:
    """Float32 logits divided by the temperature; no copy where there is nothing to do."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def _trunk_copy(lm: PolicyLM) -> nn.Module:
    """A transformer that starts as the policy's and shares the weights which are not trained."""
    shared = {id(parameter): parameter for parameter in lm.parameters() if not parameter.requires_grad}
    return copy.deepcopy(lm.backbone, shared)
