"""A sequence classifier as reward: the probability or logit of one label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from elastic_lightning.checks import check_counts
from elastic_lightning.errors import UserError
from elastic_lightning.policies.classifier import pad_like, trained_classifier
from elastic_lightning.policies.loading import check_vocabulary, disable_dropout, load_tokenizer
from elastic_lightning.policies.portions import Portions
from elastic_lightning.policies.sources import ModelSource
from elastic_lightning.policies.special_tokens import encode_whole
from elastic_lightning.rewards.base import Reward


class ClassifierReward(Reward):
    """Score texts with a Hugging Face sequence classifier.

    Args:
        path: hub id or `save_pretrained` folder of the classifier, with its own tokenizer; a LoRA adapter in a folder
            is merged into the base model that it names.
        label: whose score is the reward: its index, or its name in the model's `id2label`.
        output: "probability" (softmax, or sigmoid of a one-label model) or "logit".
        on: what the classifier reads: the whole text or the response alone.
        max_length: in tokens; longer texts lose their beginning. The model's own limit by default.
        batch_size: texts scored at a time, those of like length together; halved for the rest of the run where memory
            does not suffice.
        dtype: of the weights and of the arithmetic, whatever `trainer.precision` is: a score does not depend on it.
        trust_remote_code: run the python code that comes with the model; off unless asked.
        special_tokens: read texts with the special tokens within them, of a policy whose special tokens it knows;
            without them by default.
    """

    def __init__(
        self,
        path: str,
        label: int | str = 1,
        output: Literal["probability", "logit"] = "probability",
        on: Literal["text", "response"] = "text",
        max_length: int | None = None,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
        special_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.special_tokens = special_tokens
        if output not in ("probability", "logit"):
            raise UserError(f"output must be probability or logit, got {output!r}")
        if on not in ("text", "response"):
            raise UserError(f"on must be text or response, got {on!r}")
        check_counts("", locals(), "max_length", "batch_size")
        source = ModelSource(path, dtype=dtype, trust_remote_code=trust_remote_code)
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self.model = self.load(source, self.tokenizer)
        self.label = label_index(self.model.config, label)
        self.output, self.on = output, on
        self.portions = Portions(batch_size, "scoring by the classifier")
        self.max_length = max_length or position_limit(self.model)

    def load(self, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The classifier: tokens and mask [B, L] in, ``logits`` [B, labels] out."""
        model = trained_classifier(source)
        check_vocabulary(tokenizer, model, source.path)
        disable_dropout(model)
        pad_like(model, tokenizer)
        return model

    def forward(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores [B] float32."""
        if self.on == "response":
            texts = responses
        else:
            texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        rows = encode_whole(self.tokenizer, texts, self.max_length)  # the response is at a text's end
        cut = self.portions.size < len(rows)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row])) if cut else list(range(len(rows)))
        scores = self.portions.run(lambda part: self._score([rows[row] for row in order[part]]), len(rows))
        return torch.cat(scores)[torch.tensor(order, device=scores[0].device).argsort()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassifierReward:
        """Go to another device with the module that this is a part of, but not to the precision that it trains in."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _score(self, rows: list[list[int]]) -> Tensor:
        """Scores [B] of texts given as tokens."""
        pad = self.model.config.pad_token_id
        # An empty text keeps one (pad) position: some models return NaN where they may attend to nothing.
        rows = [torch.tensor(row or [pad]) for row in rows]
        tokens = pad_sequence(rows, batch_first=True, padding_value=pad).to(self.model.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.model.device)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.model(input_ids=tokens, attention_mask=mask).logits.float()
        if self.output == "logit":
            return logits[:, self.label]
        return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, self.label]


def position_limit(model: nn.Module) -> int | None:
    """Longest text in tokens that the model has positions for, or None where its config does not say."""
    limit = getattr(model.config, "max_position_embeddings", None)
    positions = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    first = getattr(positions[0], "padding_idx", None) if positions else None
    # RoBERTa and its kin number positions from the pad token's id on.
    return limit if limit is None or first is None else limit - first - 1


def label_index(config, label: int | str) -> int:
    """Index of a label given by index or name.

    Raises:
        UserError: the model has no such label; the message lists those it has.
    """
    names = dict(config.id2label)
    if isinstance(label, str):  # a name, even one like "1"; else an index that came as text
        named = next((index for index, name in names.items() if name == label), None)
        index = int(label) if named is None and label.isdigit() else named
    else:
        index = label
    if index is None or not 0 <= index < config.num_labels:
        raise UserError(f"the classifier has no label {label!r}; it has {names}")
    return index
