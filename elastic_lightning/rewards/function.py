"""A python function as reward."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from elastic_lightning.errors import UserError
from elastic_lightning.rewards.base import OnError, Reward


class FunctionReward(Reward):
    """Score texts with any function ``(prompts: list[str], responses: list[str]) -> B numbers``.

    Args:
        function: the function, or its import path such as ``my_module.my_reward`` (the current folder is searched).
        retries: how often the function is called again where it raises, for one that asks a service.
        on_error: what then: "stop" the run, or call it for one response at a time and "mask" those on which it raises:
            they are left out of the batch.
        special_tokens: give it texts with the special tokens within them (``</think>``); without them by default.
    """

    def __init__(
        self, function: str, retries: int = 1, on_error: OnError = "stop", special_tokens: bool = False
    ) -> None:
        super().__init__()
        if retries < 0:
            raise UserError(f"retries must be 0 or more, got {retries}")
        if on_error not in get_args(OnError):
            raise UserError(f"on_error must be one of {get_args(OnError)}, got {on_error!r}")
        self.retries, self.on_error, self.special_tokens = retries, on_error, special_tokens
        self.function = import_function(function) if isinstance(function, str) else function

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores [B] float32."""
        return torch.as_tensor(self.function(prompts, responses), dtype=torch.float32)


def import_function(path: str) -> Callable:
    """Import ``package.module.function``.

    Raises:
        UserError: there is no such module or function.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"a reward function is given as package.module.function, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # the module is the user's: importing it may raise anything
        raise UserError(f"cannot import the reward function {path!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{path!r} is not a function")
    return function
