"""Tiny models and a tokenizer, made once a session; every fixture is a `save_pretrained` folder as a string."""

import os

# Before numpy and torch are imported: tiny arrays gain nothing from threads, and lose much on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, 30))]  # a word's number is its id
PAD, EOS, UNK = 0, 1, 2


def word_tokenizer(**special):
    """A word-level tokenizer of WORDS; `special` names its special tokens, e.g. ``eos_token="<eos>"``."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def save(tmp_path_factory, name, model_class, config, tokenizer_folder):
    """Random weights (seed 0, large enough that logits differ by more than rounding) saved with the tokenizer."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp(name))
    model_class(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    word_tokenizer(eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tokenizer_folder):
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=len(WORDS), bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **size)
    return save(tmp_path_factory, "gpt2", GPT2LMHeadModel, config, tokenizer_folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer_folder):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = LlamaConfig(vocab_size=len(WORDS), **size, **heads, **special)
    return save(tmp_path_factory, "llama", LlamaForCausalLM, config, tokenizer_folder)


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory, tokenizer_folder):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    config = BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=PAD, initializer_range=0.5, **size, **labels
    )
    return save(tmp_path_factory, "classifier", BertForSequenceClassification, config, tokenizer_folder)


@pytest.fixture(scope="session", name="word_tokenizer")
def word_tokenizer_fixture():
    """The function that makes a word-level tokenizer with the special tokens it is given."""
    return word_tokenizer
