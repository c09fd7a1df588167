"""What all data modules have in common: a tokenizer, and rows whose order is that of a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from elastic_lightning.algorithms.base import PolicyModule
from elastic_lightning.callbacks.position import Position
from elastic_lightning.checks import check_seed
from elastic_lightning.data.loader import ResumableLoader
from elastic_lightning.data.sampler import EpochSampler, even_batch_size
from elastic_lightning.errors import UserError
from elastic_lightning.policies import PairedTexts, PolicyLM, load_tokenizer
from elastic_lightning.policies.encoding import EncodedPairs, encode_target, eos_token_id, paired
from elastic_lightning.policies.special_tokens import encode_open


class TextDataModule(LightningDataModule):
    """Base of the data modules.

    Args:
        tokenizer: hub id or folder; that of the model being trained by default.
        seed: of the order of the data and of the split.
    """

    def __init__(self, tokenizer: str | None, seed: int) -> None:
        super().__init__()
        check_seed("data's seed", seed)
        self.tokenizer_path, self.seed = tokenizer, seed

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """A tokenizer of the given size for this text."""
        raise TypeError(f"{type(self).__name__} must override train_tokenizer(vocabulary)")

    def find_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of this name, or that of the model being trained."""
        if self.tokenizer_path is not None:
            return load_tokenizer(self.tokenizer_path)
        if self.trainer is not None:
            return self.trainer.lightning_module.tokenizer
        raise UserError("outside a Trainer the data module needs a `tokenizer` (hub id or folder)")

    def encode_prompts(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """Token ids of texts as the policy that will be asked reads them, by default a causal one; a text of more than
        `longest` tokens loses its beginning."""
        lm = self.policy
        return (encode_open if lm is None else lm.encode_rows)(self.tokenizer, texts, longest)

    @property
    def policy(self) -> PolicyLM | None:
        """The policy that is trained or measured; None for other modules, and outside a trainer."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return module.actor.lm if isinstance(module, PolicyModule) else None

    def human_pairs(
        self, pairs: Sequence[tuple[str, str]], batch_size: int, longest: int, longest_answer: int
    ) -> DataLoader:
        """Human text for the perplexity of an encoder-decoder, as `PairedTexts`: what a human wrote after each prompt.

        Args:
            pairs: prompts and what was written after them.
            batch_size: pairs a batch.
            longest: tokens of a prompt; longer ones lose their beginning.
            longest_answer: tokens of the other side; longer ones lose their end.
        """
        context = self.policy.longest_text
        most = longest_answer if context is None else min(longest_answer, context)
        pad_token, eos = self.tokenizer.pad_token_id, eos_token_id(self.tokenizer)

        def collate(rows: list[tuple[str, str]]) -> PairedTexts:
            prompts, answers = zip(*rows, strict=True)
            written = [ids[:most] for ids in encode_target(self.tokenizer, answers)]
            return paired(EncodedPairs(self.encode_prompts(prompts, longest), written), pad_token, eos)

        return self.dataloader(pairs, batch_size, False, collate)

    @property
    def process(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def position(self) -> Position:
        """How far the trainer has come in the training data."""
        return Position.of(self.trainer)

    def dataloader(
        self, rows: Sequence[Any], batch_size: int, shuffle: bool, collate: Callable[[list[Any]], Any]
    ) -> DataLoader:
        """This process's share of the rows, batched.

        Raises:
            UserError: not every process would have a row.
        """
        _, ranks = self.process
        if len(rows) < ranks:
            raise UserError(f"{len(rows)} rows do not suffice for {ranks} processes: give the data more, or use fewer")
        if not shuffle:
            batch_size = even_batch_size(len(rows), batch_size, ranks)
        sampler = EpochSampler(len(rows), batch_size, self.seed, shuffle, *self.process)
        if not shuffle:
            return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=collate)
        return ResumableLoader(self.position, rows, batch_size=batch_size, sampler=sampler, collate_fn=collate)
