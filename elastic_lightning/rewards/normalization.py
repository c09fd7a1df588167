"""Scores with mean 0 and deviation 1 over texts that stand for good ones, so that rewards of unlike models compare."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from elastic_lightning.errors import UserError

FILE = "reward_normalization.json"  # beside the weights


@dataclass(frozen=True)
class ScoreNormalization:
    """(score - mean) / deviation.

    Attributes:
        mean: of the model's scores over some texts: reference answers, or samples of the policy it will train.
        deviation: of the same scores (not an estimate for a larger population).
    """

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0):
            raise UserError(
                f"scores with mean {self.mean} and deviation {self.deviation} cannot be normalised: do they all agree?"
            )

    @classmethod
    def of(cls, scores: Tensor) -> ScoreNormalization:
        """That of these scores [N]."""
        scores = scores.double()
        return cls(scores.mean().item(), scores.std(correction=0).item())

    def apply(self, scores: Tensor) -> Tensor:
        """Normalised scores [B]."""
        return (scores - self.mean) / self.deviation

    def write(self, folder: str | Path) -> None:
        """Put it beside the weights of a `save_pretrained` folder."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_normalization(folder: str | Path) -> ScoreNormalization | None:
    """What was saved with a reward model; None where nothing was.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return ScoreNormalization(float(fields["mean"]), float(fields["deviation"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: it needs the numbers mean and deviation") from error
