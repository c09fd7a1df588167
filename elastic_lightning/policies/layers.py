"""The stack of layers inside a transformer: training its upper part, running its lower part once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elastic_lightning.errors import UserError


def layer_stack(backbone: nn.Module) -> nn.ModuleList:
    """The list of the transformer's layers, e.g. ``transformer.h`` of GPT-2 or ``model.layers`` of Llama.

    Raises:
        UserError: no list has as many modules as the config has layers.
    """
    count = backbone.config.num_hidden_layers
    stacks = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not stacks:
        raise UserError(f"{type(backbone).__name__} keeps its {count} layers in no list: they cannot be told apart")
    return stacks[0]


def train_upper_layers(model: nn.Module, backbone: nn.Module, layers: int) -> None:
    """Freeze everything but the upper `layers` of the stack and what runs after it in the backbone (the last norm).

    Embeddings and the output layer, often one tensor, stay as they are: so what enters the first trained layer depends
    on the text alone.

    Raises:
        UserError: the stack is not higher than that, or its layers return more than their hidden states.
    """
    stack = layer_stack(backbone)
    if not 1 <= layers < len(stack):
        raise UserError(
            f"trainable_layers must be between 1 and {len(stack) - 1} for a model of {len(stack)} layers, "
            f"got {layers}; leave it out to train the whole model"
        )
    after = _run_after(backbone, stack)
    model.requires_grad_(False)
    for module in (*stack[-layers:], *after):
        module.requires_grad_(True)


@contextmanager
def replayed(stack: nn.ModuleList, lower: int, hidden: Tensor) -> Iterator[None]:
    """Within this context the `lower` layers do nothing, and what leaves them is `hidden` [B, L, H]."""
    with _replaced(stack[:lower], lambda *args, **kwargs: hidden):
        yield


@contextmanager
def recorded(stack: nn.ModuleList, lower: int) -> Iterator[list[Tensor]]:
    """Within this context only the `lower` layers run; what leaves them is appended to the list that is yielded."""
    outputs: list[Tensor] = []
    handle = stack[lower - 1].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with _replaced(stack[lower:], lambda hidden, *args, **kwargs: hidden):
            yield outputs
    finally:
        handle.remove()


@contextmanager
def checkpointed(stack: nn.ModuleList) -> Iterator[None]:
    """Within this context layers recompute their activations in the backward pass, where the model was told to.

    Transformers does so in training mode alone, which would turn dropout on: so the mode is that of the layers
    themselves, not of what is inside them.
    """
    modes = [layer.training for layer in stack]
    for layer in stack:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(stack, modes, strict=True):
            layer.training = mode


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward  # of this object, in front of its class's
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def _run_after(backbone: nn.Module, stack: nn.ModuleList) -> list[nn.Module]:
    """The modules beside the stack that run after it, seen on two tokens.

    Raises:
        UserError: a layer returns something else than hidden states, which could not be replayed.
    """
    owner = next(module for module in backbone.modules() if any(child is stack for child in module.children()))
    last, ran, outputs = stack[-1], [], []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
        for module in (*owner.children(), last)
    ]
    hooks.append(last.register_forward_hook(lambda module, args, output: outputs.append(output)))
    try:
        backbone(torch.tensor([[0, 1]], device=next(backbone.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(outputs[0], Tensor):
        raise UserError(
            f"trainable_layers does not work with {type(backbone).__name__}, whose layers return more than their "
            "hidden states; leave it out"
        )
    return ran[ran.index(last) + 1 :]
