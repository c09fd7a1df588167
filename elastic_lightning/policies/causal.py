"""A causal language model seen from its responses: prompt and response are one text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from elastic_lightning.errors import UserError
from elastic_lightning.functional import TokenStatistics
from elastic_lightning.policies.batches import Prompts, Responses
from elastic_lightning.policies.cache import PreallocatedLayer
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.layers import checkpointed, layer_stack, recorded, replayed, train_upper_layers
from elastic_lightning.policies.special_tokens import encode_open
from elastic_lightning.policies.text import Texts, decode_texts


@dataclass
class Decoding:
    """A decode in flight: the cache, and which of its columns [B, capacity] hold real tokens."""

    cache: Cache
    mask: Tensor
    position: Tensor  # [B] position id of the next token
    length: int  # columns in use


class CausalLM(PolicyLM):
    """A Hugging Face causal model as a policy, see `PolicyLM`: a response continues its prompt.

    Position ids count real tokens, so left padding changes nothing.

    Args:
        model: in eval mode, dropout switched off.
        trainable_layers: train only this many upper layers and the last norm; all weights by default.
        gradient_checkpointing: recompute activations in the backward pass: one more forward pass of the layers.

    Raises:
        UserError: the model is no decoder alone, changes its logits after the output layer (soft-capping or scaling),
            or decodes without a cache of keys and values (state-space models).
    """

    separator = ""

    def __init__(
        self, model: nn.Module, trainable_layers: int | None = None, gradient_checkpointing: bool = False
    ) -> None:
        if model.config.is_encoder_decoder:
            raise UserError(f"{type(model).__name__} is an encoder-decoder, where a causal language model is needed")
        super().__init__(model, gradient_checkpointing)
        self._check_cache()
        self.trainable_layers = trainable_layers
        if trainable_layers is not None:
            train_upper_layers(model, self.backbone, trainable_layers)

    @property
    def backbone(self) -> nn.Module:
        return self._plain.base_model

    @staticmethod
    def forward_hidden(backbone: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [B, L, H]; what stands at padding is not read."""
        output = backbone(
            input_ids=tokens.masked_fill(~mask, 0),
            attention_mask=mask.long(),
            position_ids=_position_ids(mask),
            use_cache=False,
        )
        return output.last_hidden_state

    # Responses as a whole ---------------------------------------------------------------------------------------

    def response_hidden(
        self, prompts: Prompts, responses: Responses, backbone: nn.Module | None = None, trunk: Tensor | None = None
    ) -> Tensor:
        backbone = self.backbone if backbone is None else backbone
        train = torch.is_grad_enabled()
        with ExitStack() as contexts:
            if trunk is not None:
                contexts.enter_context(replayed(layer_stack(backbone), self._frozen_layers, trunk))
            if self.gradient_checkpointing and train:
                contexts.enter_context(checkpointed(layer_stack(backbone)))
            hidden = (self._hidden if train else self.forward_hidden)(backbone, *_sequence(prompts, responses))
        return hidden[:, prompts.tokens.shape[1] - 1 :]

    @torch.no_grad()
    def trunk_hidden(self, prompts: Prompts, responses: Responses) -> Tensor:
        """What leaves the frozen layers [B, P+T-1, H]: the same for policy, reference and every epoch."""
        stack = layer_stack(self.backbone)
        with recorded(stack, self._frozen_layers) as outputs:
            self.forward_hidden(self.backbone, *_sequence(prompts, responses))
        return outputs[0]

    # Text without prompts ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def next_token_statistics(self, tokens: Tensor) -> TokenStatistics:
        """`token_statistics` [B, L-1] of each token but the first of text [B, L] without padding."""
        targets = tokens[:, 1:]
        hidden = self.backbone(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        return self.token_statistics(hidden, Responses(targets, torch.ones_like(targets, dtype=torch.bool)))

    # Decoding ---------------------------------------------------------------------------------------------------

    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Decoding, Tensor]:
        batch, length = prompts.tokens.shape
        cache = Cache(layers=[PreallocatedLayer(length + new_tokens) for _ in range(self.config.num_hidden_layers)])
        mask = torch.ones(batch, length + new_tokens, dtype=torch.bool, device=prompts.mask.device)
        mask[:, :length] = prompts.mask
        state = Decoding(cache, mask, position=prompts.mask.sum(dim=1), length=length)
        return state, self.read_prompts(prompts, cache)

    def step(self, state: Decoding, tokens: Tensor) -> Tensor:
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
        """Whether a bool mask over all columns of a cache is all that attention needs: not where a window or chunk is
        shorter than the cache, nor past the length at which longrope takes other frequencies, and not in the
        implementations that add masks up."""
        limits = [getattr(self.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        rope = getattr(self.config, "rope_parameters", None) or {}
        for part in (rope, *rope.values()):  # of some models each kind of layer has its own
            if isinstance(part, dict) and part.get("rope_type") == "longrope":
                limits.append(part.get("original_max_position_embeddings"))
        return self.config._attn_implementation == "sdpa" and all(n is None or n >= columns for n in limits)

    # Texts ------------------------------------------------------------------------------------------------------

    def encode_rows(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None
    ) -> list[list[int]]:
        return encode_open(tokenizer, texts, longest)

    def decode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        responses: Responses,
        special_tokens: bool = False,
    ) -> Texts:
        return decode_texts(tokenizer, prompts, responses, self.ends(tokenizer), special_tokens)

    def check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        context, total = self.longest_text, prompt_tokens + new_tokens
        if context is not None and total > context:
            raise UserError(
                f"prompts of {prompt_tokens} tokens and {new_tokens} new ones make {total}, but the model's context is "
                f"{context}: shorten the prompts (data's max_prompt_tokens) or lower max_new_tokens"
            )

    # Checks -----------------------------------------------------------------------------------------------------

    @property
    def _frozen_layers(self) -> int:
        return self.config.num_hidden_layers - self.trainable_layers

    def _two_tokens(self) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([[0, 1]], device=next(self.model.parameters()).device)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        return self.backbone(**inputs).last_hidden_state, self._plain(**inputs).logits

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


def _position_ids(mask: Tensor) -> Tensor:
    """Position of each real token among the real tokens of its row [B, L]; 0 on padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
