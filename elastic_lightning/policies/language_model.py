"""What causal models and encoder-decoders have in common as policies: hidden states, and what follows from them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.functional import TokenLoss, TokenStatistics, output_loss, output_statistics
from elastic_lightning.policies.batches import Prompts, Responses
from elastic_lightning.policies.text import Texts

PROBE = 50.0  # a logit that any soft-capping or scaling changes


class PolicyLM(nn.Module):
    """A Hugging Face model (plain or with a peft adapter) that yields hidden states at response positions.

    Hidden state t is the one that *predicts* response token t, so logits, values and log-probabilities made from it
    are aligned with the response. Logits come from the model's own output layer on those states alone: no [B, P+T, V]
    tensor is ever made. A subclass knows how its architecture reads a prompt; nothing else has to.

    Args:
        model: in eval mode, dropout switched off.
        gradient_checkpointing: recompute activations in the backward pass: one more forward pass of the layers.

    Raises:
        UserError: the architecture does more to its logits than an output layer, a constant scale of its input and a
            constant bias (e.g. soft-capping).
    """

    def __init__(self, model: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.hidden_scale, bias = self._read_head()
        self.register_buffer("logit_bias", bias, persistent=False)
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
        """The forward pass of the update: last hidden states from `backbone` and tensors."""

    @abstractmethod
    def response_hidden(
        self,
        prompts: Prompts,
        responses: Responses,
        backbone: nn.Module | None = None,
        trunk: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, H] that predict each response token.

        Args:
            prompts: B of them.
            responses: B of them.
            backbone: another transformer of this shape; the model's own by default.
            trunk: what `trunk_hidden` gave for these texts, where the architecture has it: the frozen layers are then
                not run.
        """

    @abstractmethod
    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Any, Tensor]:
        """Read the prompts; returns the decode state and the hidden states [B, H] that predict the first new token.

        The state has room for `new_tokens` more.
        """

    @abstractmethod
    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Append one token a row [B]; returns the hidden states [B, H] that predict the next."""

    @abstractmethod
    def decode(self, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, responses: Responses) -> Texts:
        """The texts of prompts and responses."""

    @abstractmethod
    def check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise a `UserError` when prompts and responses of these lengths do not fit the model's positions."""

    @abstractmethod
    def _probe(self) -> tuple[Tensor, Tensor]:
        """On two tokens: the hidden states that the backbone gives, and the whole model's logits."""

    def takes_static_masks(self, columns: int) -> bool:
        """Whether decoding can be captured in a CUDA graph with a cache of so many columns."""
        return False

    # What follows from hidden states ----------------------------------------------------------------------------

    @property
    def config(self):
        return self.model.config

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def adapter_off(self) -> AbstractContextManager:
        """Within this context the model is its base model."""
        return self.model.disable_adapter()

    def copy(self) -> PolicyLM:
        """A frozen copy that shares the weights which are not trained."""
        shared = {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False)

    def compile_update(self) -> None:
        """Compile the forward pass of the update, once for all batch sizes and lengths."""
        self._hidden = torch.compile(self.forward_hidden, dynamic=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., H]."""
        logits = self._output_layer(self._scaled(hidden))
        return logits if self.logit_bias is None else logits + self.logit_bias

    def response_logits(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Logits [B, T, V] that predict each response token."""
        return self.logits(self.response_hidden(prompts, responses))

    def token_statistics(self, hidden: Tensor, responses: Responses, temperature: float = 1.0) -> TokenStatistics:
        """Log-probabilities and entropy [B, T] of the responses, 0 at padding, from `response_hidden`; no gradient."""
        mask = responses.mask
        flat = output_statistics(
            self._scaled(hidden[mask]), self._output_layer.weight, self._bias, responses.tokens[mask], temperature
        )
        return _unflatten(flat, mask)

    def token_loss(
        self, hidden: Tensor, responses: Responses, loss: TokenLoss, temperature: float = 1.0
    ) -> tuple[Tensor, TokenStatistics]:
        """A loss over the N valid tokens, see `functional.output_loss`, and the statistics [B, T] without gradient."""
        mask, weight = responses.mask, self._output_layer.weight
        tokens = responses.tokens[mask]
        total, flat = output_loss(self._scaled(hidden[mask]), weight, self._bias, tokens, loss, temperature)
        return total, _unflatten(flat, mask)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.hidden_scale == 1 else hidden * self.hidden_scale

    @property
    def _bias(self) -> Tensor | None:
        own = self._output_layer.bias
        return own if self.logit_bias is None else self.logit_bias if own is None else own + self.logit_bias

    @property
    def _output_layer(self) -> nn.Linear:
        return self._plain.get_output_embeddings()

    @property
    def _plain(self) -> nn.Module:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @torch.no_grad()
    def _read_head(self) -> tuple[float, Tensor | None]:
        """What the model multiplies hidden states by before the output layer (T5), and adds to the logits after it [V]
        (Marian, BART; None for nothing)."""
        name = type(self._plain).__name__
        if type(self._output_layer) is not nn.Linear:
            raise UserError(
                f"the output layer of {name} is a {type(self._output_layer).__name__}, and only a plain linear layer "
                "is supported: leave it out of lora.targets"
            )
        probes = [self._probe_head(value) for value in (PROBE, -PROBE)]
        hidden, read, bias = probes[0]
        scale = (hidden.double() * read.double()).sum() / hidden.double().square().sum()
        scale = 1.0 if torch.allclose(scale, torch.ones(()).to(scale), rtol=1e-3) else float(scale)
        same = torch.allclose(hidden * scale, read, rtol=1e-3, atol=1e-3 * float(read.abs().max()))
        constant = all(torch.allclose(other, bias[..., :1, :], atol=1e-3) for other in (bias, probes[1][2]))
        if not same or not constant:
            raise UserError(
                f"{name} changes its logits after the output layer (soft-capping or scaling): such an architecture is "
                "not supported"
            )
        return scale, bias[0, 0].to(self._output_layer.weight.dtype) if bias.any() else None

    def _probe_head(self, value: float) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, what the output layer reads, and what the model adds to it when all logits are `value`."""
        read = []

        def replace(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
            read.append(args[0])
            return torch.full_like(logits, value)  # random weights give logits on which soft-capping hardly shows

        hook = self._output_layer.register_forward_hook(replace)
        try:
            hidden, logits = self._probe()
        finally:
            hook.remove()
        return hidden.float(), read[-1].float(), logits.float() - value


def _unflatten(statistics: TokenStatistics, mask: Tensor) -> TokenStatistics:
    """Statistics [N] of the valid tokens in their places [B, T]; 0 at padding."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return TokenStatistics(*(zeros.masked_scatter(mask, values) for values in statistics))
