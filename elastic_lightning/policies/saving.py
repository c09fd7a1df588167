"""Writing a policy as a folder that any transformers user can load."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, adapter: str = "merged"
) -> None:
    """Save model and tokenizer with `save_pretrained`.

    Args:
        adapter: for a LoRA model, "merged" writes the base model with the adapter folded in, "adapter" the adapter
            alone.
    """
    if adapter not in ("merged", "adapter"):
        raise UserError(f"adapter must be merged or adapter, got {adapter!r}")
    if adapter == "merged":
        check_mergeable(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if hasattr(model, "merge_and_unload") and adapter == "merged":
        # On a copy: merging and unmerging in place would leave rounding behind in the model being trained.
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    if getattr(getattr(model, "active_peft_config", None), "task_type", None) == "SEQ_CLS":
        model.config.save_pretrained(folder)  # the names of its labels: peft keeps none, and the base model has others
    tokenizer.save_pretrained(folder)


def check_mergeable(model: nn.Module) -> None:
    """Raise a `UserError` where the base model is quantised: merged into it, the adapter would be rounded away."""
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        raise UserError(
            "the base model is quantised, and an adapter merged into it would be rounded: save the adapter alone "
            "(adapter: adapter), and merge it into the whole base with `elastic-lightning merge`"
        )
