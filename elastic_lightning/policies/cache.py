"""The cache of keys and values that a decode fills."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values [B, H, capacity, D] allocated once; a step writes its slice and reads a growing view.

    The stock dynamic layer concatenates, which copies the whole cache at each token.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def allocate(states: Tensor) -> Tensor:  # zeros: what a mask hides must still be a number
            return states.new_zeros(*states.shape[:2], self.capacity, states.shape[3])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.capacity:  # a slice past the end would swallow one token without a word
            raise IndexError(f"the cache holds {self.capacity} tokens: no room for {self.length}")
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity
