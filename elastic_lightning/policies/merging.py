"""Folding a trained adapter into its base model: one folder that transformers loads without peft."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from elastic_lightning.errors import UserError
from elastic_lightning.policies.adapters import adapter_base, merge
from elastic_lightning.policies.classifier import adapter_labels, is_adapter
from elastic_lightning.policies.config_file import check_sizes
from elastic_lightning.policies.loading import load_adapter, load_tokenizer
from elastic_lightning.policies.reading import hub_offline
from elastic_lightning.policies.saving import save_model
from elastic_lightning.policies.sources import Dtype, ModelSource

CARD = "README.md"  # peft's model card names the base model


def merge_adapter(
    folder: str | Path,
    output: str | Path,
    base: str | None = None,
    dtype: Dtype | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the model of an adapter folder as one whole: weights, tokenizer, and the files beside the adapter (value
    head, normalisation of scores) as they are. `output` appears under its name when it is whole.

    Args:
        folder: a peft adapter of a language model or a sequence classifier.
        output: a new folder.
        base: in place of the base model that the adapter names.
        dtype: of the weights; that of the base model by default.
        trust_remote_code: run the python code that comes with the model; off unless asked.

    Raises:
        UserError: there is no adapter, its base does not load or fit, it changes tied embeddings, or `output` holds
            files.
    """
    folder, output = Path(folder), Path(output)
    if not is_adapter(str(folder)):
        raise UserError(f"{folder} holds no adapter (adapter_config.json): there is nothing to merge")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists: remove it or choose another --output")
    base = base or adapter_base(str(folder))
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder) if own else base, trust_remote_code=trust_remote_code)
    dtype = dtype or stored_dtype(base, trust_remote_code)
    source = ModelSource(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    model = _load(source, base)
    fresh = output.with_name(output.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    save_model(merge(model), tokenizer, fresh)
    for file in folder.iterdir():
        of_peft = file.name.startswith("adapter_") or file.name == CARD
        if file.is_file() and not of_peft and not (fresh / file.name).exists():
            shutil.copy2(file, fresh)
    if output.exists():
        output.rmdir()
    os.replace(fresh, output)


def stored_dtype(path: str, trust_remote_code: bool = False) -> Dtype:
    """The type of a model's weights where it lies, float32 where its config does not say."""
    local = not Path(path).exists() and hub_offline()
    try:
        check_sizes(path)
        dtype = AutoConfig.from_pretrained(path, local_files_only=local, trust_remote_code=trust_remote_code).dtype
    except Exception:  # of any kind, see `readable`
        return "float32"  # loading the model will say what is wrong
    return str(dtype or torch.float32).removeprefix("torch.")


def _load(source: ModelSource, base: str) -> nn.Module:
    settings = json.loads((Path(source.path) / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("task_type") != "SEQ_CLS":
        return load_adapter(source, base=base)
    labels = adapter_labels(source.path, source.trust_remote_code)
    return load_adapter(source, AutoModelForSequenceClassification, base, new_head=True, **labels)
