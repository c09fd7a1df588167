"""A model's config.json, looked at before anything is built of it: whoever wrote it decides neither how long that takes
nor whose code runs."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from elastic_lightning.errors import UserError
from elastic_lightning.policies.reading import hub_offline
from elastic_lightning.policies.sources import ModelSource

BUILT = re.compile(r"(layers?|blocks?)$")  # fields that count what is built one by one, as n_layer
LAYERS = 10_000  # where nothing else says how many there can be
MOST = {  # of other fields by the ends of their names: labels and positions are made a table of
    re.compile(r"^num_labels$"): 1_000_000,
    re.compile(r"experts$"): 100_000,  # all of them are rows of few tensors, or of none where a model has other layers
    re.compile(r"(position_embeddings|positions|n_ctx|seq_len)$"): 20_000_000,
}
SPARE = 1_000  # more than the weights have tensors: fields of parts that are not there, layers that share their weights


def check_sizes(path: str) -> None:
    """Raise a `UserError` where a config.json says more layers, experts or labels than its weights can hold: building
    them takes minutes, before anything would notice."""
    tensors = _tensors(Path(path))
    if tensors is None:
        check_counts(_read(path), f"{path}/config.json")
    else:
        check_counts(_read(path), f"{path}/config.json", tensors + SPARE, f"its weights are {tensors} tensors")


def check_counts(config: dict[str, Any], where: str, most: int = LAYERS, reason: str = "") -> None:
    """The same of fields that were read; `most` is how many layers there can be, for this reason."""
    kinds = {BUILT: most} | MOST
    for name, value in _fields(config):
        limit = next((limit for kind, limit in kinds.items() if kind.search(name)), None)
        why = reason if reason and BUILT.search(name) else f"there can be {limit} at most"
        for count in value if isinstance(value, list) else [value]:
            if limit is not None and isinstance(count, int) and count > limit:
                raise UserError(f"{where} says {name}: {count}, but {why}")


def attention_of(source: ModelSource) -> str | None:
    """The attention to ask transformers for. One by the name of a repository is code from the hub: what a config.json
    says of the kind is not followed unless remote code is allowed.

    Raises:
        UserError: `source` itself asks for such code and does not allow it, or the config.json does by a field of
            transformers' own, which wins over what we ask for.
    """
    told = {} if source.path is None else _read(source.path)
    asked = {name: value for name, value in _fields(told) if name.endswith("attn_implementation") and "/" in str(value)}
    code = next(iter(asked.values()), None)
    if source.trust_remote_code:
        return source.attention or (code if isinstance(code, str) else None)
    allow = "is code from the hub: allow it with trust_remote_code"
    if "/" in (source.attention or ""):
        raise UserError(f"attention: {source.attention} {allow}")
    if any(name.startswith("_") for name in asked):
        raise UserError(f"{source.path}/config.json: attention by {code} {allow}")
    if asked and source.attention is None:
        warnings.warn(f"{source.path}/config.json: attention by {code} {allow}; eager is used instead", stacklevel=2)
        return "eager"
    return source.attention


def _read(path: str) -> dict[str, Any]:
    """What the file holds; nothing where it cannot be read, which who loads the model says better."""
    raises = ("gated_repo", "missing_entries", "connection_errors")
    quiet = {f"_raise_exceptions_for_{what}": False for what in raises}
    try:
        file = cached_file(path, "config.json", local_files_only=not Path(path).exists() and hub_offline(), **quiet)
        config = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _fields(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of inner mappings too."""
    for name, value in config.items():
        yield name, value
        if isinstance(value, dict):
            yield from _fields(value)


def _tensors(folder: Path) -> int | None:
    """How many tensors a folder's safetensors hold, by their index or header; None where there are none."""
    try:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return len(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        with safe_open(str(folder / "model.safetensors"), "pt") as weights:
            return len(list(weights.keys()))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
