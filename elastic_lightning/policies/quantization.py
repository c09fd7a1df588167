"""Base models in 8 or 4 bits a weight, through transformers and bitsandbytes; what is trained on them is an adapter."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_accelerate_available, is_bitsandbytes_available

from elastic_lightning.errors import UserError

Quantization = Literal["8bit", "4bit"]
INSTALL = "pip install 'elastic-lightning[quantization]'"


def quantization_config(kind: Quantization, dtype: str) -> BitsAndBytesConfig:
    """LLM.int8 (arXiv:2208.07339), or QLoRA's NF4 with its scales quantised too (arXiv:2305.14314), which computes in
    `dtype`."""
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def check_quantization(kind: Quantization) -> None:
    """Raise a `UserError` where this machine cannot load a quantised model: package or hardware is missing."""
    if not is_bitsandbytes_available() or not is_accelerate_available():
        raise UserError(f"quantization: {kind} needs bitsandbytes and accelerate: {INSTALL}, or leave it out")
    from transformers.integrations import validate_bnb_backend_availability

    # On a CPU four bits are for inference: bitsandbytes repacks the weights, and no gradient passes through them.
    found = torch.accelerator.is_available() or kind == "8bit"
    if not found or not validate_bnb_backend_availability(raise_exception=False):
        raise UserError(
            f"quantization: {kind} has no device here that bitsandbytes can train on: use a machine with an NVIDIA "
            "GPU, or leave it out"
        )
