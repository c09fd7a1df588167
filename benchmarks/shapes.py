"""The sizes that are measured, and models of those sizes with random weights, made once a shape."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "elastic_lightning" / "benchmarks"


@dataclass(frozen=True)
class Shape:
    """A GPT-2 or Llama shape and one PPO batch. The reward model is a GPT-2 of the policy's width and `reward_layers`.

    A Llama has an output layer that is its embedding, `kv_heads` and an MLP of width `inner`; a GPT-2 has neither.
    """

    layers: int = 6
    width: int = 384
    heads: int = 6
    vocabulary: int = 50_257
    batch: int = 64
    prompt: int = 16
    response: int = 48
    epochs: int = 4
    mini_batches: int = 4
    reward_layers: int = 2
    family: str = "gpt2"
    kv_heads: int = 0
    inner: int = 0

    @property
    def folder(self) -> Path:
        return CACHE / f"{self.family}-{self.layers}x{self.width}-{self.vocabulary}-{self.prompt + self.response}"

    @property
    def kv_width(self) -> int:
        """Of the keys of one token in one layer."""
        return self.width * self.kv_heads // self.heads if self.family == "llama" else self.width

    @property
    def weights_read(self) -> int:
        """Numbers that decoding a token must read: all weights but the position table and the last norm."""
        if self.family == "llama":
            layer = 2 * self.width * (self.width + self.kv_width + 1) + 3 * self.width * self.inner
        else:
            layer = 12 * self.width**2 + 13 * self.width
        return self.layers * layer + self.vocabulary * self.width

    def to_json(self) -> str:
        return json.dumps(asdict(self))


SMALL = Shape()  # 30 M parameters: what two CPU cores can train
QUICK = Shape(layers=2, width=128, heads=2, vocabulary=8_192, batch=16, response=24)
GPT2_SMALL = Shape(layers=12, width=768, heads=12, prompt=64)  # 124 M: for a GPU
LLAMA_1B = replace(  # 1.24 B: Llama 3.2's
    Shape(layers=16, width=2048, heads=32, vocabulary=128_256, prompt=64), family="llama", kv_heads=8, inner=8192
)


def default_shape(quick: bool = False) -> Shape:
    """The shape for this machine."""
    if quick:
        return QUICK
    return GPT2_SMALL if torch.cuda.is_available() else SMALL


def prepare(shape: Shape) -> Path:
    """A folder with `policy` and `reward` in the format of `save_pretrained`, each with its tokenizer."""
    folder = shape.folder
    if not (folder / "complete").exists():
        _save_models(shape, folder)
        (folder / "complete").touch()
    return folder


def prompts(shape: Shape, batches: int) -> torch.Tensor:
    """Random prompts int64 [batches * B, P] without padding; no special token is among them."""
    generator = torch.Generator().manual_seed(1)
    size = (batches * shape.batch, shape.prompt)
    return torch.randint(2, shape.vocabulary, size, generator=generator)


def doubled(shape: Shape, field: str, times: int) -> Shape:
    """The shape with one field doubled so often; `width` takes its heads along."""
    factor = 2**times
    changes = {field: getattr(shape, field) * factor}
    if field == "width":
        changes["heads"] = shape.heads * factor
    return replace(shape, **changes)


def _save_models(shape: Shape, folder: Path) -> None:
    set_seed(0)
    vocabulary = {"<eos>": 0, "<pad>": 1} | {f"w{number}": number for number in range(2, shape.vocabulary)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    common = special | {
        "vocab_size": shape.vocabulary,
        "n_positions": shape.prompt + shape.response,
        "n_embd": shape.width,
        "n_head": shape.heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion random numbers
        gpt2 = shape.family == "gpt2"
        policy = GPT2LMHeadModel(GPT2Config(n_layer=shape.layers, **common)) if gpt2 else _llama(shape, special)
        reward = GPT2ForSequenceClassification(GPT2Config(n_layer=shape.reward_layers, num_labels=1, **common))
    for name, network in (("policy", policy), ("reward", reward)):
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _llama(shape: Shape, special: dict[str, int | None]) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.prompt + shape.response,
        tie_word_embeddings=True,
        **special,
    )
    return LlamaForCausalLM(config)
