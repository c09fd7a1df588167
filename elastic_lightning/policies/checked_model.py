"""A Hugging Face language model, and whether it computes what a policy needs: asked of a handful of tokens at load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from elastic_lightning.errors import UserError
from elastic_lightning.policies.reading import usable

PROBE = 50.0  # a logit that any soft-capping or scaling changes
PROBE_TOKENS = 5
TOLERANCE = {torch.float32: 1e-3}  # of hidden states of one text computed in two ways, relative
ROUGH_TOLERANCE = 0.2  # in fewer bits, where a mixture of experts may choose another; a wrong position shows as 0.5
LENGTHS = ("max_position_embeddings", "max_seq_len")  # what configs call the number of positions


class CheckedModel(nn.Module, ABC):
    """A model whose logits are its output layer's of its last hidden states; the base of `PolicyLM`.

    Args:
        model: in eval mode, dropout switched off.

    Raises:
        UserError: it does more to its logits (soft-capping or scaling), or its forward pass fails.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._check_attention()
        with usable(self._name):
            self.hidden_scale = self._check_head()

    @abstractmethod
    def check_reading(self) -> None:
        """Raise a `UserError` where a text has other hidden states in a padded batch, or written token by token, than
        alone and as a whole. Seen on a handful of tokens, without random numbers."""

    @abstractmethod
    def _read_probe(self) -> tuple[Tensor, Tensor]:
        """Of a short text: the last hidden states [1, L, H], and logits [1, L, V] from the model's own forward."""

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
