"""Sampling from a policy: one pass that keeps log-probabilities and values while it decodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elastic_lightning.checks import check_counts
from elastic_lightning.errors import UserError
from elastic_lightning.policies.actor_critic import ActorCritic, scale
from elastic_lightning.policies.batches import Prompts, Responses
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.special_tokens import Ends, end_ids
from elastic_lightning.policies.withholding import withhold_end, withhold_textless

LENGTH_SEED = 0x1E46  # keeps the draws that cut responses apart from those that sample them
BLOCK = 256  # tokens whose weights are summed first in a search


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Log-probabilities are always those of the temperature-scaled, *untruncated* distribution: `top_k`, `top_p` and
    `min_new_tokens` restrict what is drawn, not what it is said to have cost. So does what has no text: ids for which
    the tokenizer has no token are never drawn.

    Attributes:
        max_new_tokens: longest response T.
        min_new_tokens: the end-of-text token is not drawn before this many tokens.
        temperature: logits are divided by it, in rollout, reference and update alike.
        top_k: keep the k most likely tokens; 0 keeps all; 1 is greedy decoding.
        top_p: keep the smallest set of tokens whose probabilities reach p.
        random_length: cut each response after a number of tokens drawn uniformly from this range, both ends included;
            the longest is `max_new_tokens`.
        eos: whether the end-of-text token ends a response; otherwise it is never drawn.
    """

    max_new_tokens: int = 48
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    random_length: tuple[int, int] | None = None
    eos: bool = True

    def __post_init__(self) -> None:
        check_counts("sampling.", vars(self), "max_new_tokens")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"sampling.min_new_tokens must be in [0, max_new_tokens], got {self.min_new_tokens}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"sampling.temperature must be above 0, got {self.temperature} (for greedy set top_k: 1)")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"sampling needs top_k >= 0 and 0 < top_p <= 1, got {self.top_k} and {self.top_p}")
        check_counts("sampling.", vars(self), "top_k", least=0)
        if self.random_length is not None:
            self._check_lengths(*self.random_length)

    @property
    def first_end(self) -> int:
        """Tokens before which the end-of-text token is not drawn."""
        return self.min_new_tokens if self.eos else self.max_new_tokens

    def _check_lengths(self, shortest: int, longest: int) -> None:
        if not max(1, self.min_new_tokens) <= shortest <= longest or longest != self.max_new_tokens:
            raise UserError(
                f"sampling.random_length must go from 1 or more (and min_new_tokens, {self.min_new_tokens}) to "
                f"max_new_tokens, {self.max_new_tokens}, got [{shortest}, {longest}]"
            )


class Rollout(NamedTuple):
    """Sampled responses, each [B, T], padded at the end: tokens, mask (True up to and with eos), logprobs, and the
    critic's values, where there is one."""

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor | None

    @property
    def responses(self) -> Responses:
        return Responses(self.tokens, self.mask)


class Choice(NamedTuple):
    """One drawn token a row, its log-probability and the value before it (None without a critic), each [B]."""

    tokens: Tensor
    logprobs: Tensor
    values: Tensor | None


@torch.no_grad()
def sample(
    policy: ActorCritic,
    prompts: Prompts,
    sampling: Sampling,
    uniforms: Tensor,
    eos_token_id: Ends,
    pad_token_id: int,
    lm: PolicyLM | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    lengths: Tensor | None = None,
    going_on: Callable[[Tensor], bool] = torch.any,
    textless: Tensor | None = None,
) -> Rollout:
    """Draw one response a prompt. `uniforms` [B, max_new_tokens] in [0, 1) decide every draw: no hidden generator.

    T is the length of the longest response: decoding stops when every row has ended. `eos_token_id` is the token that
    ends a response, or several; `textless` are ids never drawn (`PolicyLM.drawn_tokens` gives both). `lm` is what
    decodes, the policy's own model by default. `stop` says of tokens [B, t] so far which rows [B] end here, beside
    those with an end of text and those with as many tokens as `lengths` [B] says (`draw_lengths`; `max_new_tokens` by
    default); `going_on` says of the rows [B] that have not ended whether to decode on, which processes may decide
    together.
    """
    lm = policy.lm if lm is None else lm
    together = going_on is not torch.any  # each step is then decided by all processes, whose lengths differ
    longest = sampling.max_new_tokens if lengths is None or together else int(lengths.max())
    ends, textless = end_ids(eos_token_id), None if textless is None else textless.to(prompts.tokens.device)
    state, hidden = lm.start(prompts, sampling.max_new_tokens - 1)
    alive = torch.ones(len(prompts.tokens), dtype=torch.bool, device=prompts.tokens.device)
    columns: list[tuple[Tensor, ...]] = []
    for position in range(longest):
        choice = choose(policy, lm, hidden, sampling, uniforms[:, position], position, ends, textless)
        columns.append((torch.where(alive, choice.tokens, pad_token_id), alive, choice.logprobs, choice.values))
        for end in ends:
            alive = alive & (choice.tokens != end)
        if lengths is not None:
            alive = alive & (position + 1 < lengths)
        if stop is not None:
            alive = alive & ~stop(torch.stack([column[0] for column in columns], dim=1))
        by_itself = bool(ends) and position + 1 >= sampling.first_end
        cut = together and lengths is not None
        if (by_itself or cut or stop is not None) and not going_on(alive):
            break
        if position + 1 < longest:
            hidden = lm.step(state, torch.where(alive, choice.tokens, 0))
    drawn = zip(*columns, strict=True)
    return finish(policy, prompts, *(None if column[0] is None else torch.stack(column, dim=1) for column in drawn))


@torch.no_grad()
def greedy(
    lm: PolicyLM,
    prompts: Prompts,
    max_new_tokens: int,
    eos_token_id: Ends,
    pad_token_id: int,
    textless: Tensor | None = None,
) -> Responses:
    """The most likely token that has a text at each step, up to an end: one response a prompt, without a policy."""
    ends, textless = end_ids(eos_token_id), None if textless is None else textless.to(prompts.tokens.device)
    state, hidden = lm.start(prompts, max_new_tokens - 1)
    alive = torch.ones(len(prompts.tokens), dtype=torch.bool, device=prompts.tokens.device)
    columns: list[tuple[Tensor, Tensor]] = []
    for position in range(max_new_tokens):
        logits = lm.logits(hidden)
        withhold_textless(logits, textless)
        tokens = logits.argmax(dim=-1)
        columns.append((torch.where(alive, tokens, pad_token_id), alive))
        for end in ends:
            alive = alive & (tokens != end)
        if ends and not alive.any():
            break
        if position + 1 < max_new_tokens:
            hidden = lm.step(state, torch.where(alive, tokens, 0))
    return Responses(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


def choose(
    policy: ActorCritic,
    lm: PolicyLM,
    hidden: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    position: int | Tensor,
    eos_token_id: Ends,
    textless: Tensor | None = None,
) -> Choice:
    """Draw the next token of each row from the hidden states [B, H] that predict it."""
    logits = scale(lm.logits(hidden), sampling.temperature)  # from here on changed in place: each copy takes time
    withheld = withhold_end(logits, sampling, position, eos_token_id), withhold_textless(logits, textless)
    highest = logits.amax(dim=-1, keepdim=True)
    weights = logits.sub_(highest).exp()
    log_total = weights.sum(dim=-1).log()
    for part in withheld:
        if part is not None:
            log_total = torch.logaddexp(log_total, part - highest.squeeze(-1))
    allowed = truncate(logits, sampling)
    tokens = search(weights, uniforms) if allowed is logits else draw(allowed, uniforms)
    logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - log_total
    return Choice(tokens, logprobs, policy.value(hidden))


def finish(
    policy: ActorCritic, prompts: Prompts, tokens: Tensor, mask: Tensor, logprobs: Tensor, values: Tensor | None
) -> Rollout:
    """The rollout of what was drawn, each [B, T]: 0 after the end, and the values of a trunk of their own."""
    if policy.value_trunk is not None:  # one parallel pass is cheaper than decoding a second trunk
        values = policy.values(prompts, Responses(tokens, mask))
    values = None if values is None else values.masked_fill(~mask, 0)
    return Rollout(tokens, mask, logprobs.masked_fill(~mask, 0), values)


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] with the tokens that `top_k` and `top_p` leave out at -inf; the same tensor where they do not."""
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

    Many times as fast as `torch.multinomial` on a CPU, and a function of its arguments alone.
    """
    return search((logits - logits.amax(dim=-1, keepdim=True)).exp(), uniforms)


def search(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token [B] of each row at which the running sum of weights [B, V] exceeds uniform * total.

    In two stages, the block and then the token in it: a running sum over a whole vocabulary cannot be computed
    in parallel, and its rounding grows with V. A row of NaN gives the last token: its log-probability is NaN too.
    """
    sums = _block_sums(weights)
    running = sums.cumsum(dim=-1)
    block, rest = _search_row(running, uniforms.to(running.dtype) * running[:, -1])
    tokens = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(-1, tokens.clamp(max=weights.shape[1] - 1)).masked_fill(tokens >= weights.shape[1], 0)
    offset, _ = _search_row(inside.cumsum(dim=-1), rest)
    return (block * BLOCK + offset).clamp(max=weights.shape[1] - 1)


def _block_sums(weights: Tensor) -> Tensor:
    """Sums [B, ceil(V / BLOCK)] of neighbouring weights [B, V]."""
    blocks = weights.shape[1] // BLOCK
    whole = blocks * BLOCK
    sums = weights[:, :whole].unflatten(-1, (blocks, BLOCK)).sum(dim=-1)
    return sums if whole == weights.shape[1] else torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)


def _search_row(running: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry [B] of running sums [B, N] that exceeds the target [B], and what is left of the target there.

    Never one of weight 0: the target is kept below the last sum, where rounding would lift it onto that.
    """
    total = running[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))[:, None]
    index = torch.searchsorted(running, target, right=True)
    before = running.gather(-1, (index - 1).clamp(min=0)).masked_fill(index == 0, 0)
    return index.squeeze(-1), (target - before).squeeze(-1)


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


def draw_lengths(seed: int, step: int, rows: Tensor, sampling: Sampling) -> Tensor | None:
    """The number of tokens [B] after which each response is cut, int64; None without `random_length`.

    A pure function of (seed, step, row), as `counter_uniforms`, and independent of those that draw the tokens.
    """
    if sampling.random_length is None:
        return None
    shortest, longest = sampling.random_length
    uniforms = counter_uniforms(seed ^ LENGTH_SEED, step, rows, 1)[:, 0].double()
    return shortest + (uniforms * (longest - shortest + 1)).long()


def _mix(state: Tensor) -> Tensor:
    """splitmix64's step and finaliser on int64, whose products wrap around as uint64's do."""
    state = state + -7046029254386353131  # 0x9E3779B97F4A7C15
    state = (state ^ _shift_right(state, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift_right(state, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return state ^ _shift_right(state, 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) shift; the operator's own shift copies the sign bit."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
