"""A sequence classifier that is an adapter and a head on a policy's base model: no second trunk in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from elastic_lightning.errors import UserError
from elastic_lightning.policies.adapters import adapter_base
from elastic_lightning.policies.causal import CausalLM
from elastic_lightning.policies.classifier import adapter_labels, is_adapter
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.saving import ADAPTER_WEIGHTS
from elastic_lightning.policies.sources import ModelSource
from elastic_lightning.policies.sums import check_sums

PREFIX, HEAD = "base_model.model.", "score.weight"
PLAIN = {"peft_type": "LORA", "use_dora": False, "alpha_pattern": {}, "bias": "none", "lora_bias": False}


class SharedClassifier(nn.Module):
    """The classifier of a LoRA adapter folder; its trunk is that of the policy it is bound to, adapter off.

    It holds the adapter's factors and its head alone, frozen, and adds what they say to the outputs of the policy's
    layers while it scores: the policy's modules, parameters and adapters stay as they are.

    Raises:
        UserError: the folder holds no LoRA adapter of a decoder's classifier, or one with more than plain factors.
    """

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.path = source.path
        settings, weights = _read(self.path)
        self.base = adapter_base(self.path)
        trusted = source.trust_remote_code
        self.config = _config(self.base, trusted, **adapter_labels(self.path, trusted))
        self.config.pad_token_id = self.config.vocab_size  # of no text; what is padding is said by the mask
        self.head = nn.Parameter(weights.pop(HEAD), requires_grad=False)  # [labels, H]
        names = sorted({name.rpartition(".lora_")[0] for name in weights})
        self.names = dict(zip((name.replace(".", "/") for name in names), names, strict=True))  # modules by key
        self.factors = nn.ModuleDict({key: Factors(weights, name, settings) for key, name in self.names.items()})
        self._lm: tuple[CausalLM, ...] = ()  # in a tuple it is no part of this module

    def bind(self, lm: PolicyLM) -> None:
        """Score with the base model of this policy from here on.

        Raises:
            UserError: the policy trains its base model, or the adapter was trained on another one.
        """
        if not isinstance(lm, CausalLM) or not lm.has_adapter:
            raise UserError(
                f"the reward in {self.path} shares the policy's base model, which must stay as it is: "
                "give the policy a LoRA adapter (policy.lora), or use PreferenceReward with a model of its own"
            )
        if not _same(lm.base_path, self.base):
            raise UserError(
                f"the reward in {self.path} was trained on {self.base}, the policy's base model is {lm.base_path}: "
                "train both adapters on one base model, or use PreferenceReward with a model of its own"
            )
        for key, factors in self.factors.items():
            factors.check(lm.base_module(self.names[key]), self.names[key], self.path)
        self._lm = (lm,)

    @property
    def device(self) -> torch.device:
        return self.head.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits [B, labels] of the last token of each text [B, L], padded at the end."""
        if not self._lm:
            raise UserError(f"the reward in {self.path} has no base model: it works with a policy (PPO) alone")
        (lm,) = self._lm
        known = input_ids.where(input_ids < self.config.vocab_size, 0)
        with lm.adapter_off(), self._added(lm):
            hidden = CausalLM.forward_hidden(lm.backbone, known, attention_mask.bool())
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(dim=1) - 1]
        return SequenceClassifierOutput(logits=last.to(self.head.dtype) @ self.head.T)

    @contextmanager
    def _added(self, lm: CausalLM) -> Iterator[None]:
        """Within this context the policy's layers give what they would with this adapter."""
        with ExitStack() as stack:
            for key, factors in self.factors.items():
                handle = lm.base_module(self.names[key]).register_forward_hook(factors.add)
                stack.callback(handle.remove)
            yield


class Factors(nn.Module):
    """The two factors of one layer's adapter, [r, in] and [out, r], frozen."""

    def __init__(self, weights: dict[str, Tensor], name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.down = nn.Parameter(weights[f"{name}.lora_A.weight"], requires_grad=False)
        self.up = nn.Parameter(weights[f"{name}.lora_B.weight"], requires_grad=False)
        rank = len(self.down)
        self.scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)

    def add(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook: the layer's output with the adapter's."""
        change = args[0].to(self.down.dtype) @ self.down.T @ self.up.T
        return (output + self.scale * change).to(output.dtype)

    def check(self, module: nn.Module, name: str, path: str) -> None:
        """Raise a `UserError` where the factors do not fit the layer they are for."""
        inner = module.base_layer if hasattr(module, "base_layer") else module
        sizes = {self.down.shape[1], self.up.shape[0]}
        known = {size for field in ("in_features", "out_features", "nx", "nf") if (size := getattr(inner, field, 0))}
        if known != sizes:
            raise UserError(f"the adapter in {path} does not fit the policy's layer {name}: is its base another model?")


def _read(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter's settings, and its weights by the names of the base model's modules."""
    if not is_adapter(path):
        raise UserError(f"{path} holds no adapter (adapter_config.json): a whole model is a PreferenceReward")
    check_sums(path)
    try:
        settings = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(Path(path) / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the adapter from {path}: {error}") from error
    weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    if HEAD not in weights:
        raise UserError(f"the adapter in {path} has no head ({HEAD}): is it a policy's?")
    wrong = [name for name, usual in PLAIN.items() if (settings.get(name) or usual) != usual]
    wrong += [name for name in weights if name != HEAD and not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if wrong:
        raise UserError(
            f"the adapter in {path} is more than plain LoRA ({wrong[0]}): merge it and use PreferenceReward"
        )
    return settings, weights


def _config(base: str, trust_remote_code: bool, **labels: Any):
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **labels)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of the base model {base}: {str(error).splitlines()[0]}") from error


def _same(one: str, other: str) -> bool:
    """Whether two hub ids or folders are the same."""
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))
