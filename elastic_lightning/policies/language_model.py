"""What causal models and encoder-decoders have in common as policies: hidden states, and what follows from them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.functional import TokenLoss, TokenStatistics, output_loss, output_statistics
from elastic_lightning.policies.batches import PairedTexts, Prompts, Responses
from elastic_lightning.policies.checked_model import CheckedModel
from elastic_lightning.policies.encoding import pad
from elastic_lightning.policies.special_tokens import DrawnTokens, end_tokens, textless_tokens
from elastic_lightning.policies.text import Texts


class PolicyLM(CheckedModel):
    """A Hugging Face language model (plain or with a peft adapter) that yields hidden states at response positions.

    Hidden state t is the one that *predicts* response token t, so logits, values and log-probabilities made from it
    are aligned with the response. Logits come from the model's own output layer on those states alone: no [B, P+T, V]
    tensor is ever made. A subclass knows how its architecture reads a prompt and writes a response; nothing else does.

    Args:
        model: in eval mode, dropout switched off.
        gradient_checkpointing: recompute activations in the backward pass: one more forward pass of the layers.

    Raises:
        UserError: the architecture does more to its logits than this class knows of (soft-capping or scaling), or its
            forward pass fails.
    """

    separator: str  # between a prompt and its response where both are shown

    def __init__(self, model: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__(model)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # transformers renamed it on the way to version 6
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._hidden = self.forward_hidden

    # What an architecture decides -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The transformer below the output layer; peft puts its adapters inside, so they are active here."""

    @staticmethod
    @abstractmethod
    def forward_hidden(backbone: nn.Module, *inputs: Tensor) -> Tensor:
        """The forward pass of the update: last hidden states [B, L, H] from a `backbone` and tensors."""

    @abstractmethod
    def response_hidden(
        self, prompts: Prompts, responses: Responses, backbone: nn.Module | None = None, trunk: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, H] that predict each response token.

        Args:
            prompts: B of them.
            responses: B of them.
            backbone: another transformer of this shape; the model's own by default.
            trunk: what `CausalLM.trunk_hidden` gave for these texts: the frozen layers are then not run.
        """

    @abstractmethod
    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Any, Tensor]:
        """Read the prompts; returns the decode state, with room for `new_tokens`, and the hidden states [B, H] that
        predict the first new token."""

    @abstractmethod
    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Append one token a row [B]; returns the hidden states [B, H] that predict the next."""

    @abstractmethod
    def takes_static_masks(self, columns: int) -> bool:
        """Whether `GraphSampler` can decode with a cache of so many columns."""

    @abstractmethod
    def encode_rows(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None
    ) -> list[list[int]]:
        """Token ids of texts as prompts, in the tokenizer's `Frame`; cut at the beginning to `longest` tokens."""

    @abstractmethod
    def decode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        responses: Responses,
        special_tokens: bool = False,
    ) -> Texts:
        """The texts of prompts and responses; `special_tokens` keeps those within them."""

    @abstractmethod
    def check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise a `UserError` when prompts and responses of these lengths do not fit the model's positions."""

    # What follows from hidden states ----------------------------------------------------------------------------

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., H]."""
        logits = self._output_layer(self._scaled(hidden))
        return logits if self._final_bias is None else logits + self._final_bias

    def response_logits(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Logits [B, T, V] that predict each response token."""
        return self.logits(self.response_hidden(prompts, responses))

    def token_statistics(self, hidden: Tensor, responses: Responses, temperature: float = 1.0) -> TokenStatistics:
        """Log-probabilities and entropy [B, T] of the responses, 0 at padding, from `response_hidden`; no gradient."""
        mask, states = responses.mask, self._scaled(hidden[responses.mask])
        flat = output_statistics(states, self._output_layer.weight, self._bias, responses.tokens[mask], temperature)
        return _unflatten(flat, mask)

    def token_loss(
        self, hidden: Tensor, responses: Responses, loss: TokenLoss, temperature: float = 1.0
    ) -> tuple[Tensor, TokenStatistics]:
        """A loss over the N valid tokens, see `functional.output_loss`, and the statistics [B, T] without gradient."""
        mask, states = responses.mask, self._scaled(hidden[responses.mask])
        tokens = responses.tokens[mask]
        total, flat = output_loss(states, self._output_layer.weight, self._bias, tokens, loss, temperature)
        return total, _unflatten(flat, mask)

    @torch.no_grad()
    def pair_statistics(self, pairs: PairedTexts) -> TokenStatistics:
        """`token_statistics` [B, T] of the targets, given their sources."""
        return self.token_statistics(self.response_hidden(*pairs), pairs.target)

    def pair_nll(self, pairs: PairedTexts) -> Tensor:
        """Negative log-likelihood of the targets given their sources, in nats, summed over tokens; differentiable."""
        hidden = self.response_hidden(*pairs)
        return self.token_loss(hidden, pairs.target, lambda logprobs, entropy, part: -logprobs.sum())[0]

    # Texts ------------------------------------------------------------------------------------------------------

    def encode(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Prompts:
        """B texts as prompts."""
        return Prompts(*pad(self.encode_rows(tokenizer, texts), tokenizer.pad_token_id, left=True))

    def ends(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """All tokens that end a response: the tokenizer's, and those of the model's generation config."""
        generation_config = getattr(self._plain, "generation_config", None)
        return end_tokens(tokenizer, generation_config, self._output_layer.out_features)

    def drawn_tokens(self, tokenizer: PreTrainedTokenizerBase) -> DrawnTokens:
        """What sampling from this model must know of its tokenizer."""
        textless = textless_tokens(tokenizer, self._output_layer.out_features)
        return DrawnTokens(self.ends(tokenizer), tokenizer.pad_token_id, textless)

    def copy(self) -> PolicyLM:
        """A frozen copy that shares the weights which are not trained."""
        shared = {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False)

    def compile_update(self) -> None:
        """Compile the forward pass of the update, once for all batch sizes and lengths."""
        self._hidden = torch.compile(self.forward_hidden, dynamic=True)

    @property
    def _bias(self) -> Tensor | None:
        """All that is added to the product of states and the output layer's weight [V]."""
        own, final = self._output_layer.bias, self._final_bias
        return own if final is None else final if own is None else own + final

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.hidden_scale == 1 else hidden * self.hidden_scale


def _unflatten(statistics: TokenStatistics, mask: Tensor) -> TokenStatistics:
    """Statistics [N] of the valid tokens in their places [B, T]; 0 at padding."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return TokenStatistics(*(zeros.masked_scatter(mask, values) for values in statistics))
