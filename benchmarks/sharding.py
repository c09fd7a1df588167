"""Memory and traffic of PPO with Elastic Reset per GPU, computed from shapes: `python benchmarks/sharding.py`.

Nothing is measured: weights are counted on transformers' models without memory, and multiplied by what this project
keeps of each (see `Sizes`). Activations, which a micro-batch of one row and gradient checkpointing keep small, are left
out, as are the caches of CUDA. `docs/scaling.md` holds what it prints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure import table
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

FLOAT, HALF = 4, 2  # bytes
GB = 1e9
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 32}
MODELS: dict[str, PreTrainedConfig] = {
    "124 M (GPT-2)": GPT2Config(),
    "1 B (Llama 3.2's shape)": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "7 B (Llama 2's shape)": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, **LLAMA),
    "70 B (Llama 2's shape)": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}
RANK = 16  # of LoRA, on the query and value projections


@dataclass(frozen=True)
class Batch:
    """A PPO batch on one GPU."""

    rows: int = 8
    prompt: int = 64
    response: int = 48
    epochs: int = 4
    mini_batches: int = 4


@dataclass(frozen=True)
class Sizes:
    """Weights of a model, and how the run treats them.

    Full fine-tuning keeps float32 weights, gradients, two moments of AdamW, the reference (which is theta_0) and the
    average: six times 4 bytes a weight. LoRA keeps the base in bfloat16, and six times 4 bytes of the adapter alone
    (theta_0 of the adapter in place of a reference). The reward model has the policy's shape, in bfloat16.
    """

    total: int
    layer: int  # of one layer
    layers: int
    adapter: int
    cache_columns: int  # numbers a token and row in the cache of keys and values

    @property
    def rest(self) -> int:
        """Weights of no layer: embeddings, output layer, last norm."""
        return self.total - self.layer * self.layers

    def trained(self, lora: bool) -> int:
        return self.adapter if lora else self.total

    def state(self, lora: bool) -> int:
        """Bytes of everything that is kept between two forward passes, on all GPUs together."""
        reward = HALF * self.total
        return 6 * FLOAT * self.trained(lora) + (HALF * self.total if lora else 0) + reward

    def passing(self, lora: bool) -> int:
        """Bytes that sharding gathers beside a GPU's share, at the update's peak.

        Two layers in bfloat16 (one computes, the next arrives), the gradient of one trained layer in bfloat16 and in
        float32, and the weights of no layer: in the type they are kept in, with their gradient.
        """
        kept = HALF if lora else FLOAT
        gradients = 0 if lora else (HALF + FLOAT) * self.layer + FLOAT * self.rest
        return 2 * HALF * self.layer + kept * self.rest + gradients

    def cache(self, batch: Batch) -> int:
        """Bytes of the cache of keys and values while sampling, in bfloat16, on one GPU."""
        return HALF * self.cache_columns * batch.rows * (batch.prompt + batch.response)


def sizes(config: PreTrainedConfig) -> Sizes:
    """The sizes of a config's model; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    width, heads = config.hidden_size, config.num_attention_heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * (width // heads)
    if config.model_type == "gpt2":  # query, key and value are one projection, and peft's choice
        adapter = RANK * (width + 3 * width)
    else:
        adapter = RANK * (width + width) + RANK * (width + keys)
    return Sizes(
        total=_count(model),
        layer=_count(layers[0]),
        layers=len(layers),
        adapter=adapter * len(layers),
        cache_columns=2 * keys * len(layers),
    )


def memory(found: Sizes, lora: bool, ranks: int, sharded: bool, batch: Batch) -> float:
    """Bytes on one GPU."""
    if not sharded:
        return found.state(lora) + found.cache(batch)
    return found.state(lora) / ranks + found.passing(lora) + found.cache(batch)


def traffic(found: Sizes, lora: bool, ranks: int, sharded: bool, batch: Batch) -> dict[str, float]:
    """Bytes that one GPU receives during a PPO batch, by what for; micro-batches are mini-batches.

    An all-reduce of n bytes by a ring brings 2 (ranks - 1) / ranks n to each, a gathering or a scattering half that.
    """
    share = (ranks - 1) / ranks
    steps = batch.epochs * batch.mini_batches
    gradients = share * FLOAT * found.trained(lora) * steps
    if not sharded:
        return {"sampling": 0.0, "scoring": 0.0, "update": 2 * gradients}
    layers = HALF * found.layer * found.layers
    rest = (HALF if lora else FLOAT) * found.rest
    references = 1 if lora else 2  # the policy's weights of no layer, and those of the reference
    sampling = share * (layers * batch.response + references * rest)
    scoring = share * (layers + references * rest + HALF * found.total)  # the reference and the reward model
    return {
        "sampling": sampling,
        "scoring": scoring,
        "update": share * (2 * layers + 2 * rest) * steps + gradients,  # forward and backward
    }


def rows(batch: Batch) -> list[list[str]]:
    """The table of `docs/scaling.md`."""
    found = []
    for name, config in MODELS.items():
        of_model = sizes(config)
        for lora in (False, True):
            for strategy, ranks in (("ddp", 8), ("fsdp", 8), ("fsdp", 64)):
                sharded = strategy == "fsdp"
                parts = traffic(of_model, lora, ranks, sharded, batch)
                cells = [memory(of_model, lora, ranks, sharded, batch), *parts.values()]
                method = "LoRA" if lora else "all weights"
                found.append([name, method, f"{strategy} x {ranks}", *(f"{cell / GB:,.1f}" for cell in cells)])
    return found


COLUMNS = ["model", "trained", "GPUs", "memory GB", "sampling GB", "scoring GB", "update GB"]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    table(COLUMNS, rows(Batch()))
