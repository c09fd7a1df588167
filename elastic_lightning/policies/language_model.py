"""What causal models and encoder-decoders have in common as policies: hidden states, and what follows from them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.functional import TokenLoss, TokenStatistics, output_loss, output_statistics
from elastic_lightning.policies.batches import PairedTexts, Prompts, Responses
from elastic_lightning.policies.encoding import pad
from elastic_lightning.policies.reading import usable
from elastic_lightning.policies.special_tokens import DrawnTokens, end_tokens, textless_tokens
from elastic_lightning.policies.text import Texts

PROBE = 50.0  # a logit that any soft-capping or scaling changes
PROBE_TOKENS = 5
TOLERANCE = {torch.float32: 1e-3}  # of hidden states of one text computed in two ways, relative
ROUGH_TOLERANCE = 0.2  # in fewer bits, where a mixture of experts may choose another; a wrong position shows as 0.5
LENGTHS = ("max_position_embeddings", "max_seq_len")  # what configs call the number of positions


class PolicyLM(nn.Module, ABC):
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
        super().__init__()
        self.model = model
        self._check_attention()
        with usable(self._name):
            self.hidden_scale = self._check_head()
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

    @abstractmethod
    def check_reading(self) -> None:
        """Raise a `UserError` where a text has other hidden states in a padded batch, or written token by token, than
        alone and as a whole. Seen on a handful of tokens, without random numbers."""

    @abstractmethod
    def _read_probe(self) -> tuple[Tensor, Tensor]:
        """Of a short text: the last hidden states [1, L, H], and logits [1, L, V] from the model's own forward."""

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

    # The model --------------------------------------------------------------------------------------------------

    @property
    def config(self):
        return self.model.config

    @property
    def text_config(self):
        """The config of the part that reads text, where a model has several parts."""
        return self._plain.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """Width H of the hidden states that the output layer reads: not always that of the layers."""
        return self._output_layer.in_features

    @property
    def vocabulary(self) -> int:
        """Number V of tokens that the model gives a logit."""
        return self._output_layer.out_features

    @property
    def longest_text(self) -> int | None:
        """`context_length` of the model: of prompt and response together, or of each in an encoder-decoder."""
        return context_length(self.model)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    @property
    def base_path(self) -> str:
        """Hub id or folder that the model, or an adapter's base model, was loaded from; empty where it was not."""
        return self._plain.name_or_path

    def base_module(self, name: str) -> nn.Module:
        """A module by its name in the base model; where it has an adapter, the two together.

        Raises:
            UserError: there is none of this name.
        """
        try:
            return self._plain.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"{type(self._plain).__name__} has no module {name}: is the base model another one?"
            ) from error

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

    @property
    def _plain(self) -> nn.Module:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def _name(self) -> str:
        return type(self._plain).__name__

    @property
    def _output_layer(self) -> nn.Linear:
        return self._plain.get_output_embeddings()

    @property
    def _final_bias(self) -> Tensor | None:
        """The constant [V] that Marian and BART add to what the output layer returns."""
        bias = getattr(self._plain, "final_logits_bias", None)
        return None if bias is None else bias[0]

    @property
    def _bias(self) -> Tensor | None:
        """All that is added to the product of states and the output layer's weight [V]."""
        own, final = self._output_layer.bias, self._final_bias
        return own if final is None else final if own is None else own + final

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.hidden_scale == 1 else hidden * self.hidden_scale

    def _check_attention(self) -> None:
        """Block-sparse attention depends on the length of the padded batch, and a short one switches it off."""
        if any(getattr(module, "attention_type", None) == "block_sparse" for module in self._plain.modules()):
            raise UserError(
                f"{self._name} attends to blocks of a text, which depend on the padding beside it: write "
                "attention_type: original_full into its config.json"
            )

    @torch.no_grad()
    def _check_head(self) -> float:
        """What the model multiplies its hidden states by before the output layer: 1, or 1 / sqrt(H) as T5 does.

        With that, what the output layer returns for the last hidden states, plus the bias, must be the logits.
        """
        if type(self._output_layer) is not nn.Linear:
            kind = type(self._output_layer)
            advice = ": leave it out of lora.targets" if self.has_adapter else ""
            raise UserError(
                f"the output layer of {self._name} is a {kind.__module__}.{kind.__name__}, and only a plain linear "
                f"layer is supported{advice}"
            )
        read, returned = [], []

        def replace(head: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
            read.append(args[0])
            returned.append(torch.full_like(logits, PROBE))  # on random logits soft-capping would hardly show
            return returned[-1]

        hook = self._output_layer.register_forward_hook(replace)
        try:
            hidden, logits = self._read_probe()
        finally:
            hook.remove()
        if not hidden.isfinite().all():
            raise UserError(f"{self._name} computes numbers that are not finite: its weights hold NaN or infinity")
        scales = [scale for scale in (1.0, hidden.shape[-1] ** -0.5) if read and _close(hidden * scale, read[-1])]
        if not scales:
            raise UserError(
                f"{self._name} changes its hidden states before the output layer (layers between the two, or scaling): "
                "such an architecture is not supported"
            )
        expected = returned[-1] if self._final_bias is None else returned[-1] + self._final_bias
        if not (logits == expected).all():
            raise UserError(
                f"{self._name} changes its logits after the output layer (soft-capping or scaling): such an "
                "architecture is not supported"
            )
        return scales[0]

    def _probe_text(self) -> Tensor:
        """Ordinary tokens [1, `PROBE_TOKENS`], from the middle of the vocabulary, where no special ones are."""
        weight = self._plain.get_input_embeddings().weight
        tokens = min(len(weight), self.vocabulary)
        return (torch.arange(PROBE_TOKENS, device=weight.device)[None] + tokens // 2) % tokens

    def _same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two computations of hidden states agree up to the rounding of the model's type."""
        exact = not any(getattr(module, "is_quantized", False) for module in self.model.modules())
        tolerance = TOLERANCE.get(other.dtype, ROUGH_TOLERANCE) if exact else ROUGH_TOLERANCE
        return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())


def context_length(model: nn.Module) -> int | None:
    """Longest sequence the model has positions for, or None where its config does not say.

    Beyond the length of the first training, longrope reads every position in another way, and what was cached before in
    the old one: such texts do not fit.
    """
    config = model.config.get_text_config()
    lengths = [getattr(config, name, None) for name in LENGTHS]
    rope = getattr(config, "rope_parameters", None) or {}
    for settings in (rope, *rope.values()):  # of all layers, or by their kind
        if isinstance(settings, dict) and settings.get("rope_type") == "longrope":
            lengths.append(settings.get("original_max_position_embeddings"))
    return min((length for length in lengths if isinstance(length, int)), default=None)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3)


def _unflatten(statistics: TokenStatistics, mask: Tensor) -> TokenStatistics:
    """Statistics [N] of the valid tokens in their places [B, T]; 0 at padding."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return TokenStatistics(*(zeros.masked_scatter(mask, values) for values in statistics))
