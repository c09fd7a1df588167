"""Warnings of a precision that loses what is learned, or that this machine has no instructions for."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"flags": ("avx512_bf16", "amx_bf16", "avx_ne_convert"), "Features": ("bf16",)}  # of x86 and of ARM


def missing_for_bfloat16() -> str:
    """What this CPU would need to compute in bfloat16 and has not; empty where it has one of it, or is not known."""
    for name, own in cpu_flags().items():
        if not own & {*BFLOAT16_FLAGS[name]}:
            return " or ".join(BFLOAT16_FLAGS[name])
    return ""


def cpu_flags() -> dict[str, set[str]]:
    """The CPU's instruction sets, under the name that Linux has for them on this architecture; empty elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): {*flags.split()} for name, flags in pairs if name.strip() in BFLOAT16_FLAGS}


def warn_of_emulation(module: LightningModule, trainer: Trainer) -> None:
    """Say so where a CPU will compute in bfloat16 without instructions for it."""
    if trainer.strategy.root_device.type != "cpu":
        return
    uses = str(trainer.precision).startswith("bf16") or any(p.dtype == torch.bfloat16 for p in module.parameters())
    if uses and (missing := missing_for_bfloat16()):
        rank_zero_warn(
            f"this CPU has no instructions for bfloat16 ({missing}): it is emulated, twice as slow as float32 with "
            "AVX-512 and up to a hundred times with AVX2 alone; use trainer.precision: 32-true, and float32 for "
            "policy.dtype, execution.rollout_dtype and the reward"
        )


def warn_of_lost_updates(module: LightningModule, trainer: Trainer) -> None:
    """Say so where weights are trained in a type that is too coarse for their updates. When a fit begins: the trainer
    has cast the weights then."""
    low = {p.dtype for p in module.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if not low:
        return
    name, cast = str(low.pop()).removeprefix("torch."), str(trainer.precision)
    by_trainer = cast in ("bf16-true", "16-true")
    rank_zero_warn(
        f"training weights in {name} ({f'trainer.precision: {cast}' if by_trainer else f'policy.dtype: {name}'}): "
        "updates below its resolution are lost (at lr 1e-5 most are); prefer float32 weights with "
        f"trainer.precision: bf16-mixed{'' if by_trainer else ', or LoRA'}"
    )
