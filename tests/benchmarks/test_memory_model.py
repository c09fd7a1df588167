"""Memory computed from shapes, against real tensors and numbers worked out by hand."""

import pytest
import torch
from memory_model import (
    Arrangement,
    Batch,
    adapter_bytes,
    build,
    cache_bytes,
    estimate,
    frozen_bytes,
    nf4_bytes,
    reward_bytes,
    saved_bytes,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from elastic_lightning.policies import LoRA, Prompts, as_policy
from elastic_lightning.policies.adapters import add_lora

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 100}
CONFIG = LlamaConfig(**SIZE, num_attention_heads=4, num_key_value_heads=4)
BATCH = Batch(rows=8, mini_batches=2, micro_rows=4, prompt=6, response=5)
LAYER = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
WEIGHTS = 2 * 100 * 64 + 3 * LAYER + 64
ADAPTER = 3 * 2 * (2 * 64 * 2)  # layers, queries and values, two factors of rank 2


def really_saved(model, rows, length):
    """What autograd keeps of a forward pass that computes, each storage once."""
    backbone = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = backbone(input_ids=torch.ones(rows, length, dtype=torch.long), use_cache=False).last_hidden_state
    kept = {at: tensor for at, tensor in found.items() if at not in own and tensor.device.type == "cpu"}
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + 4 * hidden.numel()


@pytest.mark.parametrize("rank", [None, 2])
def test_activations_are_those_that_autograd_keeps(rank):
    real = AutoModelForCausalLM.from_config(CONFIG).eval()
    if rank is not None:
        real = add_lora(real, LoRA(rank), "CAUSAL_LM").eval()
    computed = saved_bytes(build(CONFIG, Arrangement("", rank=rank)), rows=8, length=32)
    assert computed == pytest.approx(really_saved(real, rows=8, length=32), rel=0.04)
    assert computed > 8 * 32 * 3 * 4 * 64 * 4  # more than queries, keys, values and the attention's output


def test_activations_grow_with_the_tokens_and_not_with_their_square():
    model = build(CONFIG, Arrangement(""))
    assert saved_bytes(model, 8, 64) == pytest.approx(2 * saved_bytes(model, 8, 32), rel=0.01)
    checkpointed = build(CONFIG, Arrangement("", gradient_checkpointing=True))
    assert saved_bytes(checkpointed, 8, 64) < 0.3 * saved_bytes(model, 8, 64)


def test_the_parts_by_hand():
    full = estimate(CONFIG, Arrangement(""), BATCH)
    assert full.weights == full.gradients == full.reference == full.averages == 4 * WEIGHTS
    assert full.optimizer == 8 * WEIGHTS and full.reward == reward_bytes(CONFIG, torch.float32)
    assert reward_bytes(CONFIG, torch.float32) == 4 * (WEIGHTS - 100 * 64 + 2 * 64)  # two labels in place of words
    lora = estimate(CONFIG, Arrangement("", torch.bfloat16, rank=2), BATCH)
    assert (lora.weights, lora.gradients) == (2 * WEIGHTS + 4 * ADAPTER, 4 * ADAPTER)
    assert lora.averages == 2 * 4 * ADAPTER and lora.reference == 0 and lora.optimizer == 8 * ADAPTER
    shared = estimate(CONFIG, Arrangement("", torch.bfloat16, rank=2, shared_reward=True), BATCH)
    assert shared.reward == 4 * (ADAPTER + 64)
    assert lora.peak - shared.peak == lora.reward - shared.reward
    still = estimate(CONFIG, Arrangement("", elastic_reset=False), BATCH)
    assert still.averages == 0 and full.peak - still.peak == full.averages


def test_the_peak_of_all_weights_by_hand():
    """Either the activations are there or the gradients: both together where micro-batches add up."""
    memory = estimate(CONFIG, Arrangement(""), BATCH)
    held = memory.weights + memory.optimizer + memory.averages + memory.reference + memory.reward
    logits = 4 * 4 * 5 * 100
    assert memory.output_layer == logits + 4 * 100 * 64
    working = 4 * 11 * (3 * 64 + 4 * 96) * 4
    before = memory.activations + 4 * 100 * 64 + max(logits, working)
    scoring = memory.gradients + 8 * 11 * (3 * 64 + 4 * 96) * 4
    sampling = memory.gradients + memory.cache + 3 * 4 * 8 * 100
    assert memory.peak == held + max(before, scoring, sampling)
    added = estimate(CONFIG, Arrangement(""), Batch(8, 1, 4, 6, 5))
    assert added.peak == held + memory.gradients + before


def test_four_bits():
    assert nf4_bytes(64 * 256) == 8192 + 256 + 4
    model = build(CONFIG, Arrangement("", torch.bfloat16, rank=2))
    linear = 4 * 64 * 64 + 3 * 64 * 96
    expected = 2 * (2 * 100 * 64 + 3 * 2 * 64 + 64) + 3 * (4 * nf4_bytes(64 * 64) + 3 * nf4_bytes(64 * 96))
    assert frozen_bytes(model, four_bits=True) == expected < 0.6 * frozen_bytes(model, four_bits=False)
    assert frozen_bytes(model, four_bits=False) == 2 * (2 * 100 * 64 + 3 * (linear + 2 * 64) + 64)
    assert adapter_bytes(model, CONFIG) == 4 * (ADAPTER + 64)


def test_the_cache_is_the_one_that_decoding_fills():
    lm = as_policy(AutoModelForCausalLM.from_config(CONFIG).eval())
    tokens = torch.ones(8, 6, dtype=torch.long)
    state, _ = lm.start(Prompts(tokens, tokens.bool()), new_tokens=4)
    held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in state.cache.layers)
    assert cache_bytes(CONFIG, BATCH, torch.float32) == held
