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
from elastic_lightning.policies.portions import out_of_memory
from elastic_lightning.policies.reading import usable
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
            decodes without a cache of keys and values (state-space models), or reads a text otherwise with padding on
            its left.
    """

    separator = ""

    def __init__(
        self, model: nn.Module, trainable_layers: int | None = None, gradient_checkpointing: bool = False
    ) -> None:
        if model.config.is_encoder_decoder:
            raise UserError(f"{type(model).__name__} is an encoder-decoder, where a causal language model is needed")
        super().__init__(model, gradient_checkpointing)
        with usable(self._name):
            self.check_reading()
        self.trainable_layers = trainable_layers
        if trainable_layers is not None:
            train_upper_layers(model, self.backbone, trainable_layers)

    @property
    def backbone(self) -> nn.Module:
        return text_backbone(self._plain)

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
        if self.longest_text is not None and length + new_tokens > self.longest_text:
            self.check_context(int(prompts.mask.sum(dim=1).max()), new_tokens)
        cache = Cache(layers=[PreallocatedLayer(length + new_tokens) for _ in range(self.layers)])
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
        limits = [getattr(self.text_config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        for part in (rope, *rope.values()):  # of some models each kind of layer has its own
            if isinstance(part, dict) and part.get("rope_type") == "longrope":
                limits.append(part.get("original_max_position_embeddings"))
        return self.text_config._attn_implementation == "sdpa" and all(n is None or n >= columns for n in limits)

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
    def layers(self) -> int:
        """The number of the transformer's layers."""
        return self.text_config.num_hidden_layers

    @property
    def _frozen_layers(self) -> int:
        return self.layers - self.trainable_layers

    def _read_probe(self) -> tuple[Tensor, Tensor]:
        text = self._probe_text()
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), "use_cache": False}
        return self.backbone(**inputs).last_hidden_state, self._plain(**inputs).logits

    @torch.no_grad()
    def check_reading(self) -> None:
        text = self._probe_text()
        whole = self.backbone(input_ids=text, use_cache=False).last_hidden_state[0]
        no_cache = UserError(
            f"{self._name} does not decode with a cache of keys and values (a state-space layer?): such an "
            "architecture is not supported"
        )
        try:
            layers, first, second = self._decode_probe(text[0])
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # what hybrid models say to such layers
            if out_of_memory(error):
                raise
            raise no_cache from error
        if layers < self.layers - (getattr(self.text_config, "num_kv_shared_layers", None) or 0):
            raise no_cache
        padded = text.repeat(2, 1)
        padded[1] = padded[1].roll(-2)  # its first two tokens at the end; what stands before them is not read
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[1, :-2] = False
        read = self.forward_hidden(self.backbone, padded, mask)
        if not (self._same(read[0], whole) and self._same(read[1, -2:], whole[:2])):
            raise UserError(
                f"{self._name} reads a text otherwise with padding on its left or with more text behind it (positions "
                "counted from the first column, or attention to later tokens: is_decoder in its config.json?): such an "
                "architecture is not supported"
            )
        if not (self._same(first, whole[[1, 0]]) and self._same(second, whole[[2, 1]])):
            raise no_cache

    def _decode_probe(self, text: Tensor) -> tuple[int, Tensor, Tensor]:
        """Read two tokens and, beside them, one with padding; then one more of each. Returns the number of layers that
        have kept them all, and the hidden states [2, H] that predict the new tokens and the ones after these."""
        tokens = torch.stack([text[:2], text[[1, 0]]])
        mask = torch.tensor([[True, True], [False, True]], device=text.device)
        state, first = self.start(Prompts(tokens, mask), new_tokens=1)
        second = self.step(state, text[[2, 1]])
        return sum(layer.length == 3 for layer in state.cache.layers), first, second


def text_backbone(model: nn.Module) -> nn.Module:
    """The transformer below a model's output layer; that of the text, where it sees and hears too."""
    if model.config.get_text_config() is not model.config:
        return model.get_decoder()
    if model.base_model is not model:
        return model.base_model
    embedding = model.get_input_embeddings()  # Llama 4 does not name its transformer as it says it does
    return next(child for child in model.children() if any(module is embedding for module in child.modules()))


def _sequence(prompts: Prompts, responses: Responses) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, P+T-1] of prompts and responses together; the last token predicts nothing."""
    tokens = torch.cat([prompts.tokens, responses.tokens], dim=1)[:, :-1]
    return tokens, torch.cat([prompts.mask, responses.mask], dim=1)[:, :-1]


def _position_ids(mask: Tensor) -> Tensor:
    """Position of each real token among the real tokens of its row [B, L]; 0 on padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
