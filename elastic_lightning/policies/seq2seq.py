"""An encoder-decoder seen from its responses: the encoder reads the prompt, the decoder writes the response."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from elastic_lightning.errors import UserError
from elastic_lightning.policies.batches import Prompts, Responses, right_padded
from elastic_lightning.policies.cache import PreallocatedLayer
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.layers import checkpointed
from elastic_lightning.policies.text import Texts, decode_apart


class EncoderDecoder(nn.Module):
    """The two transformers of one model, without its output layer."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def read(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """What the encoder makes of prompts padded at the end: hidden states [B, P, H] and their mask [B, P]."""
        mask = prompts.mask.long()
        output = self.encoder(input_ids=prompts.tokens.masked_fill(~prompts.mask, 0), attention_mask=mask)
        return output.last_hidden_state, mask

    def write(self, tokens: Tensor, source: Tensor, source_mask: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states [B, L, H] after each of the decoder's tokens [B, L]."""
        output = self.decoder(
            input_ids=tokens,
            encoder_hidden_states=source,
            encoder_attention_mask=source_mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state


@dataclass
class Decoding:
    """A decode in flight: what the encoder read [B, P, H], its mask [B, P], and the decoder's cache."""

    source: Tensor
    source_mask: Tensor
    cache: EncoderDecoderCache


class Seq2SeqLM(PolicyLM):
    """A Hugging Face encoder-decoder (Marian, BART, T5, ...) as a policy; see `PolicyLM`.

    The decoder begins with the model's ``decoder_start_token_id``, which is no part of the response. Encoders that
    number positions from the first column read their prompts padded at the end, so left padding changes nothing.
    """

    def __init__(self, model: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, gradient_checkpointing)
        if model.config.decoder_start_token_id is None:
            raise UserError("the model's config has no decoder_start_token_id: decoding could not begin")

    @property
    def backbone(self) -> EncoderDecoder:
        return EncoderDecoder(self._plain.get_encoder(), self._plain.get_decoder())

    @staticmethod
    def forward_hidden(backbone: EncoderDecoder, source: Tensor, source_mask: Tensor, tokens: Tensor) -> Tensor:
        """Last hidden states [B, T, H] of the decoder's inputs [B, T] after a source [B, P] padded at the end."""
        return backbone.write(tokens, *backbone.read(Prompts(source, source_mask)))

    def response_hidden(
        self,
        prompts: Prompts,
        responses: Responses,
        backbone: EncoderDecoder | None = None,
        trunk: Tensor | None = None,
    ) -> Tensor:
        backbone = self.backbone if backbone is None else backbone
        train = torch.is_grad_enabled()
        tokens = responses.tokens.masked_fill(~responses.mask, 0)  # what stands at padding is not read
        inputs = torch.cat([self._start_tokens(len(tokens), tokens.device), tokens[:, :-1]], dim=1)
        with ExitStack() as contexts:
            if self.gradient_checkpointing and train:
                for transformer in (backbone.encoder, backbone.decoder):
                    contexts.enter_context(checkpointed(_layers(transformer)))
            return (self._hidden if train else self.forward_hidden)(backbone, *right_padded(prompts), inputs)

    def start(self, prompts: Prompts, new_tokens: int) -> tuple[Decoding, Tensor]:
        source, mask = self.backbone.read(right_padded(prompts))
        layers = [PreallocatedLayer(1 + new_tokens) for _ in _layers(self._plain.get_decoder())]
        state = Decoding(source, mask, EncoderDecoderCache(Cache(layers=layers), DynamicCache()))
        return state, self._append(state, self._start_tokens(len(source), source.device))

    def step(self, state: Decoding, tokens: Tensor) -> Tensor:
        return self._append(state, tokens[:, None])

    def decode(self, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, responses: Responses) -> Texts:
        return decode_apart(tokenizer, prompts, responses)

    @property
    def longest_text(self) -> int | None:
        """Tokens that encoder and decoder have positions for, each; None where the config sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        longest = self.longest_text
        for what, length, option in (
            ("prompts", prompt_tokens, "data's max_prompt_tokens"),
            ("responses", new_tokens, "sampling.max_new_tokens"),
        ):
            if longest is not None and length > longest:
                raise UserError(f"{what} of {length} tokens, but the model's context is {longest}: lower {option}")

    def _append(self, state: Decoding, tokens: Tensor) -> Tensor:
        return self.backbone.write(tokens, state.source, state.source_mask, state.cache)[:, -1]

    def _start_tokens(self, rows: int, device: torch.device) -> Tensor:
        return torch.full((rows, 1), self.config.decoder_start_token_id, device=device)

    def _probe(self) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([[0, 1]], device=next(self.model.parameters()).device)
        prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
        hidden = self.forward_hidden(self.backbone, *prompts, tokens)
        logits = self._plain(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits
        return hidden, logits


def _layers(transformer: nn.Module) -> nn.ModuleList:
    """The layers of an encoder or a decoder."""
    return next(child for child in transformer.children() if isinstance(child, nn.ModuleList))
