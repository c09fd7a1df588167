"""Fluency: what a language model that took no part in the training says about the texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.policies import CausalLM, Prompts, Responses, load_policy
from elastic_lightning.policies.checked_model import context_length
from elastic_lightning.policies.special_tokens import Frame


class LanguageModelNLL(Metric):
    """Negative log-likelihood of responses under a frozen causal language model, in nats a token of that model.

    A response is read alone, without its prompt, by the model's own tokenizer: after what that puts before a text, or
    the begin-of-text token (the end-of-text token where there is none, as in packed training text), which is not
    scored. A response that ended pays for its end-of-text token, which counts as a token; one that was cut off does
    not. So an empty response is that one token, or nothing at all. All nats over all tokens: a long response counts for
    more than a short one. A text longer than the model's context counts up to there. NaN without tokens.

    The model moves to the metric's device and is no submodule: no checkpoint, optimizer or DDP wrapper sees it.

    Args:
        path: hub id or `save_pretrained` folder of the language model, with its tokenizer.
        name: under which the value is logged.
        batch_size: texts scored at a time.
        dtype: of the weights.
        trust_remote_code: run the python code that comes with the model; off unless asked.

    Raises:
        UserError: the model cannot be loaded, or its tokenizer has neither a begin- nor an end-of-text token.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    total: Tensor
    tokens: Tensor

    def __init__(
        self,
        path: str,
        name: str = "lm_nll",
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.name, self.batch_size = name, batch_size
        loaded = load_policy(path, dtype=dtype, trust_remote_code=trust_remote_code)
        self.tokenizer = loaded.tokenizer
        if beginning(self.tokenizer) == [None]:
            raise UserError(f"the tokenizer of {path} has neither bos_token nor eos_token: no text can begin")
        self._model = (CausalLM(loaded.model.requires_grad_(False)),)  # in a tuple, where torch sees no submodule
        for state in ("total", "tokens"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prompts: Sequence[str], responses: Sequence[str], complete: Sequence[bool]) -> None:
        """Add B responses and whether each ended by itself; prompts are not read."""
        (model,) = self._model
        model.to(self.device)
        rows = encode(self.tokenizer, responses, complete, context_length(model.model))
        begin = beginning(self.tokenizer)
        for texts in batches(rows, self.batch_size, self.device):
            self.total = self.total + text_nll(model, begin, texts).sum()
            self.tokens = self.tokens + texts.mask.sum()

    def compute(self) -> Tensor:
        return self.total / self.tokens

    def perplexity(self) -> Tensor:
        """exp of the value so far."""
        return self.compute().exp()


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], complete: Sequence[bool], longest: int | None
) -> list[list[int]]:
    """The tokens of each text that are scored: its own, and the end-of-text token where it is `complete`."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [(row + end if ended else row)[:longest] for row, ended in zip(rows, complete, strict=True)]


def batches(rows: list[list[int]], size: int, device: torch.device) -> Iterator[Responses]:
    """Rows that are not empty, `size` at a time and padded at the end; those of like length together."""
    rows = sorted(filter(None, rows), key=len)
    for start in range(0, len(rows), size):
        chunk = [torch.tensor(row, device=device) for row in rows[start : start + size]]
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in chunk], batch_first=True)
        yield Responses(pad_sequence(chunk, batch_first=True), mask)


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """The tokens that a text of its own follows; [None] where the tokenizer has none."""
    special = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Frame.of(tokenizer).before or [special]


@torch.no_grad()
def text_nll(model: CausalLM, begin: Sequence[int], texts: Responses) -> Tensor:
    """Nats [B] float64 of whole texts that follow the tokens `begin`; in the type of the weights, autocast or not."""
    start = torch.tensor([begin], device=texts.tokens.device).expand(len(texts.tokens), -1)
    with torch.autocast(start.device.type, enabled=False):
        hidden = model.response_hidden(Prompts(start, torch.ones_like(start, dtype=torch.bool)), texts)
        return -model.token_statistics(hidden, texts).logprobs.sum(dim=1, dtype=torch.float64)
