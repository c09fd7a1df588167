"""Sampling from a policy: one pass that keeps log-probabilities and values while it decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_lightning.errors import UserError
from elastic_lightning.functional import token_logprobs
from elastic_lightning.policies.actor_critic import ActorCritic, scale
from elastic_lightning.policies.causal import Prompts, Responses


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Log-probabilities are always those of the temperature-scaled, *untruncated* distribution: `top_k`, `top_p` and
    `min_new_tokens` restrict what is drawn, not what it is said to have cost.

    Attributes:
        max_new_tokens: longest response T.
        min_new_tokens: the end-of-text token is not drawn before this many tokens.
        temperature: logits are divided by it, in rollout, reference and update alike.
        top_k: keep the k most likely tokens; 0 keeps all; 1 is greedy decoding.
        top_p: keep the smallest set of tokens whose probabilities reach p.
    """

    max_new_tokens: int = 48
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"sampling.max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"sampling.min_new_tokens must be in [0, max_new_tokens], got {self.min_new_tokens}")
        if not self.temperature > 0:
            raise UserError(f"sampling.temperature must be above 0, got {self.temperature} (for greedy set top_k: 1)")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"sampling needs top_k >= 0 and 0 < top_p <= 1, got {self.top_k} and {self.top_p}")


class Rollout(NamedTuple):
    """Sampled responses, each [B, T], padded at the end: tokens, mask (True up to and with eos), logprobs, values."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor

    @property
    def responses(self) -> Responses:
        return Responses(self.tokens, self.mask)


@torch.no_grad()
def sample(
    policy: ActorCritic,
    prompts: Prompts,
    sampling: Sampling,
    uniforms: Tensor,
    eos_token_id: int | None,
    pad_token_id: int,
) -> Rollout:
    """Draw one response a prompt. `uniforms` [B, max_new_tokens] in [0, 1) decide every draw: no hidden generator.

    T is the length of the longest response: decoding stops when every row has ended.
    """
    state, hidden = policy.lm.start(prompts, sampling.max_new_tokens - 1)
    alive = torch.ones(len(prompts.tokens), dtype=torch.bool, device=prompts.tokens.device)
    columns: list[tuple[Tensor, ...]] = []
    for position in range(sampling.max_new_tokens):
        logits = scale(policy.lm.logits(hidden), sampling.temperature)
        drawn = draw(truncate(logits, sampling, position, eos_token_id), uniforms[:, position])
        logprobs = token_logprobs(logits, drawn)
        tokens = torch.where(alive, drawn, pad_token_id)
        columns.append((tokens, alive, logprobs.masked_fill(~alive, 0), policy.value(hidden).masked_fill(~alive, 0)))
        if eos_token_id is not None:
            alive = alive & (drawn != eos_token_id)
            if not alive.any():
                break
        if position + 1 < sampling.max_new_tokens:
            hidden = policy.lm.step(state, torch.where(alive, drawn, 0))
    rollout = Rollout(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))
    if policy.value_trunk is not None:  # one parallel pass is cheaper than decoding a second trunk
        rollout = rollout._replace(values=policy.values(prompts, rollout.responses).masked_fill(~rollout.mask, 0))
    return rollout


def truncate(logits: Tensor, sampling: Sampling, position: int, eos_token_id: int | None) -> Tensor:
    """Logits [B, V] with the tokens that may not be drawn at this position at -inf."""
    if eos_token_id is not None and position < sampling.min_new_tokens:
        logits = logits.clone()
        logits[:, eos_token_id] = -torch.inf
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= sampling.top_p  # mass before this token suffices
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Exact inverse-CDF draws [B] from softmax(logits [B, V]) with one uniform a row [B] in [0, 1).

    About ten times as fast as `torch.multinomial` on a CPU, and a function of its arguments alone.
    """
    cumulative = (logits - logits.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below `total` even when rounding lifts u * total onto it, so a token without probability is never drawn.
    target = torch.minimum(uniforms[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def counter_uniforms(seed: int, step: int, rows: Tensor, length: int) -> Tensor:
    """Uniforms [B, length] in [0, 1) that are a pure function of (seed, step, row, position).

    The same row of the global batch draws the same numbers on any rank, at any batch size and after a resume. Built
    from splitmix64's finaliser (Steele, Lea, Flood 2014), applied once for each coordinate; 24 random bits each.
    """
    positions = torch.arange(length, dtype=torch.int64, device=rows.device)
    state = _mix(torch.tensor(seed, dtype=torch.int64, device=rows.device))
    state = _mix(state ^ step)
    state = _mix(state ^ rows.to(torch.int64))
    state = _mix(state[:, None] ^ positions)
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _mix(state: Tensor) -> Tensor:
    """splitmix64's step and finaliser on int64, whose products wrap around as uint64's do."""
    state = state + -7046029254386353131  # 0x9E3779B97F4A7C15
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) shift; the operator's own shift copies the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
