"""Folding a trained adapter into its base model: one folder that transformers loads without peft."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from elastic_lightning.errors import UserError
from elastic_lightning.policies.auto import AutoLanguageModel
from elastic_lightning.policies.loading import Dtype, ModelSource, from_path, load_tokenizer
from elastic_lightning.policies.saving import ADAPTER_WEIGHTS, save_model

HEADS = ("score", "classifier")  # what transformers and peft call the output layer of a sequence classifier
CARD = "README.md"  # peft's model card names the base model


class Adapter(NamedTuple):
    """What an adapter folder says of itself: `settings` are peft's, `base` the path of the model that it changes."""

    folder: Path
    settings: dict[str, Any]
    base: str

    @property
    def classifies(self) -> bool:
        return self.settings.get("task_type") == "SEQ_CLS"


def read_adapter(folder: str | Path, base: str | None = None) -> Adapter:
    """Read the settings of a peft adapter folder; `base` replaces the base model that they name.

    Raises:
        UserError: the folder holds no adapter, or does not name its base model.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} holds no adapter (adapter_config.json and {ADAPTER_WEIGHTS})")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    base = base or settings.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} does not name its base model (base_model_name_or_path): give it with --base")
    return Adapter(folder, settings, base)


def load_adapter_model(adapter: Adapter, dtype: Dtype, trust_remote_code: bool = False) -> nn.Module:
    """The base model with its adapter, a language model or a sequence classifier, in eval mode.

    Raises:
        UserError: the base model cannot be loaded, or the adapter does not fit it.
    """
    from peft import PeftModel

    source = ModelSource(adapter.base, dtype=dtype, trust_remote_code=trust_remote_code)
    if adapter.classifies:
        base = from_path(AutoModelForSequenceClassification, source, **classifier_options(adapter))
    else:
        base = from_path(AutoLanguageModel, source)
    try:
        return PeftModel.from_pretrained(base, str(adapter.folder)).eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the adapter in {adapter.folder} does not fit its base model {adapter.base}: {reason}"
        ) from error


def classifier_options(adapter: Adapter) -> dict[str, Any]:
    """Number, names and pad token of a classifier's labels: as its config says, else from the shape of its head."""
    if (adapter.folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(adapter.folder)
        return {name: getattr(config, name) for name in ("id2label", "label2id", "pad_token_id")}
    with safe_open(adapter.folder / ADAPTER_WEIGHTS, "pt") as weights:
        heads = [name for name in weights.keys() if name.split(".")[-2] in HEADS]  # noqa: SIM118 (no mapping)
        if not heads:
            raise UserError(f"the adapter in {adapter.folder} classifies, but holds no head ({' or '.join(HEADS)})")
        return {"num_labels": weights.get_slice(heads[0]).get_shape()[0]}


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
        UserError: there is no adapter, its base does not load, or `output` holds files.
    """
    adapter, output = read_adapter(folder, base), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists: remove it or choose another --output")
    own = Path(adapter.folder, "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter.folder) if own else adapter.base, trust_remote_code=trust_remote_code)
    model = load_adapter_model(adapter, dtype or stored_dtype(adapter.base, trust_remote_code), trust_remote_code)
    fresh = output.with_name(output.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    save_model(model.merge_and_unload(), tokenizer, fresh)
    for file in adapter.folder.iterdir():
        of_peft = file.name.startswith("adapter_") or file.name == CARD
        if file.is_file() and not of_peft and not (fresh / file.name).exists():
            shutil.copy2(file, fresh)
    if output.exists():
        output.rmdir()
    os.replace(fresh, output)


def stored_dtype(path: str, trust_remote_code: bool = False) -> Dtype:
    """The type of a model's weights where it lies, float32 where its config does not say."""
    try:
        dtype = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).dtype
    except (OSError, ValueError):
        return "float32"  # loading the model will say what is wrong
    return str(dtype or torch.float32).removeprefix("torch.")
