"""A policy measured on one batch: sampled from, scored, and compared with where it began."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.policies import PairedTexts, Prompts, Responses, Texts
from elastic_lightning.ranks import alike, rows_of_ranks
from elastic_lightning.rewards import Scores

if TYPE_CHECKING:
    from elastic_lightning.algorithms.base import PolicyModule

VALIDATION_LOGITS = 2**24  # of policy and initial policy each that stand in memory at a time
VALIDATION_STEP = -1  # uniforms of validation are those of this step: every validation draws with the same luck


def measure(module: PolicyModule, batch: Any) -> list[dict[str, Any]] | None:
    """Add one validation batch to the module's metrics; returns what was sampled, where it holds prompts."""
    lm = module.actor.lm
    if isinstance(batch, Tensor):
        module.policy_metrics.update_human(-lm.next_token_statistics(batch).logprobs)
        return None
    if isinstance(batch, PairedTexts):
        module.policy_metrics.update_human(-lm.pair_statistics(batch).logprobs, batch.target.mask)
        return None
    responses, texts, scores = draw_and_score(module, batch)
    scored = scores.total if scores.valid is None else scores.total[scores.valid]
    module.policy_metrics.update_samples(responses, texts.complete, scored)
    measure_drift(module, module.prompts(batch), responses)
    return as_dicts(texts, scores, module.measure_texts(batch, texts))


def draw_and_score(module: PolicyModule, batch: Any) -> tuple[Responses, Texts, Scores]:
    """One response to each prompt of a batch, with the draws of every validation, and its score."""
    prompts = module.prompts(batch)
    module.check_context(prompts.tokens.shape[1])
    responses = module.sample(prompts, VALIDATION_STEP, first_row(module, prompts)).responses
    return responses, *alike(lambda: score_if_finite(module, batch, responses))


def score_if_finite(module: PolicyModule, batch: Any, responses: Responses) -> tuple[Texts, Scores]:
    """The scores; between training batches a batch whose reward is not finite is left out of what is measured."""
    try:
        texts, scores = module.score_batch(batch, responses)
        if scores.valid is not None and not scores.valid.any():
            raise NotFinite("reward", f"the reward raised on all {len(responses.tokens)} responses")
        return texts, scores
    except NotFinite as fault:
        if module.trainer.state.fn != "fit" or module.trainer.sanity_checking:
            raise  # before there is anything to lose
        warnings.warn(f"validation: {len(responses.tokens)} responses have no reward: {fault}", stacklevel=2)
        texts = module.actor.lm.decode(module.tokenizer, module.prompts(batch), responses)
        none = torch.zeros(len(responses.tokens), device=module.device)
        return texts, Scores(none, {}, none.bool())


def measure_drift(module: PolicyModule, prompts: Prompts, sampled: Responses) -> None:
    """KL, entropy and fluency of sampled responses, in parts whose logits fit into memory."""
    whole = sampled.mask.shape[1] * module.actor.lm.vocabulary  # logits a row
    size = max(1, VALIDATION_LOGITS // whole)
    for start in range(0, len(sampled.tokens), size):
        rows = slice(start, start + size)
        asked, said = Prompts(*(part[rows] for part in prompts)), Responses(*(part[rows] for part in sampled))
        logits, initial = module.actor.lm.response_logits(asked, said), module.initial.response_logits(asked, said)
        module.policy_metrics.update_logits(said, logits, initial, module.sampling.temperature)


def first_row(module: PolicyModule, prompts: Prompts) -> int:
    """Global row of a batch's first prompt. Counted, for the last batch may be smaller than those before."""
    rows = rows_of_ranks(len(prompts.tokens))
    if module.shards and len(set(rows)) > 1:  # every rank must run every layer equally often
        raise UserError(
            f"a batch of {sum(rows)} prompts over {len(rows)} processes: where weights are sharded the number of "
            "prompts (data's eval_prompts) must be a multiple of the processes"
        )
    first = module.rows_drawn + sum(rows[: module.global_rank])
    module.rows_drawn += sum(rows)
    return first


def as_dicts(texts: Texts, scores: Scores, columns: dict[str, list[str]] | None = None) -> list[dict[str, Any]]:
    """One dict of plain values a response; `columns` are further ones. A response that is masked has no reward."""
    valid = [True] * len(scores.total) if scores.valid is None else scores.valid.tolist()
    values = [value if kept else None for value, kept in zip(scores.total.tolist(), valid, strict=True)]
    return [
        {
            "prompt": texts.prompts[row],
            "response": texts.responses[row],
            "complete": texts.complete[row],
            "reward": values[row],
            **{f"reward_{name}": part[row].item() for name, part in scores.components.items()},
            **{name: column[row] for name, column in (columns or {}).items()},
        }
        for row in range(len(texts.prompts))
    ]
