"""What a configuration file says of a model: where it comes from, and how it is held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from elastic_lightning.errors import UserError
from elastic_lightning.policies.quantization import Quantization

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on a frozen base model (https://arxiv.org/abs/2106.09685), through peft.

    Attributes:
        rank: inner dimension of the two factors.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input; it must stay 0 in reinforcement learning, where it breaks the policy ratio.
        targets: module names, e.g. ``[q_proj, v_proj]``; peft's choice for the architecture by default.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank must be 1 or more, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class ModelSource:
    """Which model to load and how. Exactly one of `path` and `architecture` is given.

    Attributes:
        path: hub id or a local `save_pretrained` folder.
        gguf_file: name of a GGUF file inside `path` (needs the extra `[gguf]`); a folder that holds one alone, and no
            config.json, needs no name.
        architecture: fields of a Hugging Face config for random weights, e.g. ``{model_type: gpt2, n_embd: 256}`` or
            ``{model_type: marian, d_model: 256, encoder_layers: 3, decoder_layers: 3, scale_embedding: true}``; the
            vocabulary size and special tokens come from the tokenizer. The decoder of an encoder-decoder starts with
            the pad token.
        tokenizer: hub id or folder; `path` by default.
        dtype: of the weights.
        attention: transformers' implementation, e.g. flash_attention_2 on a GPU; eager is faster than sdpa for short
            texts in bfloat16 on a CPU. Transformers' choice (sdpa) by default.
        lora: train adapters on a frozen base instead of the whole model.
        trust_remote_code: run the python code that comes with the model, or that its config.json names as attention
            (``org/kernel``); off unless asked.
        quantization: hold the frozen base in 8 or 4 bits a weight (needs the extra `[quantization]`, and `lora`).
    """

    path: str | None = None
    gguf_file: str | None = None
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: Dtype = "float32"
    attention: str | None = None
    lora: LoRA | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise UserError("give exactly one of `path` (hub id or folder) and `architecture` (random weights)")
        if self.architecture is not None and "model_type" not in self.architecture:
            raise UserError("`architecture` needs `model_type`, e.g. {model_type: gpt2, n_embd: 256, n_layer: 4}")
        if self.architecture is not None and self.tokenizer is None:
            raise UserError(
                "`architecture` starts from random weights: say which `tokenizer` (hub id or folder) it uses"
            )
        if self.gguf_file is not None and self.path is None:
            raise UserError("`gguf_file` is the name of a file inside `path`: give `path` too")
        if self.quantization is not None and self.lora is None:
            raise UserError("`quantization` rounds the base model, which cannot be trained then: give `lora` too")
        if self.quantization is not None and (self.path is None or self.gguf_file is not None):
            raise UserError(
                "`quantization` is for a `path` that holds whole weights: not an architecture or a GGUF file"
            )
