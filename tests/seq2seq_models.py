"""Tiny encoder-decoders of three kinds, with dropout in their configs, and biases and scales away from their start."""

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

KINDS = ("marian", "bart", "t5")


def build(kind: str, vocabulary: int, pad: int, eos: int, start: int):
    """A model of width 16 with two layers of each sort; `start` begins the decoder's input."""
    special = {"vocab_size": vocabulary, "pad_token_id": pad, "eos_token_id": eos, "decoder_start_token_id": start}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "max_position_embeddings": 48}
    layers |= {"forced_eos_token_id": None, "bos_token_id": None, "init_std": 0.3, "dropout": 0.1}
    layers |= {"attention_dropout": 0.1, "activation_dropout": 0.1}
    torch.manual_seed(0)
    if kind == "marian":
        model = MarianMTModel(MarianConfig(**special, **layers, scale_embedding=True, decoder_vocab_size=vocabulary))
    elif kind == "bart":
        model = BartForConditionalGeneration(BartConfig(**special, **layers))
    else:
        size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
        model = T5ForConditionalGeneration(T5Config(**special, **size, dropout_rate=0.1, initializer_factor=1.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias += torch.randn(model.final_logits_bias.shape, generator=generator)
    return model.eval()
