"""Low-rank adapters: adding new ones to a model, and what a folder of trained ones is for."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from elastic_lightning.errors import UserError
from elastic_lightning.policies.reading import readable, reason_of
from elastic_lightning.policies.sources import LoRA


def add_lora(model: PreTrainedModel, lora: LoRA, task_type: str) -> nn.Module:
    """Freeze `model` and add trainable low-rank adapters."""
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
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA cannot be added: {reason_of(error)} (see lora.targets)") from error


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
