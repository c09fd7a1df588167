"""Tiny models and a tokenizer, made once a session; every fixture is a `save_pretrained` folder as a string."""

import os

# Before numpy and torch are imported: tiny arrays gain nothing from threads, and lose much on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)
# Event files of one second and one process are read in the order of their numbers as text, where 10 is before 9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs CUDA")


WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(3, 30))]  # a word's number is its id
PAD, EOS, UNK = 0, 1, 2


def word_tokenizer(**special):
    """A word-level tokenizer of WORDS; `special` names its special tokens, e.g. ``eos_token="<eos>"``."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


BART_LIKE = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 40, "init_std": 0.5}
BART_LIKE |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART_LIKE |= {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "encoder_layerdrop": 0.3}
T5_LIKE = {"d_model": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "d_kv": 8, "d_ff": 32}
T5_LIKE |= {"dropout_rate": 0.3, "initializer_factor": 0.7}


def encoder_decoder(model_type, vocab_size, pad, eos):
    """A tiny Marian, BART or T5: unlike numbers of layers, random biases, more dropout than anyone uses."""
    size = T5_LIKE if model_type == "t5" else BART_LIKE
    start = eos if model_type == "bart" else pad  # as their makers have it
    special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad, "decoder_start_token_id": start}
    special |= {"forced_eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = AutoConfig.for_model(model_type, vocab_size=vocab_size, **size, **special)
        model = AutoModelForSeq2SeqLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # not Marian's positions
                parameter.data += 0.05 * torch.randn_like(parameter)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()[0, eos] = 3.0  # some responses end
    return model


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


def save_encoder_decoder(tmp_path_factory, model_type, tokenizer_folder):
    folder = str(tmp_path_factory.mktemp(model_type))
    encoder_decoder(model_type, len(WORDS), PAD, EOS).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def marian_folder(tmp_path_factory, tokenizer_folder):
    return save_encoder_decoder(tmp_path_factory, "marian", tokenizer_folder)


@pytest.fixture(scope="session")
def bart_folder(tmp_path_factory, tokenizer_folder):
    return save_encoder_decoder(tmp_path_factory, "bart", tokenizer_folder)


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, tokenizer_folder):
    return save_encoder_decoder(tmp_path_factory, "t5", tokenizer_folder)


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory, tokenizer_folder):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    config = BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=PAD, initializer_range=0.5, **size, **labels
    )
    return save(tmp_path_factory, "classifier", BertForSequenceClassification, config, tokenizer_folder)


@pytest.fixture(scope="session", name="encoder_decoder")
def encoder_decoder_fixture():
    """The function that makes a tiny encoder-decoder."""
    return encoder_decoder


@pytest.fixture(scope="session", name="word_tokenizer")
def word_tokenizer_fixture():
    """The function that makes a word-level tokenizer with the special tokens it is given."""
    return word_tokenizer
