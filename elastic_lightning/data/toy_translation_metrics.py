"""Drift of the translation game's English in the toy world, measured against the languages themselves."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_lightning.data.toy_languages import Meaning
from elastic_lightning.data.toy_metrics import RatioMetric
from elastic_lightning.data.toy_reading import is_english, parse_english, parse_french, preserved, without_gender
from elastic_lightning.errors import UserError


class ToyEnglishAcceptance(RatioMetric):
    """Share of the responses that are English sentences, in [0, 1], whatever they say.

    `complete[i]` says that response `i` ended by itself: a whole sentence is then wanted, else the beginning of one.
    """

    name = "toy_english"
    higher_is_better = True

    def update(self, prompts: Sequence[str], responses: Sequence[str], complete: Sequence[bool]) -> None:
        for response, whole in zip(responses, complete, strict=True):
            self.numerator += is_english(response, bool(whole))
        self.denominator += len(responses)


class ToyMeaning(RatioMetric):
    """Share of what a French prompt says that the English response says too, in [0, 1]; see `preserved`.

    Words are read wherever they stand, so broken English may keep its meaning; what is added counts as wrong.
    """

    name = "toy_meaning"
    higher_is_better = True

    def update(self, prompts: Sequence[str], responses: Sequence[str], complete: Sequence[bool]) -> None:
        for prompt, response in zip(prompts, responses, strict=True):
            self.numerator += preserved(_meaning(prompt), response)
        self.denominator += len(responses)


class ToyExactMeaning(RatioMetric):
    """Share of the responses that ended, are English and say just what the French prompt does, in [0, 1]."""

    name = "toy_exact"
    higher_is_better = True

    def update(self, prompts: Sequence[str], responses: Sequence[str], complete: Sequence[bool]) -> None:
        for prompt, response, whole in zip(prompts, responses, complete, strict=True):
            right = parse_english(response) == without_gender(_meaning(prompt))
            self.numerator += bool(whole) and right
        self.denominator += len(responses)


def _meaning(prompt: str) -> Meaning:
    meaning = parse_french(prompt)
    if meaning is None:
        raise UserError(f"not a French sentence of the toy world: {prompt!r}; is data's max_prompt_tokens too low?")
    return meaning
