"""A causal language model seen from its responses: hidden states and logits at the tokens a policy is judged on."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from elastic_lightning.errors import UserError
from elastic_lightning.functional import TokenLoss, TokenStatistics, output_loss, output_statistics
from elastic_lightning.policies.layers import checkpointed, layer_stack, recorded, replayed, train_upper_layers

PROBE = 50.0  # a logit that any soft-capping or scaling changes


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


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, H, capacity, D] allocated once; a step writes its slice and reads a growing view.

    The stock dynamic layer concatenates, which copies the whole cache at each token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def allocate(states: Tensor) -> Tensor:  # zeros: what a mask hides must still be a number
            return states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])

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

    Args:
        model: in eval mode, dropout switched off.
        trainable_layers: train only this many upper layers and the last norm; all weights by default.
        gradient_checkpointing: recompute activations in the backward pass: one more forward pass of the layers.

    Raises:
        UserError: the architecture changes its logits after the output layer (soft-capping or scaling), or decodes
            without a cache of keys and values (state-space models).
    """

    def __init__(
        self, model: nn.Module, trainable_layers: int | None = None, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self._check_head()
        self._check_cache()
        self.trainable_layers = trainable_layers
        if trainable_layers is not None:
            train_upper_layers(model, self.backbone, trainable_layers)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # transformers renamed it on the way to version 6
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._hidden = _hidden

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

    def copy(self) -> CausalLM:
        """A frozen copy that shares the weights which are not trained."""
        shared = {id(parameter): parameter for parameter in self.parameters() if not parameter.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False)

    def compile_update(self) -> None:
        """Compile the forward pass of the update, once for all batch sizes and lengths."""
        self._hidden = torch.compile(_hidden, dynamic=True)

    # Responses as a whole ---------------------------------------------------------------------------------------

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
            trunk: what `trunk_hidden` gave for these texts: the frozen layers are then not run.
        """
        backbone = self.backbone if backbone is None else backbone
        train = torch.is_grad_enabled()
        with ExitStack() as contexts:
            if trunk is not None:
                contexts.enter_context(replayed(layer_stack(backbone), self._frozen_layers, trunk))
            if self.gradient_checkpointing and train:
                contexts.enter_context(checkpointed(layer_stack(backbone)))
            hidden = (self._hidden if train else _hidden)(backbone, *_sequence(prompts, responses))
        return hidden[:, prompts.tokens.shape[1] - 1 :]

    @torch.no_grad()
    def trunk_hidden(self, prompts: Prompts, responses: Responses) -> Tensor:
        """What leaves the frozen layers [B, P+T-1, H]: the same for policy, reference and every epoch."""
        stack = layer_stack(self.backbone)
        with recorded(stack, self._frozen_layers) as outputs:
            _hidden(self.backbone, *_sequence(prompts, responses))
        return outputs[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., H]."""
        return self._plain.get_output_embeddings()(hidden)

    def response_logits(self, prompts: Prompts, responses: Responses) -> Tensor:
        """Logits [B, T, V] that predict each response token."""
        return self.logits(self.response_hidden(prompts, responses))

    def token_statistics(self, hidden: Tensor, responses: Responses, temperature: float = 1.0) -> TokenStatistics:
        """Log-probabilities and entropy [B, T] of the responses, 0 at padding, from `response_hidden`; no gradient."""
        output, mask = self._output_layer, responses.mask
        flat = output_statistics(hidden[mask], output.weight, output.bias, responses.tokens[mask], temperature)
        return _unflatten(flat, mask)

    def token_loss(
        self, hidden: Tensor, responses: Responses, loss: TokenLoss, temperature: float = 1.0
    ) -> tuple[Tensor, TokenStatistics]:
        """A loss over the N valid tokens, see `functional.output_loss`, and the statistics [B, T] without gradient."""
        output, mask = self._output_layer, responses.mask
        tokens = responses.tokens[mask]
        total, flat = output_loss(hidden[mask], output.weight, output.bias, tokens, loss, temperature)
        return total, _unflatten(flat, mask)

    # Text without prompts ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def next_token_statistics(self, tokens: Tensor) -> TokenStatistics:
        """`token_statistics` [B, L-1] of each token but the first of text [B, L] without padding."""
        targets = tokens[:, 1:]
        hidden = self.backbone(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        return self.token_statistics(hidden, Responses(targets, torch.ones_like(targets, dtype=torch.bool)))

    # Decoding ---------------------------------------------------------------------------------------------------

    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Decoding, Tensor]:
        """Read the prompts; returns the decode state and the hidden states [B, H] that predict the first new token."""
        batch, length = prompts.tokens.shape
        cache = Cache(layers=[PreallocatedLayer(length + new_tokens) for _ in range(self.config.num_hidden_layers)])
        mask = torch.ones(batch, length + new_tokens, dtype=torch.bool, device=prompts.mask.device)
        mask[:, :length] = prompts.mask
        state = Decoding(cache, mask, position=prompts.mask.sum(dim=1), length=length)
        return state, self.read_prompts(prompts, cache)

    def step(self, state: Decoding, tokens: Tensor) -> Tensor:
        """Append one token a row [B]; returns the hidden states [B, H] that predict the next."""
        state.length += 1
        mask = state.mask[:, : state.length].long()
        hidden = self.read_token(tokens, mask, state.position[:, None], state.cache)
        state.position = state.position + 1
        return hidden

    def read_prompts(self, prompts: Prompts, cache: Cache) -> Tensor:
        """Fill the cache; returns the hidden states [B, H] that predict the first new token."""
        output = self.backbone(
            input_ids=prompts.tokens.masked_fill(~prompts.mask, 0),
            attention_mask=prompts.mask.long(),
            position_ids=_position_ids(prompts.mask),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def read_token(self, tokens: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states [B, H] after one more token a row [B] at `position_ids` [B, 1].

        `mask` is int [B, columns] or, as the attention itself takes it, bool [B, 1, 1, columns].
        """
        output = self.backbone(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def takes_static_masks(self, columns: int) -> bool:
        """Whether a bool mask over all columns of a cache is all that attention needs: not where a window is shorter
        than the cache, and not in the implementations that add masks up."""
        window = getattr(self.config, "sliding_window", None)
        return self.config._attn_implementation == "sdpa" and (window is None or window >= columns)

    @property
    def _frozen_layers(self) -> int:
        return self.config.num_hidden_layers - self.trainable_layers

    @property
    def _output_layer(self) -> nn.Linear:
        return self._plain.get_output_embeddings()

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
        if type(self._output_layer) is not nn.Linear:
            raise UserError(
                f"the output layer of {type(self._plain).__name__} is a {type(self._output_layer).__name__}, and only "
                "a plain linear layer is supported: leave it out of lora.targets"
            )
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


def _sequence(prompts: Prompts, responses: Responses) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, P+T-1] of prompts and responses together; the last token predicts nothing."""
    tokens = torch.cat([prompts.tokens, responses.tokens], dim=1)[:, :-1]
    return tokens, torch.cat([prompts.mask, responses.mask], dim=1)[:, :-1]


def _hidden(backbone: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states [B, L, H]; what stands at padding is not read."""
    output = backbone(
        input_ids=tokens.masked_fill(~mask, 0),
        attention_mask=mask.long(),
        position_ids=_position_ids(mask),
        use_cache=False,
    )
    return output.last_hidden_state


def _unflatten(statistics: TokenStatistics, mask: Tensor) -> TokenStatistics:
    """Statistics [N] of the valid tokens in their places [B, T]; 0 at padding."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return TokenStatistics(*(zeros.masked_scatter(mask, values) for values in statistics))


def _position_ids(mask: Tensor) -> Tensor:
    """Position of each real token among the real tokens of its row [B, L]; 0 on padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
