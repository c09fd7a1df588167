"""PPO on other paths than its own, to compare with: results and learning must not depend on the path."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_lightning.algorithms import PPO
from elastic_lightning.functional import TokenLoss, TokenStatistics, entropy, output_layer, token_logprobs
from elastic_lightning.policies import CausalLM, Responses
from elastic_lightning.policies.actor_critic import scale


class PlainLM(CausalLM):
    """Log-probabilities and entropy from one [B, T, V] tensor of float32 logits and automatic gradients.

    `entropy_gradient` says whether the loss depends on the entropy.
    """

    entropy_gradient = True

    def token_loss(
        self, hidden: Tensor, responses: Responses, loss: TokenLoss, temperature: float = 1.0
    ) -> tuple[Tensor, TokenStatistics]:
        logprobs, entropies = self._whole(hidden, responses, temperature)
        total = loss(logprobs[responses.mask], entropies[responses.mask], slice(None))
        return total, TokenStatistics(logprobs.detach() * responses.mask, entropies.detach() * responses.mask)

    @torch.no_grad()
    def token_statistics(self, hidden: Tensor, responses: Responses, temperature: float = 1.0) -> TokenStatistics:
        return TokenStatistics(*(part * responses.mask for part in self._whole(hidden, responses, temperature)))

    def _whole(self, hidden: Tensor, responses: Responses, temperature: float) -> tuple[Tensor, Tensor]:
        logits = scale(self.logits(hidden), temperature)
        logprobs = token_logprobs(logits, responses.tokens.masked_fill(~responses.mask, 0))
        with torch.set_grad_enabled(self.entropy_gradient and torch.is_grad_enabled()):
            return logprobs, entropy(logits)


class PlainPPO(PPO):
    """Every output layer whole, of policy and reference (a frozen copy): the path that the others are measured by."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for lm in (self.actor.lm, self.reference.lm):
            lm.__class__ = PlainLM
            lm.entropy_gradient = self.config.entropy_coefficient != 0


class ChunkedPPO(PPO):
    """Chunks of a few tokens on a vocabulary so small that one chunk would hold all of them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        output_layer.CHUNK_BYTES = 64 * 4 * self.actor.lm.config.vocab_size
        output_layer.BLOCK_BYTES = output_layer.CHUNK_BYTES // 8


class WholePPO(PPO):
    """With `trainable_layers`, but every forward pass runs the frozen layers anew."""

    def frozen_hidden(self, *args) -> Tensor | None:
        return None
