"""Pairs of sentences served for supervised translation; the translation game is served by a subclass."""

from __future__ import annotations

import functools

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from elastic_lightning.checks import check_counts
from elastic_lightning.data.corpus import Corpus, in_languages, rows, some_of, take
from elastic_lightning.data.loader import ResumableLoader
from elastic_lightning.data.module import TextDataModule
from elastic_lightning.data.sampler import EndlessSampler, LengthSampler, sorted_in_batches
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import PairedTexts, TranslationBatch
from elastic_lightning.policies.encoding import (
    EncodedPairs,
    encode_source,
    encode_target,
    eos_token_id,
    paired,
    truncated,
    within,
)

ENGLISH = "en"


class PairsDataModule(TextDataModule):
    """Base for one direction of translation; a subclass overrides `load`, which yields the splits.

    Batches: `PairedTexts` of like length in training, `TranslationBatch` in validation and test. Training leaves out
    pairs that are too long; evaluation keeps every pair, and cuts what is too long.

    Args:
        source: language that is read, e.g. fr.
        target: language that is written, e.g. en.
        batch_size: pairs a training batch on one process.
        batch_tokens: instead of `batch_size`: tokens a training batch on one process, with padding, of the longer side.
        eval_batch_size: pairs a validation or test batch.
        tokenizer: hub id or folder; that of the model being trained by default.
        max_prompt_tokens: longest source.
        max_target_tokens: longest target, with its eos.
        source_eos: end each source in eos too, as Marian's and T5's encoders expect.
        long_words: a sentence of so many English words or more is long.
        long_weight: how often an epoch has each long sentence.
        limit_pairs: use only so many training pairs, drawn at random.
        eval_pairs: pairs of a validation or test: so many English sentences are held out of the corpus, or the first
            so many are taken of a corpus given for it.
        seed: of the order of the data and of the split.
    """

    lower_case = False

    def __init__(
        self,
        source: str = "fr",
        target: str = ENGLISH,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        eval_batch_size: int = 64,
        tokenizer: str | None = None,
        max_prompt_tokens: int = 64,
        max_target_tokens: int = 64,
        source_eos: bool = True,
        long_words: int = 8,
        long_weight: int = 1,
        limit_pairs: int | None = None,
        eval_pairs: int = 1000,
        seed: int = 42,
    ) -> None:
        super().__init__(tokenizer, seed)
        sizes = ("batch_size", "batch_tokens", "eval_batch_size", "max_prompt_tokens", "max_target_tokens")
        check_counts("data's ", locals(), *sizes, "long_words", "long_weight", "limit_pairs", "eval_pairs")
        if source == target:
            raise UserError(f"data's source and target are both {source!r}: name two languages, e.g. fr and en")
        self.source, self.target = source, target
        self.batch_size, self.batch_tokens, self.eval_batch_size = batch_size, batch_tokens, eval_batch_size
        self.max_prompt_tokens, self.max_target_tokens = max_prompt_tokens, max_target_tokens
        self.source_eos, self.long_words, self.long_weight = source_eos, long_words, long_weight
        self.limit_pairs, self.eval_pairs = limit_pairs, eval_pairs
        self.splits: dict[str, Corpus] = {}
        self._encoded: dict[str, EncodedPairs] = {}
        self._given_tokenizer: PreTrainedTokenizerBase | None = None

    def load(self) -> dict[str, Corpus]:
        """The splits train, validation and perhaps test: the texts of both languages."""
        raise TypeError(f"{type(self).__name__} must override load() -> splits train, validation, test")

    def training_texts(self) -> list[str]:
        """Every training sentence of every language, on which a tokenizer is trained."""
        return [text for texts in self.load()["train"].values() for text in texts]

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """A tokenizer for all languages together: byte-level BPE of the given size, trained on the training texts."""
        return train_bpe(self.training_texts(), vocabulary, self.lower_case)

    def accompany(self, other: TextDataModule, tokenizer: PreTrainedTokenizerBase) -> None:
        """Serve beside `other` and its trainer, by default with this tokenizer."""
        self.trainer, self._given_tokenizer = other.trainer, tokenizer

    # Lightning --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if not self.splits:
            splits = self.load()
            train = in_languages(splits.pop("train"), self.source, self.target)
            evaluated = {name: take(split, range(rows(split))[: self.eval_pairs]) for name, split in splits.items()}
            self.splits = {"train": some_of(train, self.limit_pairs, self.seed), **evaluated}
        self._encoded = {}
        self.source_tokenizer, self.target_tokenizer = self.find_tokenizers()
        if stage == "fit":
            self._check_size()

    def train_dataloader(self) -> DataLoader:
        return self._train_loader(endless=False)

    def endless_dataloader(self) -> DataLoader:
        """The training batches of epoch after epoch, to accompany a loader that ends."""
        return self._train_loader(endless=True)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation("test" if "test" in self.splits else "validation")

    # Tokens and batches -----------------------------------------------------------------------------------------

    def find_tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """The tokenizers of source and target."""
        if self.tokenizer_path is None and self._given_tokenizer is not None:
            return self._given_tokenizer, self._given_tokenizer
        tokenizer = self.find_tokenizer()
        return tokenizer, tokenizer

    def encoded(self, split: str) -> EncodedPairs:
        """Token ids of all the pairs of a split."""
        if split not in self._encoded:
            texts = self.splits[split]
            self._encoded[split] = EncodedPairs(
                encode_source(self.source_tokenizer, texts[self.source], self.source_eos),
                encode_target(self.target_tokenizer, texts[self.target]),
            )
        return self._encoded[split]

    def training_rows(self) -> list[int]:
        """Rows of the training split of which neither side is too long."""
        return within(self.encoded("train"), self.max_prompt_tokens, self.max_target_tokens)

    def paired(self, split: str, indices: list[int]) -> PairedTexts:
        """The pairs of these rows as one batch; the text of a split's rows is in `splits`."""
        pairs = self.encoded(split).take(indices)
        pairs = EncodedPairs(
            truncated(pairs.source, self.max_prompt_tokens), truncated(pairs.target, self.max_target_tokens)
        )
        return paired(pairs, self.source_tokenizer.pad_token_id, eos_token_id(self.target_tokenizer))

    def evaluation_batch(self, split: str, indices: list[int]) -> TranslationBatch:
        """The pairs of these rows and what they are measured against."""
        return TranslationBatch(self.paired(split, indices), take(self.splits[split], indices)[self.target])

    def _train_loader(self, endless: bool) -> DataLoader:
        kept = self.training_rows()
        sampler = self._train_sampler(kept)
        return ResumableLoader(
            self.position,
            kept,
            batch_sampler=EndlessSampler(sampler) if endless else sampler,
            collate_fn=functools.partial(self.paired, "train"),
        )

    def _train_sampler(self, kept: list[int]) -> LengthSampler:
        size = {"batch_size": self.batch_size} if self.batch_tokens is None else {"batch_tokens": self.batch_tokens}
        rank, world_size = self.process
        lengths = self.encoded("train").take(kept).lengths()
        return LengthSampler(lengths, **size, times=self._times(kept), seed=self.seed, rank=rank, world_size=world_size)

    def _times(self, kept: list[int]) -> list[int] | None:
        """How often an epoch has each of these rows."""
        if self.long_weight == 1:
            return None
        texts = self.splits["train"][ENGLISH if ENGLISH in self.splits["train"] else self.source]
        return [self.long_weight if len(texts[row].split()) >= self.long_words else 1 for row in kept]

    def _evaluation(self, split: str) -> DataLoader:
        if split not in self.splits:
            raise UserError(f"there is no {split} corpus: give data's corpora.{split}")
        _, ranks = self.process  # whose batches together are those of one rank
        order = sorted_in_batches(self.encoded(split).lengths(), self.eval_batch_size * ranks, self.seed)
        return self.dataloader(order, self.eval_batch_size, False, functools.partial(self.evaluation_batch, split))

    def _check_size(self) -> None:
        kept, all_rows = self.training_rows(), rows(self.splits["train"])
        if len(kept) < all_rows:
            rank_zero_info(
                f"{all_rows - len(kept)} of {all_rows} {self.source}-{self.target} pairs are longer than "
                f"{self.max_prompt_tokens} or {self.max_target_tokens} tokens and left out of training"
            )
        if len(self._train_sampler(kept)) == 0:
            raise UserError(
                f"{len(kept)} training pairs of no more than {self.max_prompt_tokens} and {self.max_target_tokens} "
                "tokens are less than one batch: lower data's batch_size or raise the limits"
            )
