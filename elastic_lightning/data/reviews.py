"""Labelled texts served for the three stages of a run: supervised language modelling, reward modelling, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from elastic_lightning.algorithms import LabelledTexts
from elastic_lightning.checks import check_counts
from elastic_lightning.data.module import TextDataModule
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import Prompts, Seq2SeqLM, pad
from elastic_lightning.policies.special_tokens import encode_open, encode_whole

LONG_WORD = 20  # mean characters of a text's words above which they are no words
Stage = Literal["language_model", "reward_model", "prompts"]
SIZES = ("batch_size", "eval_batch_size", "block_size", "max_tokens", "max_prompt_tokens", "eval_prompts", "eval_texts")
SIZES += ("limit_texts",)


class Reviews(NamedTuple):
    """Texts and their labels (0 negative, 1 positive)."""

    texts: list[str]
    labels: list[int]


class ReviewsDataModule(TextDataModule):
    """Base of the review tasks; a subclass overrides `load`, which yields the splits train, validation and test.

    Batches:
        language_model: tokens [B, block_size], texts packed end to end with eos between them;
        reward_model: `LabelledTexts`, texts with the special tokens around them, whose beginning is cut to max_tokens;
        prompts: `Prompts`, the first half of a review's words (of its tokens, where words are not written apart),
            left-truncated and left-padded. Validation adds batches of packed human text [B, block_size], on which the
            policy's perplexity is measured; for an encoder-decoder `PairedTexts` of prompts and the rest of each text,
            of which the first block_size tokens count.

    What the tokenizer puts before a text stands before each text and each prompt.

    Args:
        task: which stage to serve.
        batch_size: rows a training batch on one process.
        eval_batch_size: rows a validation or test batch.
        tokenizer: hub id or folder; that of the model being trained by default.
        block_size: tokens of a packed block.
        max_tokens: longest text of the reward model; longer ones lose their beginning.
        max_prompt_tokens: longest prompt; longer ones lose their beginning.
        prompt_fraction: share of a review's words (or tokens) that makes the prompt.
        eval_prompts: prompts of a validation.
        eval_texts: human texts on which perplexity is measured, of a policy or a language model.
        limit_texts: use only so many training texts.
        seed: of the order of the data and of the split.
    """

    def __init__(
        self,
        task: Stage = "prompts",
        batch_size: int = 64,
        eval_batch_size: int = 64,
        tokenizer: str | None = None,
        block_size: int = 128,
        max_tokens: int = 256,
        max_prompt_tokens: int = 64,
        prompt_fraction: float = 0.5,
        eval_prompts: int = 256,
        eval_texts: int = 256,
        limit_texts: int | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__(tokenizer, seed)
        check_counts("data's ", locals(), *SIZES)
        check_counts("data's ", locals(), "block_size", least=2)  # the first token of a block has none before it
        if not 0 < prompt_fraction < 1:
            raise UserError(f"data's prompt_fraction must be between 0 and 1, got {prompt_fraction}")
        self.task, self.batch_size, self.eval_batch_size = task, batch_size, eval_batch_size
        self.block_size, self.max_tokens = block_size, max_tokens
        self.max_prompt_tokens = max_prompt_tokens if task == "prompts" else None
        self.prompt_fraction, self.eval_prompts, self.eval_texts = prompt_fraction, eval_prompts, eval_texts
        self.limit_texts = limit_texts
        self.splits: dict[str, Reviews] = {}
        self._blocks: dict[str, Tensor] = {}

    def load(self) -> dict[str, Reviews]:
        """The splits train, validation and test."""
        raise TypeError(f"{type(self).__name__} must override load() -> splits train, validation, test")

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """A tokenizer for this text: byte-level BPE of the given size, trained on the training texts."""
        return train_bpe(self.load()["train"].texts, vocabulary)

    # Lightning --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if not self.splits:
            splits = self.load()
            if self.limit_texts is not None:
                splits["train"] = Reviews(*(part[: self.limit_texts] for part in splits["train"]))
            empty = [name for name, split in splits.items() if not split.texts]
            if empty:
                raise UserError(f"no texts in the split {empty[0]}: is the data empty, or limit_texts 0?")
            self.splits = splits
        self.tokenizer = self.find_tokenizer()
        if stage == "fit":
            self._check_size()

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size, limit=self.eval_prompts)

    # The three tasks --------------------------------------------------------------------------------------------

    def packed(self, split: str, texts: int | None = None) -> Tensor:
        """Blocks [N, block_size] of the split's first `texts` texts, end to end with eos between them."""
        key = f"{split}:{texts}"
        if key not in self._blocks:
            self._blocks[key] = pack(self.tokenizer, self.splits[split].texts[:texts], self.block_size)
        return self._blocks[key]

    def _evaluation(self, split: str) -> DataLoader | list[DataLoader]:
        if self.task != "prompts":
            return self._loader(split, self.eval_batch_size)
        return [self._loader(split, self.eval_batch_size, limit=self.eval_prompts), self._human_text(split)]

    def _human_text(self, split: str) -> DataLoader:
        """What a policy's perplexity is measured on."""
        if not isinstance(self.policy, Seq2SeqLM):
            return self.dataloader(self.packed(split, self.eval_texts), self.eval_batch_size, False, torch.stack)
        texts = self.splits[split].texts[: self.eval_texts]
        halves = [first_part(self.tokenizer, text, self.prompt_fraction) for text in texts]
        pairs = [(half, text[len(half) :].strip()) for half, text in zip(halves, texts, strict=True)]
        return self.human_pairs(pairs, self.eval_batch_size, self.max_prompt_tokens, self.block_size)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False, limit: int | None = None) -> DataLoader:
        if self.task == "language_model":
            texts = None if split == "train" else self.eval_texts
            return self.dataloader(self.packed(split, texts), batch_size, shuffle, torch.stack)
        rows = list(zip(*(part[:limit] for part in self.splits[split]), strict=True))
        collate = self._collate_labelled if self.task == "reward_model" else self._collate_prompts
        return self.dataloader(rows, batch_size, shuffle, collate)

    def _collate_labelled(self, rows: list[tuple[str, int]]) -> LabelledTexts:
        texts, labels = zip(*rows, strict=True)
        encoded = encode_whole(self.tokenizer, texts, self.max_tokens)
        tokens, mask = pad(encoded, self.tokenizer.pad_token_id, left=False)
        return LabelledTexts(tokens, mask, torch.tensor(labels))

    def _collate_prompts(self, rows: list[tuple[str, int]]) -> Prompts:
        halves = [first_part(self.tokenizer, text, self.prompt_fraction) for text, _ in rows]
        encoded = self.encode_prompts(halves, self.max_prompt_tokens)
        return Prompts(*pad(encoded, self.tokenizer.pad_token_id, left=True))

    def _check_size(self) -> None:
        rows = len(self.packed("train")) if self.task == "language_model" else len(self.splits["train"].texts)
        needed = self.batch_size * self.process[1]
        if rows < needed:
            raise UserError(
                f"the training data has {rows} rows, less than one batch of {needed}: lower data's batch_size"
            )


def first_words(text: str, fraction: float) -> str:
    """The first share of a text's words, one at least: the prompt of the RL4LMs IMDB task."""
    words = text.split(" ")
    return " ".join(words[: max(1, int(len(words) * fraction))])


def first_part(tokenizer: PreTrainedTokenizerBase, text: str, fraction: float) -> str:
    """`first_words`; where words are not written apart, as in Chinese or Thai, the first share of the text's tokens."""
    words = text.split(" ")
    if len(words) > 1 and len(text) <= LONG_WORD * len(words):
        return first_words(text, fraction)
    if not tokenizer.is_fast:  # the others do not say where in the text a token ends
        return text[: max(1, int(len(text) * fraction))]
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    return text[: ends[max(1, int(len(ends) * fraction)) - 1]] if ends else text


def pack(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block_size: int) -> Tensor:
    """Texts end to end, each with what stands before a text and eos after it, cut into blocks [N, block_size]; what is
    left over is dropped."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for ids in encode_open(tokenizer, texts) for token in (*ids, *eos)]
    blocks = len(stream) // block_size
    if blocks == 0:
        raise UserError(
            f"{len(texts)} texts of {len(stream)} tokens do not fill one block of {block_size}: lower block_size"
        )
    return torch.tensor(stream[: blocks * block_size]).view(blocks, block_size)
