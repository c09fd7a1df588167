"""The score of a model of preferences as reward."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from elastic_lightning.errors import UserError
from elastic_lightning.rewards.classifier import ClassifierReward
from elastic_lightning.rewards.normalization import read_normalization


class PreferenceReward(ClassifierReward):
    """Score texts with a one-label classifier such as `PreferenceModel` saves: its logit, normalised where it says how.

    Args:
        path: `save_pretrained` folder (or hub id) of the model, merged or a LoRA adapter, with its own tokenizer.
        normalise: by the mean and the deviation saved with the model; one without them gives its logit.
        on, max_length, batch_size, dtype, trust_remote_code, special_tokens: see `ClassifierReward`.

    Raises:
        UserError: the model cannot be loaded, or has several labels.
    """

    def __init__(
        self,
        path: str,
        normalise: bool = True,
        on: Literal["text", "response"] = "text",
        max_length: int | None = None,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
        special_tokens: bool = False,
    ) -> None:
        super().__init__(path, 0, "logit", on, max_length, batch_size, dtype, trust_remote_code, special_tokens)
        if self.model.config.num_labels != 1:
            raise UserError(
                f"{path} has {self.model.config.num_labels} labels, a model of preferences has one score: "
                "use ClassifierReward"
            )
        self.normalization = read_normalization(path) if normalise else None

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores [B] float32."""
        scores = super().forward(prompts, responses)
        return scores if self.normalization is None else self.normalization.apply(scores)
