"""A reward is a callable (prompts, responses) -> scores; this is what all of them share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from elastic_lightning.errors import NotFinite, UserError
from elastic_lightning.policies import PolicyLM
from elastic_lightning.ranks import alike

OnError = Literal["stop", "mask"]
FAILURES = (Exception, SystemExit)  # a reward is code of the user's, which may also ask python to end


class Scores(NamedTuple):
    """`total` [B] float32, what the policy is trained on; `components`: named [B] parts of it, for the log.

    `valid` [B] bool: the responses that have a score, all where it is None; the others hold 0 and are left out.
    """

    total: Tensor
    components: dict[str, Tensor]
    valid: Tensor | None = None

    def to(self, device: torch.device) -> Scores:
        """The same on a device."""
        components = {name: part.to(device) for name, part in self.components.items()}
        return Scores(self.total.to(device), components, None if self.valid is None else self.valid.to(device))


class Reward(nn.Module):
    """Base class: override `forward(prompts, responses) -> scores [B]`, with B texts each.

    A response continues its prompt: ``prompt + response`` is the whole text, spaces included; that of an
    encoder-decoder is a text of its own. Texts hold no special tokens, unless `special_tokens` asks for those within
    them (``<think>``, tool calls, marks of a turn); padding, what the tokenizer puts before a text and what ends a
    response are in none. A module, so that a reward model moves to the policy's device; its weights are frozen and stay
    out of checkpoints.

    Attributes:
        retries: how often it is asked again where it raises.
        on_error: what then: "stop" the run, or ask for one response at a time and "mask" those on which it raises.
        special_tokens: whether it reads texts with the special tokens within them.
    """

    retries: int = 0
    on_error: OnError = "stop"
    special_tokens: bool = False
    _told: frozenset[type] = frozenset()  # exceptions that a warning was given for

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        raise TypeError(f"{type(self).__name__} must override forward(prompts, responses) -> scores [B]")

    def bind(self, lm: PolicyLM) -> None:
        """Told before anything is scored which policy will be: for rewards that share its weights."""
        for part in self.modules():
            if part is not self and isinstance(part, Reward):
                part.bind(lm)

    def parts(self) -> dict[str, Reward]:
        """Rewards that this one is made of, by name: each is asked by itself, with its own `retries` and `on_error`;
        `combine` makes the total of their scores. None by default."""
        return {}

    def components(self, prompts: list[str], responses: list[str]) -> dict[str, Tensor]:
        """Named parts [B] each; a reward made of one part has none."""
        return {}

    def combine(self, components: dict[str, Tensor]) -> Tensor:
        """The total [B] from `components`, for rewards that have them."""
        return torch.stack(list(components.values())).sum(dim=0)


def reads_special_tokens(reward: nn.Module) -> bool:
    """Whether a reward, or one that it is made of, reads texts with their special tokens."""
    return any(isinstance(part, Reward) and part.special_tokens for part in reward.modules())


def score(
    reward: Reward,
    prompts: list[str],
    responses: list[str],
    with_special_tokens: tuple[list[str], list[str]] | None = None,
) -> Scores:
    """Score B texts and check what comes back.

    `with_special_tokens`: the same prompts and responses for rewards that read them so; without it, they read these.

    Raises:
        NotFinite: a score is NaN or infinite.
        UserError: the reward raised and is to stop the run, or returned another number of scores than texts.
    """
    if parts := reward.parts():
        return _score_parts(reward, parts, prompts, responses, with_special_tokens)
    if reward.special_tokens and with_special_tokens is not None:
        prompts, responses = with_special_tokens
    try:
        return _ask(reward, prompts, responses)
    except UserError:
        raise
    except FAILURES as error:
        if reward.on_error == "mask":
            return _ask_one_by_one(reward, prompts, responses)
        raise UserError(
            f"the reward {type(reward).__name__} raised {type(error).__name__}: {' '.join(str(error).split())[:300]} "
            f"(first text of the batch: {_excerpt(prompts[0] + responses[0])})"
        ) from error


def _score_parts(
    reward: Reward,
    parts: dict[str, Reward],
    prompts: list[str],
    responses: list[str],
    with_special_tokens: tuple[list[str], list[str]] | None,
) -> Scores:
    """The scores of a reward that is made of others.

    Where FSDP2 shards the model of a part, every rank must run it equally often: the other parts come first, and where
    one of them raises on one rank, it does on all.
    """
    sharded = [name for name, part in parts.items() if any(hasattr(p, "to_local") for p in part.parameters())]

    def ask(names: Iterable[str]) -> dict[str, Scores]:
        found = {}
        for name in names:
            try:
                found[name] = score(parts[name], prompts, responses, with_special_tokens)
            except UserError as error:
                error.args = (f"{name}: {error}",)
                raise
        return found

    whole = [name for name in parts if name not in sharded]
    scored = alike(lambda: ask(whole)) if sharded else ask(whole)
    for name in sharded:
        scored |= alike(lambda name=name: ask([name]))
    components = {name: scored[name].total for name in parts}
    total = _check(reward, "total", reward.combine(components), prompts, responses)
    masks = [each.valid.to(total.device) for each in scored.values() if each.valid is not None]
    if not masks:
        return Scores(total, components)
    valid = torch.stack(masks).all(dim=0)
    kept = {name: values.masked_fill(~valid.to(values.device), 0) for name, values in components.items()}
    return Scores(total.masked_fill(~valid, 0), kept, valid)


def _ask(reward: Reward, prompts: list[str], responses: list[str]) -> Scores:
    """The checked scores of one call; where the reward raises it is asked again, as often as it says."""
    for attempt in range(reward.retries + 1):
        try:
            with torch.inference_mode():
                components = reward.components(prompts, responses)
                total = reward.combine(components) if components else reward(prompts, responses)
            break
        except UserError:
            raise
        except FAILURES:
            if attempt == reward.retries:
                raise
    checked = {name: _check(reward, name, values, prompts, responses) for name, values in components.items()}
    return Scores(_check(reward, "total", total, prompts, responses), checked)


def _ask_one_by_one(reward: Reward, prompts: list[str], responses: list[str]) -> Scores:
    """The scores of those responses on which the reward does not raise, 0 for the others."""
    rows: list[Scores | None] = []
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            rows.append(_ask(reward, [prompt], [response]))
        except UserError:
            raise
        except FAILURES as error:
            rows.append(None)
            if type(error) not in reward._told:  # once a kind of cause
                reward._told = reward._told | {type(error)}
                warnings.warn(
                    f"the reward {type(reward).__name__} raised {type(error).__name__} on single responses, which are "
                    f"masked; fault/masked counts them. The first: {' '.join(str(error).split())[:300]}",
                    stacklevel=2,
                )
    known = next((row for row in rows if row is not None), Scores(torch.zeros(1), {}))
    zero = Scores(
        torch.zeros_like(known.total), {name: torch.zeros_like(part) for name, part in known.components.items()}
    )
    filled = [zero if row is None else row for row in rows]
    return Scores(
        torch.cat([row.total for row in filled]),
        {name: torch.cat([row.components[name] for row in filled]) for name in known.components},
        torch.tensor([row is not None for row in rows], device=known.total.device),
    )


def _check(reward: Reward, name: str, values: Tensor, prompts: list[str], responses: list[str]) -> Tensor:
    try:
        values = torch.as_tensor(values, dtype=torch.float32).clone()  # no inference tensor: it may enter a graph
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the reward {type(reward).__name__} ({name}) must return numbers: {error}") from error
    if values.shape != (len(responses),):
        raise UserError(
            f"the reward {type(reward).__name__} ({name}) must return one score a response: "
            f"got shape {tuple(values.shape)} for {len(responses)} responses"
        )
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        text = prompts[bad[0]] + responses[bad[0]]
        raise NotFinite(
            "reward",
            f"the reward {type(reward).__name__} ({name}) returned {values[bad[0]].item()} for {len(bad)} of "
            f"{len(responses)} texts; the first: {_excerpt(text)}",
        )
    return values


def _excerpt(text: str, length: int = 200) -> str:
    return repr(text if len(text) <= length else text[: length // 2] + " ... " + text[-length // 2 :])
