"""Decoding over a cache of fixed size: every step has the same shapes, and what changes lies in tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from elastic_lightning.policies.batches import Prompts
from elastic_lightning.policies.cache import PreallocatedLayer
from elastic_lightning.policies.causal import CausalLM
from elastic_lightning.policies.portions import out_of_memory

BUCKET = 64  # the cache's capacity is a multiple of this: prompts of like length share a graph
LEAST_TOLERANCE = 1e-2  # of two ways to compute one hidden state, relative to it; more in less than float32


class StaticLayer(PreallocatedLayer):
    """Keys and values [B, H, capacity, D] that stay where they are; `column` [1] says where the next token goes."""

    def __init__(self, capacity: int, column: Tensor) -> None:
        super().__init__(capacity)
        self.column = column
        self.reads_prompts = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store a prompt in the first columns, or one token in the column whose turn it is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.reads_prompts:
            self.keys[:, :, : key_states.shape[2]] = key_states
            self.values[:, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0  # asked where a prompt is read; later steps bring positions and mask of their own


def static_cache(lm: CausalLM, capacity: int, column: Tensor) -> Cache:
    """A cache of `StaticLayer`s for a model."""
    return Cache(layers=[StaticLayer(capacity, column) for _ in range(lm.layers)])


def read_prompts(lm: CausalLM, prompts: Prompts, cache: Cache) -> Tensor:
    """The prompts into such a cache; hidden states [B, H] that predict the first new token."""
    for layer in cache.layers:
        layer.reads_prompts = True
    hidden = lm.read_prompts(prompts, cache)
    for layer in cache.layers:
        layer.reads_prompts = False
    return hidden


@torch.inference_mode(False)
@torch.no_grad()
def static_steps_agree(lm: CausalLM) -> bool:
    """Whether a step over a cache of fixed size gives the hidden states of an ordinary one: seen on two rows, of which
    one is padded. An architecture that makes more of its mask than a mask (ALiBi counts positions by it) does not."""
    device = next(lm.parameters()).device
    rows = torch.tensor([[0, 1, 0], [1, 0, 1]], device=device)
    prompts = Prompts(rows, torch.tensor([[False, True, True], [True, True, True]], device=device))
    with torch.autocast(device.type, enabled=False):
        state, _ = lm.start(prompts, 2)
        expected = [lm.step(state, rows[:, column]) for column in (0, 1)]
        try:
            found = _static_steps(lm, prompts, rows[:, :2])
        except Exception as error:  # whatever an architecture says to a mask of four dimensions
            if out_of_memory(error):
                raise
            return False
    tolerance = max(LEAST_TOLERANCE, torch.finfo(expected[0].dtype).eps ** 0.5)
    return all(
        ((one.float() - two.float()).norm(dim=-1) <= tolerance * two.float().norm(dim=-1)).all()
        for one, two in zip(found, expected, strict=True)
    )


def _static_steps(lm: CausalLM, prompts: Prompts, tokens: Tensor) -> list[Tensor]:
    """Hidden states [B, H] after each column of tokens [B, n] behind the prompts, by steps of fixed shapes."""
    length, device = prompts.tokens.shape[1], tokens.device
    column = torch.tensor([length], device=device)
    cache = static_cache(lm, BUCKET, column)
    read_prompts(lm, prompts, cache)
    mask = torch.zeros(len(tokens), 1, 1, BUCKET, dtype=torch.bool, device=device)
    mask[:, 0, 0, :length] = prompts.mask
    position_ids, found = prompts.mask.sum(dim=1, keepdim=True), []
    for row in tokens.T:
        mask.index_fill_(3, column, True)
        found.append(lm.read_token(row, mask, position_ids, cache))
        column += 1
        position_ids = position_ids + 1
    return found
