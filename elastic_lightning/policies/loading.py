"""Where a policy comes from: hub id, folder, GGUF file or an architecture from scratch; with or without LoRA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

from elastic_lightning.errors import UserError
from elastic_lightning.policies.adapters import adapter_base, add_lora, check_targets
from elastic_lightning.policies.auto import AutoLanguageModel
from elastic_lightning.policies.causal import CausalLM
from elastic_lightning.policies.config_file import attention_of, check_counts, check_sizes
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.portions import out_of_memory
from elastic_lightning.policies.quantization import Quantization, check_quantization, quantization_config
from elastic_lightning.policies.reading import hub_offline, readable, reason_of
from elastic_lightning.policies.saving import PAD_TOKENS, usable_pad
from elastic_lightning.policies.seq2seq import Seq2SeqLM
from elastic_lightning.policies.sources import Dtype, LoRA, ModelSource
from elastic_lightning.policies.special_tokens import shares_pad
from elastic_lightning.policies.sums import check_sums


class LoadedPolicy(NamedTuple):
    """A language model, causal or encoder-decoder, and its tokenizer.

    `unmerged_adapter` is true when the folder held an adapter: switched off, such a model is not the policy it was.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    unmerged_adapter: bool


def load_policy(
    path: str | None = None,
    *,
    gguf_file: str | None = None,
    architecture: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    dtype: Dtype = "float32",
    attention: str | None = None,
    lora: LoRA | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> LoadedPolicy:
    """Load a language model, causal or encoder-decoder (see `ModelSource` for the arguments), in eval mode.

    Raises:
        UserError: the model or tokenizer cannot be found, or the options contradict each other.
    """
    how = attention, lora, trust_remote_code, quantization
    return load_source(ModelSource(path, gguf_file, architecture, tokenizer, dtype, *how))


def load_source(source: ModelSource) -> LoadedPolicy:
    """`load_policy` from the dataclass that a configuration file fills."""
    if source.quantization is not None:
        check_quantization(source.quantization)  # before anything loads
    gguf_file = source.gguf_file if source.tokenizer is None else None  # a tokenizer of its own lies elsewhere
    tokenizer = load_tokenizer(source.tokenizer or source.path, gguf_file, source.trust_remote_code)
    adapter = source.path is not None and (Path(source.path) / "adapter_config.json").exists()
    if source.architecture is not None:
        model = from_architecture(AutoLanguageModel, source, tokenizer)
    elif adapter:
        model = load_adapter(source)
    else:
        model = from_path(AutoLanguageModel, source)
    check_vocabulary(tokenizer, model, source.tokenizer or source.path)
    if source.lora is not None:
        if adapter:
            raise UserError(f"{source.path} holds an unmerged adapter: merge it before training another LoRA on top")
        task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        model = add_lora(model, source.lora, task_type)
    return LoadedPolicy(model.eval(), tokenizer, adapter)


def as_policy(model: nn.Module, trainable_layers: int | None = None, gradient_checkpointing: bool = False) -> PolicyLM:
    """The model as a policy of its kind, see `CausalLM` for the arguments: the one place that asks which it is.

    Raises:
        UserError: the architecture is not supported, or an encoder-decoder is to have `trainable_layers`.
    """
    if not model.config.is_encoder_decoder:
        return CausalLM(model, trainable_layers, gradient_checkpointing)
    if trainable_layers is not None:
        raise UserError("execution.trainable_layers is for decoder-only models; leave it out for an encoder-decoder")
    return Seq2SeqLM(model, gradient_checkpointing)


def load_tokenizer(path: str, gguf_file: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a pad token pads with another special token, such as eos.

    Pad may be eos: what is padding is said by masks alone, and pad ids are replaced by 0 before every forward, so that
    a model learns to stop all the same. Some tokenizers (Marian's, T5's) append the end-of-text token to what they
    encode; `encoding` ends each text once.
    """
    gguf_file = gguf_file or lone_gguf(path)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    if not Path(path).exists() and hub_offline():
        extra["local_files_only"] = True
    check_sizes(path)  # of the model beside it, whose config a tokenizer's class may be told by
    with readable("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **extra)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no file at all
        raise UserError(f"cannot load the tokenizer from {path}: it holds no vocabulary (no tokenizer.json there?)")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": usable_pad(tokenizer, len(tokenizer)) or PAD_TOKENS[0]})
    tokenizer.padding_side = "left"
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    """Raise a `UserError` where the tokenizer has tokens that the model has no embedding for, beside a pad token, or
    two ids for the end of a text."""
    if getattr(tokenizer, "separate_vocabs", False):  # one id has to end what is read and what is written
        end = tokenizer.target_encoder.get(tokenizer.eos_token)
        if end != tokenizer.eos_token_id:
            raise UserError(
                f"the two vocabularies of the tokenizer {name} number {tokenizer.eos_token} differently "
                f"({tokenizer.eos_token_id} and {end}): such a tokenizer is not supported"
            )
    ids = [index for token, index in tokenizer.get_vocab().items() if token != tokenizer.pad_token]
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= rows:
        raise UserError(
            f"the tokenizer {name} has tokens up to number {max(ids)}, and the model's vocabulary holds {rows}: give "
            "the tokenizer that the model was trained with"
        )


def from_path(auto_class: type, source: ModelSource, new_head: bool = False, **options: Any) -> PreTrainedModel:
    """Load weights from a hub id or folder with one of transformers' auto classes.

    Raises:
        UserError: they cannot be loaded, or some are missing; with `new_head` those are random, to be trained.
    """
    check_sizes(source.path)
    gguf_file = source.gguf_file or lone_gguf(source.path)
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    if source.quantization is not None:
        check_quantization(source.quantization)
        options["quantization_config"] = quantization_config(source.quantization, source.dtype)
        if torch.cuda.is_available():  # bitsandbytes keeps its weights where they are quantised: on this process's GPU
            options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    if not Path(source.path).exists() and hub_offline():
        options["local_files_only"] = True
    check_sums(source.path)
    with readable("model", source.path):
        model, report = auto_class.from_pretrained(
            source.path,
            output_loading_info=True,
            dtype=getattr(torch, source.dtype),
            attn_implementation=attention_of(source),
            trust_remote_code=source.trust_remote_code,
            **options,
        )
    missing = sorted(report["missing_keys"])
    if missing and not new_head:
        kind = type(model).__name__
        raise UserError(f"{source.path} holds no {kind}: {len(missing)} of its weights are missing, e.g. {missing[0]}")
    if gguf_file is not None:  # read into whole weights, and marked as quantised all the same: it could not be saved
        model.hf_quantizer.remove_quantization_config(model)
    return fuse_gelu(model)


def lone_gguf(path: str) -> str | None:
    """The name of the GGUF file in a folder that holds one and no config.json of its own, as a download does."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = [file.name for file in folder.glob("*.gguf")]
    return files[0] if len(files) == 1 else None


def from_architecture(
    auto_class: type, source: ModelSource, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> PreTrainedModel:
    """Random weights in the shape of `source.architecture`, with the tokenizer's vocabulary and special tokens.

    A tokenizer that pads with another token gets a pad token of its own, in place: models never train the embedding of
    theirs, and there is room for one more.
    """
    if shares_pad(tokenizer):
        known = [token for token in PAD_TOKENS if token in tokenizer.get_vocab()]
        tokenizer.add_special_tokens({"pad_token": (known or PAD_TOKENS)[0]})
    fields = dict(source.architecture or {})
    check_counts(fields, "`architecture`")
    model_type = fields.pop("model_type")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        if AutoConfig.for_model(model_type).is_encoder_decoder:
            # Its decoder starts as Marian's and T5's do, and ends where it likes.
            special |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": None}
        config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **options, **fields})
        text = config.get_text_config()
        if text is not config and not config.is_encoder_decoder:  # what the tokenizer says would be of no part
            raise UserError(f"it has several parts: give the type of the one for text, as {text.model_type}")
        how = {"dtype": getattr(torch, source.dtype), "attn_implementation": attention_of(source)}
        return fuse_gelu(auto_class.from_config(config, **how))
    except Exception as error:  # see `readable`
        if out_of_memory(error):
            raise
        raise UserError(f"cannot build the architecture {model_type!r}: {reason_of(error)}") from error


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: with any, the policy that samples is not the policy that is updated."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # rates that a forward gives to functional dropout
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def fuse_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Let torch compute GPT-2's activation in one operation: transformers spells the same function out in eight, and
    keeps what each of them needs for the backward pass."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(parent, name, GELUTanh())
    return model


def load_adapter(
    source: ModelSource, auto_class: type = AutoLanguageModel, base: str | None = None, **options: Any
) -> nn.Module:
    """A folder that holds an adapter, on the base model that it names, or another; `options` are for the base.

    Raises:
        UserError: the base model is not named or cannot be loaded, or the adapter does not fit it, or changes tied
            embeddings.
    """
    from peft import PeftModel

    check_sums(source.path)
    base = base or adapter_base(source.path)
    fields = {name: getattr(source, name) for name in ("dtype", "attention", "trust_remote_code")}
    model = from_path(auto_class, ModelSource(base, **fields), **options)
    try:
        model = PeftModel.from_pretrained(model, source.path, is_trainable=True)
    except Exception as error:  # see `readable`
        raise UserError(
            f"the adapter in {source.path} does not fit its base model {base}: {reason_of(error)}"
        ) from error
    check_targets(model)
    return model
