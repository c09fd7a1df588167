"""How a run is computed: precision of the rollout, compilation, what is kept and what is computed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource

Dtype = Literal["float32", "bfloat16", "float16"]
Recompute = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Execution:
    """Options that make a run faster or smaller.

    Attributes:
        rollout_dtype: decode with a copy of the weights in this type, refreshed once a PPO batch; the policy's own
            weights by default. ``train/first_ratio_deviation`` shows what it costs.
        recompute_logprobs: take the rollout's log-probabilities and values from a forward pass of the update: when the
            rollout ran in a lower precision than the update (auto), always or never. What the policy is clipped against
            is then exact; ``train/rollout_ratio_deviation`` shows how far the rollout was from it.
        compile: compile the update's forward pass with `torch.compile`, once for all lengths (a batch of a
            single row is compiled apart).
        gradient_checkpointing: recompute activations in the backward pass: one more forward pass of the layers.
        trainable_layers: train this many upper layers and the last norm alone. The frozen layers are run once a PPO
            batch for policy, reference and all epochs, and the reference shares them. The whole model by default, and
            always that of an encoder-decoder.
        cuda_graphs: on CUDA, decode with one captured graph a step in place of a few hundred kernel launches; not used
            where the architecture cannot (encoder-decoders, ALiBi, windows of attention shorter than the text, experts
            whose numbers the CPU asks for).
        scoring_batch_size: rows a forward when log-probabilities are only read (reference, recomputing); the whole
            PPO batch by default.
    """

    rollout_dtype: Dtype | None = None
    recompute_logprobs: Recompute = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    trainable_layers: int | None = None
    cuda_graphs: bool = True
    scoring_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.rollout_dtype is not None and self.rollout_dtype not in get_args(Dtype):
            raise UserError(f"execution.rollout_dtype must be one of {get_args(Dtype)}, got {self.rollout_dtype!r}")
        if self.recompute_logprobs not in get_args(Recompute):
            raise UserError(
                f"execution.recompute_logprobs must be one of {get_args(Recompute)}, got {self.recompute_logprobs!r}"
            )
        for name in ("trainable_layers", "scoring_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"execution.{name} must be 1 or more (or null), got {value}")
        if self.compile and self.gradient_checkpointing:
            raise UserError("execution: compile and gradient_checkpointing exclude each other; choose speed or memory")
        if self.compile and self.trainable_layers is not None:
            raise UserError("execution: compile and trainable_layers exclude each other; the trunk is not run")

    def check(self, policy: ModelSource, unmerged_adapter: bool) -> None:
        """Raise a `UserError` for options that this policy, or one loaded from an unmerged adapter, cannot have."""
        if self.rollout_dtype is not None and policy.quantization is not None:
            raise UserError(
                "execution.rollout_dtype and policy.quantization exclude each other: decode with the quantised base"
            )
        if self.trainable_layers is not None and policy.lora is not None:
            raise UserError("execution.trainable_layers and policy.lora exclude each other: LoRA freezes the model")
        if self.trainable_layers is not None and unmerged_adapter:
            raise UserError(
                "execution.trainable_layers and a policy with an unmerged adapter exclude each other: merge it first"
            )

    def recomputes(self, policy_dtype: torch.dtype) -> bool:
        """Whether the rollout's log-probabilities come from a forward pass of the update."""
        if self.recompute_logprobs != "auto":
            return self.recompute_logprobs == "always"
        if self.rollout_dtype is None:
            return False
        # Autocast keeps weights, norms and the residual stream in the policy's type: a copy in a lower one is below it.
        return torch.finfo(getattr(torch, self.rollout_dtype)).eps > torch.finfo(policy_dtype).eps
