"""The policy and its value function."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic_lightning.functional import entropy, token_logprobs
from elastic_lightning.policies.causal import CausalLM, Prompts, Responses


class Evaluation(NamedTuple):
    """A policy's view of given responses, each [B, T]: log-probabilities and entropy in nats, and values."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class ActorCritic(nn.Module):
    """A language model with a value head on its last hidden state.

    The head starts at zero, so the first advantages are the rewards themselves. `separate_value_trunk` gives the value
    function a transformer of its own, a copy of the policy's: twice the memory and time, no interference.
    """

    def __init__(self, lm: CausalLM, separate_value_trunk: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = nn.Linear(lm.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_trunk = copy.deepcopy(lm.backbone) if separate_value_trunk else None

    def forward(
        self, prompts: Prompts, responses: Responses, temperature: float = 1.0, entropy_gradient: bool = True
    ) -> Evaluation:
        """Log-probabilities under the temperature-scaled, untruncated distribution; entropy of the same; values.

        Without `entropy_gradient` the entropy is only measured, which saves its share of the backward pass.
        """
        hidden = self.lm.response_hidden(prompts, responses)
        logits = scale(self.lm.logits(hidden), temperature)
        values = self.values(prompts, responses) if self.value_trunk is not None else self.value(hidden)
        tokens = responses.tokens.masked_fill(~responses.mask, 0)  # a pad token may lie outside the vocabulary
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            entropies = entropy(logits)
        return Evaluation(token_logprobs(logits, tokens), entropies, values)

    def value(self, hidden: Tensor) -> Tensor:
        """Values [...] of hidden states [..., H], in float32."""
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()

    def values(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Values [B, T] before each response token."""
        return self.value(self.lm.response_hidden(prompts, responses, self.value_trunk))


def scale(logits: Tensor, temperature: float) -> Tensor:
    """Float32 logits divided by the temperature; no copy where there is nothing to do."""
    return logits.float() if temperature == 1 else logits.float() / temperature
