"""Learning-rate schedules as factors of the peak rate."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(schedule: Schedule, step: int, warmup: int, total: float) -> float:
    """Factor at `step` (from 0) of `total`: linear warm-up over `warmup` steps, then constant, or down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
