"""Low-rank adapters: adding new ones to a model, folding them in, and what a folder of trained ones is for."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict

from torch import nn
from transformers import PreTrainedModel

from elastic_lightning.errors import UserError
from elastic_lightning.policies.reading import readable, reason_of
from elastic_lightning.policies.sources import LoRA


def add_lora(model: PreTrainedModel, lora: LoRA, task_type: str) -> nn.Module:
    """Freeze `model` and add trainable low-rank adapters.

    Raises:
        UserError: its modules have other names, or a weight is shared by two layers, see `check_targets`.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.targets
    if targets is None and model.config.model_type == "marian":
        targets = ["q_proj", "v_proj"]  # what peft chooses for BART, of the same layers; it has no choice for Marian
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type=task_type,
        fan_in_fan_out=model.config.model_type == "gpt2",  # its projections are Conv1D, weights stored transposed
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*ensure_weight_tying.*")  # `check_targets` says it
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA cannot be added: {reason_of(error)} (see lora.targets)") from error
    check_targets(adapted)
    return adapted


def check_targets(model: nn.Module) -> None:
    """Raise a `UserError` where an adapter changes one of two layers that share a weight, as an embedding and an output
    layer do: folded into the weight it would change both, so the merged model would be another."""
    holders: dict[int, dict[tuple[int, bool], str]] = defaultdict(dict)
    for name, module in model.named_modules(remove_duplicate=False):
        adapted = "base_layer" in name or "modules_to_save" in name or "original_module" in name
        for weight in module.parameters(recurse=False):
            holders[id(weight)].setdefault((id(module), adapted), name)
    for layers in holders.values():
        changed = [name for (_, adapted), name in layers.items() if adapted]
        if changed and len(layers) > 1:
            layer = re.split(r"\.(?:base_layer|modules_to_save|original_module)", changed[0])[0]
            raise UserError(
                f"the adapter changes {layer.rpartition('.')[2]}, whose weight is that of another layer too (tied "
                "embeddings): merged, it would change both; leave it out of lora.targets"
            )


def merge(model: nn.Module) -> nn.Module:
    """The base model with the adapter folded in; the adapted model is used up.

    Raises:
        UserError: the merged model would be another one, see `check_targets`.
    """
    check_targets(model)
    tied = getattr(model.config, "tie_word_embeddings", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no longer tied.*")
        merged = model.merge_and_unload()
    if tied is not None:  # peft takes the output layer for untied where it is tied to the decoder's own embedding
        merged.config.tie_word_embeddings = tied
    return merged


def adapter_base(path: str) -> str:
    """The base model that an adapter folder names.

    Raises:
        UserError: it names none.
    """
    from peft import PeftConfig

    with readable("adapter", path):
        base = PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise UserError(f"{path}/adapter_config.json does not name its base model (base_model_name_or_path)")
    return base
