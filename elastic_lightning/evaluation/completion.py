"""A policy as a writer of text: prompts in, completions out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.generate import load
from elastic_lightning.policies import ActorCritic, Prompts, Sampling, counter_uniforms, sample

TAIL = 8  # tokens in which a stop string is looked for while decoding; none published has more characters


class PolicyCompleter:
    """Samples from a policy, row after row: a call goes on with the random numbers where the last one ended.

    Prompts are encoded as everywhere, with what their tokenizer puts before a text.

    Args:
        policy: in eval mode.
        tokenizer: of the policy.
        sampling: how tokens are drawn.
        seed: of the random numbers.
        stops: a row ends early, once it holds one of these strings.
    """

    def __init__(
        self,
        policy: ActorCritic,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        seed: int = 1,
        stops: Sequence[str] = (),
    ) -> None:
        self.policy, self.tokenizer, self.sampling, self.seed = policy, tokenizer, sampling, seed
        self.stops, self.drawn = tuple(stops), policy.lm.drawn_tokens(tokenizer)
        self.rows = 0

    @classmethod
    def load(cls, path: str, sampling: Sampling, seed: int = 1, stops: Sequence[str] = ()) -> PolicyCompleter:
        """From a `save_pretrained` folder, a hub id or a checkpoint; on a GPU where there is one."""
        policy, tokenizer = load(path)
        return cls(policy.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, sampling, seed, stops)

    def complete(self, prompts: list[str]) -> list[str]:
        """One completion a prompt, drawn as one batch.

        Raises:
            UserError: a prompt does not fit the model's context with its completion.
        """
        batch = self._encode(prompts)
        self._check_length(batch.tokens.shape[1])
        rows = torch.arange(len(prompts), device=batch.tokens.device) + self.rows
        self.rows += len(prompts)
        uniforms = counter_uniforms(self.seed, 0, rows, self.sampling.max_new_tokens)
        stop = self._stopped if self.stops else None
        rollout = sample(self.policy, batch, self.sampling, uniforms, stop=stop, **self.drawn._asdict())
        return self.policy.lm.decode(self.tokenizer, batch, rollout.responses).responses

    def check(self, prompts: list[str]) -> None:
        """Raise what `complete` would, before any is drawn."""
        self._check_length(max(map(len, self.policy.lm.encode_rows(self.tokenizer, prompts))))

    def _encode(self, prompts: list[str]) -> Prompts:
        device = next(self.policy.parameters()).device
        return Prompts(*(part.to(device) for part in self.policy.lm.encode(self.tokenizer, prompts)))

    def _check_length(self, tokens: int) -> None:
        context, new = self.policy.lm.longest_text, self.sampling.max_new_tokens
        if context is not None and tokens + new > context:
            raise UserError(
                f"a prompt of {tokens} tokens and {new} new ones make {tokens + new}, but the model's context is "
                f"{context}: lower max_new_tokens"
            )

    def _stopped(self, tokens: Tensor) -> Tensor:
        """Which rows [B] of new tokens [B, t] hold a stop string at their ends."""
        ends = self.tokenizer.batch_decode(tokens[:, -TAIL:], skip_special_tokens=True)
        return torch.tensor([any(stop in end for stop in self.stops) for end in ends], device=tokens.device)
