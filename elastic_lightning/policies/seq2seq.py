"""An encoder-decoder seen from its responses: the encoder reads the prompt, the decoder writes the response."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from elastic_lightning.errors import UserError
from elastic_lightning.functional import TokenStatistics
from elastic_lightning.policies.batches import Prompts, Responses, right_padded
from elastic_lightning.policies.cache import PreallocatedLayer
from elastic_lightning.policies.checked_model import context_length
from elastic_lightning.policies.encoding import encode_source
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.layers import checkpointed
from elastic_lightning.policies.reading import usable
from elastic_lightning.policies.text import Texts, decode_apart


class EncoderDecoder(nn.Module):
    """The two transformers of a model, without its output layer."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def read(self, source: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [B, P, H] of sources [B, P] padded at the end; what stands at padding is not read."""
        return self.encoder(input_ids=source.masked_fill(~mask, 0), attention_mask=mask.long()).last_hidden_state

    def write(self, tokens: Tensor, source: Tensor, mask: Tensor, cache: EncoderDecoderCache | None = None) -> Tensor:
        """Hidden states [B, L, H] after each of the tokens [B, L], given those of the source [B, P, H]."""
        output = self.decoder(
            input_ids=tokens,
            encoder_hidden_states=source,
            encoder_attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state


@dataclass
class Decoding:
    """A decode in flight: what the encoder made of the prompts [B, P, H], their mask [B, P], and the decoder's cache.

    The cache holds the keys and values of the source too, computed once.
    """

    source: Tensor
    mask: Tensor
    cache: EncoderDecoderCache


class Seq2SeqLM(PolicyLM):
    """A Hugging Face encoder-decoder (Marian, BART, T5, ...) as a policy, see `PolicyLM`: a response answers a prompt.

    The decoder begins with `decoder_start_token`, which is no part of the response. Encoders number positions from the
    first column, so prompts are read with their padding at the end: left padding changes nothing. Responses are drawn
    from the model's own distribution: what a generation config forces or forbids beyond that does not apply.

    Args:
        model: in eval mode, dropout switched off.
        gradient_checkpointing: recompute activations in the backward pass: one more forward pass of the layers.

    Raises:
        UserError: the model changes its logits after the output layer in a way of its own, has no token to start its
            decoder with, reads a prompt otherwise beside padding, or decodes step by step to something else than all at
            once.
    """

    separator = "\t"

    def __init__(self, model: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, gradient_checkpointing)
        self.start_token = decoder_start_token(self._plain)
        with usable(self._name):
            self.check_reading()

    @property
    def backbone(self) -> EncoderDecoder:
        return EncoderDecoder(self._plain.get_encoder(), self._plain.get_decoder())

    @staticmethod
    def forward_hidden(backbone: EncoderDecoder, source: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        """Last hidden states [B, T, H] of the decoder's tokens [B, T] after sources [B, P] padded at the end."""
        return backbone.write(tokens, backbone.read(source, mask), mask)

    # Responses as a whole ---------------------------------------------------------------------------------------

    def response_hidden(
        self,
        prompts: Prompts,
        responses: Responses,
        backbone: EncoderDecoder | None = None,
        trunk: Tensor | None = None,
    ) -> Tensor:
        backbone = self.backbone if backbone is None else backbone
        train = torch.is_grad_enabled()
        written = responses.tokens.masked_fill(~responses.mask, 0)  # what stands at padding is not read
        tokens = torch.cat([self._start_tokens(prompts), written[:, :-1]], dim=1)
        with ExitStack() as contexts:
            if self.gradient_checkpointing and train:
                for transformer in (backbone.encoder, backbone.decoder):
                    contexts.enter_context(checkpointed(_layers(transformer)))
            return (self._hidden if train else self.forward_hidden)(backbone, *right_padded(prompts), tokens)

    def next_token_statistics(self, tokens: Tensor) -> TokenStatistics:
        """An encoder-decoder has no probability for text without a source: always a `UserError`."""
        raise UserError(
            "an encoder-decoder's perplexity is measured on pairs of texts: validate on PairedTexts, not on tokens"
        )

    # Decoding ---------------------------------------------------------------------------------------------------

    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Decoding, Tensor]:
        source, mask = right_padded(prompts)
        context = self.longest_text
        if context is not None and max(source.shape[1], 1 + new_tokens) > context:
            self.check_context(int(mask.sum(dim=1).max()), 1 + new_tokens)
        layers = [PreallocatedLayer(1 + new_tokens) for _ in _layers(self.backbone.decoder)]
        cache = EncoderDecoderCache(Cache(layers=layers), DynamicCache())
        state = Decoding(self.backbone.read(source, mask), mask, cache)
        return state, self._append(state, self._start_tokens(prompts))

    def step(self, state: Decoding, tokens: Tensor) -> Tensor:
        return self._append(state, tokens[:, None])

    def takes_static_masks(self, columns: int) -> bool:
        return False  # a decoder counts its positions by the length of its cache, which a captured step cannot move

    def _append(self, state: Decoding, tokens: Tensor) -> Tensor:
        return self.backbone.write(tokens, state.source, state.mask, state.cache)[:, -1]

    def _start_tokens(self, prompts: Prompts) -> Tensor:
        return torch.full_like(prompts.tokens[:, :1], self.start_token)

    # Texts ------------------------------------------------------------------------------------------------------

    def encode_rows(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None
    ) -> list[list[int]]:
        return encode_source(tokenizer, texts, eos=True, longest=longest)

    def decode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        responses: Responses,
        special_tokens: bool = False,
    ) -> Texts:
        return decode_apart(tokenizer, prompts, responses, self.ends(tokenizer), special_tokens)

    @property
    def longest_source(self) -> int | None:
        """Longest prompt in tokens that the encoder has positions for, or None where the config does not say."""
        return getattr(self.config, "max_encoder_position_embeddings", None) or context_length(self.model)

    @property
    def longest_target(self) -> int | None:
        """Longest response in tokens, likewise. Experts of Switch read only so many tokens of a text, and all of them
        where it is written token by token."""
        positions = getattr(self.config, "max_decoder_position_embeddings", None) or context_length(self.model)
        return _shortest(positions, getattr(self.config, "expert_capacity", None))

    @property
    def longest_text(self) -> int | None:
        return _shortest(self.longest_source, self.longest_target)

    def check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        shorten = "shorten the prompts (data's max_prompt_tokens)"
        for what, length, context, how in (
            ("prompts", prompt_tokens, self.longest_source, shorten),
            ("responses", new_tokens, self.longest_target, "lower max_new_tokens"),
        ):
            if context is not None and length > context:
                raise UserError(
                    f"{what} of {length} tokens do not fit the model, whose context is {context} for them: {how}"
                )

    # Checks -----------------------------------------------------------------------------------------------------

    def _read_probe(self) -> tuple[Tensor, Tensor]:
        text = self._probe_text()
        hidden = self.forward_hidden(self.backbone, text, torch.ones_like(text, dtype=torch.bool), text)
        return hidden, self._plain(input_ids=text, decoder_input_ids=text, use_cache=False).logits

    @torch.no_grad()
    def check_reading(self) -> None:
        """As `PolicyLM.check_reading`; a pad token is among those that are written."""
        text = self._probe_text()
        long, short = (Prompts(part, torch.ones_like(part, dtype=torch.bool)) for part in (text, text[:, :2]))
        both = Prompts(text.repeat(2, 1), long.mask.repeat(2, 1))
        both.tokens[1, -2:] = short.tokens
        both.mask[1, :-2] = False
        written = torch.cat([torch.full_like(text[:, :1], self.config.pad_token_id or 0), text[:, :2]], dim=1)
        whole, alone = (
            self.response_hidden(prompts, Responses(rows := written.repeat(len(prompts.tokens), 1), rows >= 0))
            for prompts in (both, short)
        )
        if not self._same(whole[1:], alone):
            raise UserError(
                f"{self._name} reads a prompt otherwise beside padding than alone: such an architecture is not "
                "supported"
            )
        state, first = self.start(both, new_tokens=2)
        one_by_one = [first, *(self.step(state, written[0, column].repeat(2)) for column in range(2))]
        if not self._same(torch.stack(one_by_one, dim=1), whole):
            raise UserError(
                f"{self._name} reads a response token by token otherwise than as a whole (no cache of keys and values, "
                "or positions that skip pad tokens): such an architecture is not supported"
            )


def decoder_start_token(model: nn.Module) -> int:
    """The token that the decoder reads before the first of a response.

    Raises:
        UserError: neither the model's config nor its generation config names it.
    """
    configs = (model.config, getattr(model, "generation_config", None))
    tokens = [getattr(config, "decoder_start_token_id", None) for config in configs]
    known = [token for token in tokens if token is not None]
    if not known:
        raise UserError(f"the config of {type(model).__name__} has no decoder_start_token_id: decoding could not begin")
    return known[0]


def _layers(transformer: nn.Module) -> nn.ModuleList:
    """The layers of an encoder or a decoder."""
    return next(child for child in transformer.children() if isinstance(child, nn.ModuleList))


def _shortest(*lengths: int | None) -> int | None:
    """The smallest of the lengths that are known."""
    return min((length for length in lengths if length is not None), default=None)
