"""Dataclasses from the plain hyper-parameters of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from elastic_lightning.policies import LoRA, ModelSource

T = TypeVar("T")


def from_plain(kind: type[T], value: T | Mapping[str, Any]) -> T:
    """The dataclass `kind` from the dict of its fields, which ``load_from_checkpoint`` brings back."""
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    if kind is ModelSource and fields.get("lora") is not None:
        fields["lora"] = from_plain(LoRA, fields["lora"])
    return kind(**fields)
