"""Tokenizers of the kinds that people bring, trained on a few sentences, and tiny models of random weights for them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

TEXT = "the film was a long bad good story about men who never saw one another again and it ends well"
WORDS = TEXT.split()
MULTIPLE = 64  # vocabularies of models are padded to it


def sentences(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(number)]


def _trained(model, pre_tokenizer, decoder, trainer, template: str | None, special: list[str], **named):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(sentences(300), trainer(special_tokens=special, show_progress=False))
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def llama():
    """``<s>`` before a text, no pad token."""
    spaces = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = lambda **given: trainers.BpeTrainer(vocab_size=90, **given)  # noqa: E731
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    model = models.BPE(unk_token="<unk>")
    return _trained(model, *spaces, trainer, "<s> $A", ["<unk>", "<s>", "</s>"], **names)


def pad_is_eos():
    """SmolLM2's: nothing before a text, padded with eos."""
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = lambda **given: trainers.BpeTrainer(vocab_size=90, **given)  # noqa: E731
    end = "<|endoftext|>"
    names = {"bos_token": end, "eos_token": end, "pad_token": end}
    return _trained(models.BPE(), *spaces, trainer, None, [end], **names)


def two_ends():
    """Gemma's: ``<bos>`` before a text; a turn ends with ``<end_of_turn>``, which is not the tokenizer's eos."""
    spaces = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = lambda **given: trainers.BpeTrainer(vocab_size=90, **given)  # noqa: E731
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"]
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    extra = {"extra_special_tokens": ["<end_of_turn>"]}
    return _trained(models.BPE(unk_token="<unk>"), *spaces, trainer, "<bos> $A", special, **names, **extra)


def wordpiece():
    """BERT's: ``[CLS]`` before a text and ``[SEP]`` after it, no eos."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    trainer = lambda **given: trainers.WordPieceTrainer(vocab_size=90, **given)  # noqa: E731
    model, spaces = models.WordPiece(unk_token="[UNK]"), (pre_tokenizers.Whitespace(), decoders.WordPiece())
    return _trained(model, *spaces, trainer, "[CLS] $A [SEP]", special, **names)


def t5():
    """``</s>`` after a text."""
    spaces = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = lambda **given: trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **given)  # noqa: E731
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _trained(models.Unigram(), *spaces, trainer, "$A </s>", ["<pad>", "</s>", "<unk>"], **names)


CAUSAL = {"llama": llama, "pad is eos": pad_is_eos, "two ends": two_ends, "wordpiece": wordpiece}
KINDS = {**CAUSAL, "t5": t5, "marian": t5}
ENDS = {"llama": ["</s>"], "pad is eos": ["<|endoftext|>"], "two ends": ["<eos>", "<end_of_turn>"]}
ENDS |= {"wordpiece": ["[SEP]"], "t5": ["</s>"], "marian": ["</s>"]}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"hidden_size": 16, "intermediate_size": 32, "initializer_range": 0.4}
MARIAN = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "init_std": 0.5}
MARIAN |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "initializer_factor": 0.7}


def save_kind(kind: str, folder: Path | str):
    """A model's folder with a tokenizer of this kind; its vocabulary has ids that are no token's."""
    tokenizer = KINDS[kind]()
    ends = tokenizer.convert_tokens_to_ids(ENDS[kind])
    rows = -(-len(tokenizer) // MULTIPLE) * MULTIPLE
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends[0], "pad_token_id": tokenizer.pad_token_id}
    size, model_type, auto = SIZES, "llama", AutoModelForCausalLM
    if kind in ("t5", "marian"):
        size, model_type, auto = {"t5": T5, "marian": MARIAN}[kind], kind, AutoModelForSeq2SeqLM
        special |= {"decoder_start_token_id": tokenizer.pad_token_id, "forced_eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(AutoConfig.for_model(model_type, vocab_size=rows, **size, **special)).eval()
    if kind == "two ends":
        with torch.no_grad():
            model.lm_head.weight[ends] *= 3  # a response of random weights ends now and then
    model.generation_config = GenerationConfig(**special | {"eos_token_id": ends if len(ends) > 1 else ends[0]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer
