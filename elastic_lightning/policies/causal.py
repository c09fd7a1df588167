"""A causal language model seen from its responses: hidden states and logits at the tokens a policy is judged on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from elastic_lightning.errors import UserError

PROBE = 50.0  # a logit that any soft-capping or scaling changes


class Prompts(NamedTuple):
    """What a policy is asked: `tokens` [B, P] int64, left-padded; `mask` [B, P] bool, True on real tokens."""

    tokens: Tensor
    mask: Tensor


class Responses(NamedTuple):
    """What a policy answered: `tokens` [B, T] int64, padded at the end; `mask` [B, T] bool, True up to and with eos."""

    tokens: Tensor
    mask: Tensor


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, H, capacity, D] allocated once; a step writes its slice and reads a growing view.

    The stock dynamic layer concatenates, which copies the whole cache at each token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def allocate(states: Tensor) -> Tensor:
            return states.new_empty(*states.shape[:2], self.capacity, states.shape[3])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.capacity:  # a slice past the end would swallow one token without a word
            raise IndexError(f"the cache holds {self.capacity} tokens: no room for {self.length}")
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


@dataclass
class Decoding:
    """A decode in flight: the cache, and which of its columns [B, capacity] hold real tokens."""

    cache: Cache
    mask: Tensor
    position: Tensor  # [B] position id of the next token
    length: int  # columns in use


class CausalLM(nn.Module):
    """A Hugging Face causal model (plain or with a peft adapter) that yields hidden states at response positions.

    Hidden state t is the one that *predicts* response token t, so logits, values and log-probabilities made from it
    are aligned with the response. Position ids count real tokens, so left padding changes nothing. Logits come from the
    model's own output layer on those states alone: no [B, P+T, V] tensor is ever made.

    Raises:
        UserError: the architecture changes its logits after the output layer (soft-capping or scaling), or decodes
            without a cache of keys and values (state-space models).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._check_head()
        self._check_cache()

    @property
    def config(self):
        return self.model.config

    @property
    def backbone(self) -> nn.Module:
        """The transformer below the output layer; peft puts its adapters inside, so they are active here."""
        return self._plain.base_model

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def adapter_off(self) -> AbstractContextManager:
        """Within this context the model is its base model."""
        return self.model.disable_adapter()

    def response_hidden(self, prompts: Prompts, responses: Responses, backbone: nn.Module | None = None) -> Tensor:
        """Hidden states [B, T, H] that predict each response token, from `backbone` (the model's own by default)."""
        tokens = torch.cat([prompts.tokens, responses.tokens], dim=1)[:, :-1]  # the last token predicts nothing
        mask = torch.cat([prompts.mask, responses.mask], dim=1)[:, :-1]
        output = (backbone or self.backbone)(
            input_ids=tokens.masked_fill(~mask, 0),
            attention_mask=mask.long(),
            position_ids=_position_ids(mask),
            use_cache=False,
        )
        return output.last_hidden_state[:, prompts.tokens.shape[1] - 1 :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., H]."""
        return self._plain.get_output_embeddings()(hidden)

    def response_logits(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Logits [B, T, V] that predict each response token."""
        return self.logits(self.response_hidden(prompts, responses))

    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Decoding, Tensor]:
        """Read the prompts; returns the decode state and the hidden states [B, H] that predict the first new token."""
        batch, length = prompts.tokens.shape
        cache = Cache(layers=[PreallocatedLayer(length + new_tokens) for _ in range(self.config.num_hidden_layers)])
        mask = torch.ones(batch, length + new_tokens, dtype=torch.bool, device=prompts.mask.device)
        mask[:, :length] = prompts.mask
        output = self.backbone(
            input_ids=prompts.tokens.masked_fill(~prompts.mask, 0),
            attention_mask=prompts.mask.long(),
            position_ids=_position_ids(prompts.mask),
            past_key_values=cache,
            use_cache=True,
        )
        state = Decoding(cache, mask, position=prompts.mask.sum(dim=1), length=length)
        return state, output.last_hidden_state[:, -1]

    def step(self, state: Decoding, tokens: Tensor) -> Tensor:
        """Append one token a row [B]; returns the hidden states [B, H] that predict the next."""
        state.length += 1
        output = self.backbone(
            input_ids=tokens[:, None],
            attention_mask=state.mask[:, : state.length].long(),
            position_ids=state.position[:, None],
            past_key_values=state.cache,
            use_cache=True,
        )
        state.position = state.position + 1
        return output.last_hidden_state[:, -1]

    @property
    def _plain(self) -> nn.Module:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @torch.no_grad()
    def _check_head(self) -> None:
        """The output layer reads the last hidden state, and what it returns are the logits."""
        tokens = torch.tensor([[0, 1]], device=next(self.model.parameters()).device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        read = [self.backbone(**inputs).last_hidden_state]

        def replace(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
            read.append(args[0])
            return torch.full_like(logits, PROBE)  # random weights give logits on which soft-capping hardly shows

        hook = self._plain.get_output_embeddings().register_forward_hook(replace)
        try:
            whole = self._plain(**inputs).logits
        finally:
            hook.remove()
        if not (whole == PROBE).all() or not torch.allclose(read[0].float(), read[-1].float(), rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{type(self._plain).__name__} changes its logits after the output layer (soft-capping or scaling): "
                "such an architecture is not supported"
            )

    @torch.no_grad()
    def _check_cache(self) -> None:
        """Every layer keeps its keys and values in the cache it is given, or reads those of another layer."""
        tokens = torch.tensor([[0, 1]], device=next(self.model.parameters()).device)
        try:
            state, _ = self.start(Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool)), new_tokens=0)
            written = sum(layer.length == 2 for layer in state.cache.layers)
        except (AttributeError, TypeError, ValueError):  # what hybrid models say to a layer that keeps no state
            written = 0
        if written < self.config.num_hidden_layers - (getattr(self.config, "num_kv_shared_layers", None) or 0):
            raise UserError(
                f"{type(self._plain).__name__} does not decode with a cache of keys and values (a state-space layer?): "
                "such an architecture is not supported"
            )


def _position_ids(mask: Tensor) -> Tensor:
    """Position of each real token among the real tokens of its row [B, L]; 0 on padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
