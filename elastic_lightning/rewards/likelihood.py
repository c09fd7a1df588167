"""The likelihood of a reference under a translator that reads what the policy wrote."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_lightning.errors import NotFinite
from elastic_lightning.policies import PairedTexts, Responses, Translator


class ReferenceLikelihood:
    """Log-likelihood of references under a receiver that reads the responses: the reward of a translation game.

    Args:
        receiver: the translator; it may be learning.
        normalise: nats per token of the reference, its end among them; else their sum.
    """

    def __init__(self, receiver: Translator, normalise: bool = True) -> None:
        self.receiver, self.normalise = receiver, normalise

    def __call__(self, responses: list[str], references: Responses) -> Tensor:
        """Scores [B] of B responses by their B references.

        Raises:
            NotFinite: a score is NaN or infinite.
        """
        totals = self.receiver.logprobs(PairedTexts(self.receiver.read(responses), references)).sum(dim=1)
        scores = totals / references.mask.sum(dim=1) if self.normalise else totals
        if not torch.isfinite(scores).all():
            row = int((~torch.isfinite(scores)).nonzero()[0])
            line = f"the receiver gives a reference no finite likelihood after {responses[row][:100]!r}"
            raise NotFinite("reward", line)
        return scores
