"""Sequence classifiers: language models with a head that scores whole texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.policies.adapters import add_lora, merge
from elastic_lightning.policies.config_file import check_sizes
from elastic_lightning.policies.loading import from_architecture, from_path, load_adapter
from elastic_lightning.policies.saving import ADAPTER_WEIGHTS
from elastic_lightning.policies.sources import ModelSource
from elastic_lightning.policies.special_tokens import shares_pad

HEAD = re.compile(r"\.(score|classifier(\.out_proj)?)\.weight$")  # [labels, hidden], by transformers' names


def new_classifier(source: ModelSource, tokenizer: PreTrainedTokenizerBase, **options: Any) -> nn.Module:
    """A classifier to train: any model's weights, or random ones, with a new head where the source has none.

    With LoRA the head is trained whole, beside the adapter.

    Args:
        source: the model to start from.
        tokenizer: whose vocabulary a model from scratch has.
        options: fields of its config, e.g. ``num_labels=1``.

    Raises:
        UserError: the model cannot be loaded, or holds an unmerged adapter.
    """
    if source.path is not None and is_adapter(source.path):
        raise UserError(f"{source.path} holds an unmerged adapter: merge it before training a head on top")
    if source.architecture is not None:
        model = from_architecture(AutoModelForSequenceClassification, source, tokenizer, **options)
    else:
        model = from_path(AutoModelForSequenceClassification, source, new_head=True, **options)
    return model if source.lora is None else train_in_float32(add_lora(model, source.lora, task_type="SEQ_CLS"))


def train_in_float32(model: nn.Module) -> nn.Module:
    """Hold what is trained of a model in float32, as peft does with adapters but not with a head: in bfloat16 most of
    its steps would be rounded away. What such a head reads is cast to its type."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(read_in_own_type)
    return model


def read_in_own_type(linear: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
    """Cast the input of a layer to the type of its weights."""
    return (args[0].to(linear.weight.dtype),)


def trained_classifier(source: ModelSource) -> PreTrainedModel:
    """A classifier to score with, its adapter merged where the folder holds one; frozen, in eval mode.

    Raises:
        UserError: it cannot be loaded, or has no trained head.
    """
    if is_adapter(source.path):
        labels = adapter_labels(source.path, source.trust_remote_code)
        model = load_adapter(source, AutoModelForSequenceClassification, new_head=True, **labels)
        model = merge(model)
    else:
        model = from_path(AutoModelForSequenceClassification, source)
    return model.eval().requires_grad_(False)


def pad_like(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a classifier know padding by an id of its own: the tokenizer's, or one of no text where that is eos too.

    The head of a decoder scores the last token that is not its config's `pad_token_id`, with which batches are padded.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    model.config.pad_token_id = rows if shares_pad(tokenizer) else tokenizer.pad_token_id
    model.get_input_embeddings().register_forward_pre_hook(hide_foreign_tokens)


def hide_foreign_tokens(embedding: nn.Embedding, args: tuple[Tensor]) -> tuple[Tensor]:
    """A pad token that the tokenizer was given after training has no embedding; masked positions may hold anything."""
    return (args[0].where(args[0] < embedding.weight.shape[0], 0),)


def is_adapter(path: str) -> bool:
    """Whether a local folder holds an adapter that is not merged."""
    return (Path(path) / "adapter_config.json").exists()


def adapter_labels(path: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """What an adapter's classifier has other than its base model: names of labels as `save_model` keeps them in the
    folder's own config, else their number, the rows of the head that was trained beside the adapter.

    Raises:
        UserError: the folder holds no head.
    """
    if (Path(path) / "config.json").is_file():
        check_sizes(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return {name: getattr(config, name) for name in ("id2label", "label2id")}
    try:
        with safe_open(str(Path(path) / ADAPTER_WEIGHTS), "pt") as weights:
            names = [name for name in weights.keys() if HEAD.search(name)]  # noqa: SIM118 (no dict)
            heads = [weights.get_slice(name).get_shape()[0] for name in names]
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot load the adapter from {path}: {error}") from error
    if not heads:
        raise UserError(f"the adapter in {path} has no classification head: is it a policy's?")
    return {"num_labels": heads[0]}
