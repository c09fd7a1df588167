"""The memory of a PPO batch, computed from shapes alone: models on the meta device, which holds no numbers.

Bytes are those of tensors. What a process needs beside them (libraries, the CUDA context, an allocator's gaps) is not
in them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from elastic_lightning.functional.output_layer import CHUNK_BYTES, CHUNK_BYTES_ACCELERATOR
from elastic_lightning.policies import LoRA
from elastic_lightning.policies.adapters import add_lora

FLOAT = 4  # bytes of a float32
BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale in 4 bits, and scales that share a scale of their own


@dataclass(frozen=True)
class Batch:
    """One PPO batch.

    Attributes:
        rows: prompts.
        mini_batches: optimizer steps an epoch.
        micro_rows: rows a forward and backward pass.
        prompt: tokens.
        response: tokens.
    """

    rows: int
    mini_batches: int
    micro_rows: int
    prompt: int
    response: int


@dataclass(frozen=True)
class Arrangement:
    """Which models a PPO batch holds, and how.

    Attributes:
        name: in the table.
        dtype: of the frozen weights, and of all where there is no adapter.
        rank: of the policy's LoRA adapter; None trains all weights, beside a frozen copy as reference.
        shared_reward: the reward model is an adapter of this rank too, on the policy's base; else a model of its own.
        four_bits: the base in NF4.
        gradient_checkpointing: recompute activations in the backward pass.
        elastic_reset: keep the average of what is trained, and its initial weights.
    """

    name: str
    dtype: torch.dtype = torch.float32
    rank: int | None = None
    shared_reward: bool = False
    four_bits: bool = False
    gradient_checkpointing: bool = False
    elastic_reset: bool = True


class Memory(NamedTuple):
    """Bytes of each part; `peak` is the most that is held at one time."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    reference: int
    reward: int
    cache: int
    activations: int
    output_layer: int
    peak: int


def estimate(config: PreTrainedConfig, arrangement: Arrangement, batch: Batch, accelerator: bool = False) -> Memory:
    """The parts of a PPO batch's memory and its peak, for a policy (and a reward model) of one shape."""
    model = build(config, arrangement)
    trained = sum(nbytes(p) for p in model.parameters() if p.requires_grad)
    frozen = frozen_bytes(model, arrangement.four_bits)
    floats = sum(FLOAT * p.numel() for p in model.parameters() if p.requires_grad)
    full = arrangement.rank is None
    reference = trained if full else 0
    averages = (floats + (0 if full else trained)) * arrangement.elastic_reset  # the initial weights are the reference
    reward = adapter_bytes(model, config) if arrangement.shared_reward else reward_bytes(config, arrangement.dtype)
    held = frozen + trained + 2 * trained + averages + reference + reward

    activations = saved_bytes(model, batch.micro_rows, batch.prompt + batch.response - 1)
    chunk = CHUNK_BYTES_ACCELERATOR if accelerator else CHUNK_BYTES
    head = head_gradient_bytes(model, config)
    logits = min(chunk, batch.micro_rows * batch.response * config.vocab_size * arrangement.dtype.itemsize)
    output_layer = logits + head
    cache = cache_bytes(config, batch, arrangement.dtype)
    sampling = 3 * FLOAT * batch.rows * config.vocab_size  # logits, their exponentials, and one of them in the making
    accumulated = batch.micro_rows * batch.mini_batches < batch.rows
    working = working_bytes(config, batch.micro_rows * (batch.prompt + batch.response), arrangement.dtype)
    scoring = working_bytes(config, batch.rows * (batch.prompt + batch.response), arrangement.dtype)
    scored = min(chunk, batch.rows * batch.response * config.vocab_size * arrangement.dtype.itemsize)
    moments = {
        "before the backward pass": trained * accumulated + activations + head + max(logits, working),
        "after it": trained + working,
        "sampling": trained + cache + sampling,
        "scoring": trained + max(scored, scoring),
    }
    peak = held + max(moments.values())
    weights = frozen + trained
    return Memory(weights, trained, 2 * trained, averages, reference, reward, cache, activations, output_layer, peak)


def build(config: PreTrainedConfig, arrangement: Arrangement) -> nn.Module:
    """The policy on the meta device, with its adapter, in float32 as peft has it."""
    config = copy.deepcopy(config)  # it would keep the attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=arrangement.dtype, attn_implementation="fused_shapes")
        if arrangement.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if arrangement.rank is None:
            return model.train(arrangement.gradient_checkpointing)
        return add_lora(model, LoRA(arrangement.rank), "CAUSAL_LM").train(arrangement.gradient_checkpointing)


def saved_bytes(model: nn.Module, rows: int, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of the layers, each storage once, without the weights."""
    backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor  # the tensor keeps the key from being used again
        return tensor

    tokens = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    positions = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = backbone(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) + nbytes(hidden)


class FusedAttention(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values, the output, and a sum a row; no matrix of weights."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output  # and no backward: shapes have no gradients


def fused_shapes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
    """Attention as transformers calls it, [B, heads, L, D] -> [B, L, heads, D], of shapes alone."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    return FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_shapes", fused_shapes)


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def frozen_bytes(model: nn.Module, four_bits: bool) -> int:
    """Bytes of the weights that are not trained; in 4 bits those of the linear layers but the last."""
    rounded: set[int] = set()
    if four_bits:
        plain = model.get_base_model()
        layers = [module for module in plain.base_model.modules() if isinstance(module, nn.Linear)]
        rounded = {id(layer.weight) for layer in layers if not layer.weight.requires_grad}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(nf4_bytes(p.numel()) if id(p) in rounded else nbytes(p) for p in frozen)


def nf4_bytes(weights: int) -> int:
    """Half a byte a weight, a byte a block for its scale, and a float32 for each 256 of these (QLoRA)."""
    scales = weights // BLOCK
    return weights // 2 + scales + FLOAT * (scales // OUTER_BLOCK)


def reward_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """A reward model of the policy's shape."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return sum(map(nbytes, model.parameters()))


def adapter_bytes(model: nn.Module, config: PreTrainedConfig) -> int:
    """A reward adapter like the policy's, in float32, and its head."""
    return FLOAT * (sum(p.numel() for p in model.parameters() if p.requires_grad) + config.hidden_size)


def head_gradient_bytes(model: nn.Module, config: PreTrainedConfig) -> int:
    """The gradient of the output layer, made in float32 while the logits are there; none where it is frozen."""
    return FLOAT * config.vocab_size * config.hidden_size * model.get_output_embeddings().weight.requires_grad


def cache_bytes(config: PreTrainedConfig, batch: Batch, dtype: torch.dtype) -> int:
    """Keys and values of every layer for all rows at once."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = batch.rows * (batch.prompt + batch.response - 1)
    return 2 * config.num_hidden_layers * tokens * config.num_key_value_heads * width * dtype.itemsize


def working_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """What one layer's pass holds at a time: the states, and the gated unit's four tensors."""
    return tokens * (3 * config.hidden_size + 4 * config.intermediate_size) * dtype.itemsize
