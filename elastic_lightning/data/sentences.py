"""Sentences of one language, as text for a language model: the judge of how fluent a game's messages are."""

from __future__ import annotations

from elastic_lightning.data.parallel import ParallelText, read_parallel
from elastic_lightning.data.reviews import Reviews, ReviewsDataModule


class SentencesDataModule(ReviewsDataModule):
    """Packed sentences of one side of parallel text, for `LanguageModel`."""

    def __init__(
        self,
        train: ParallelText,
        validation: ParallelText,
        language: str = "en",
        lowercase: bool = True,
        tokenizer: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        block_size: int = 64,
        eval_texts: int = 1000,
        seed: int = 42,
    ) -> None:
        """
        Args:
            train: text to train on.
            validation: text to validate and test on.
            language: which side of it.
            lowercase: everything in lower case.
            tokenizer: hub id or folder; that of the model being trained by default.
            batch_size: blocks a training batch on one process.
            eval_batch_size: blocks a validation or test batch.
            block_size: tokens of a packed block.
            eval_texts: sentences on which perplexity is measured.
            seed: of the order.
        """
        super().__init__(
            "language_model",
            batch_size,
            eval_batch_size,
            tokenizer,
            block_size,
            eval_texts=eval_texts,
            seed=seed,
        )
        self.train_text, self.validation_text = train, validation
        self.language, self.lowercase = language, lowercase

    def load(self) -> dict[str, Reviews]:
        train, validation = (self._sentences(text) for text in (self.train_text, self.validation_text))
        return {"train": train, "validation": validation, "test": validation}

    def _sentences(self, text: ParallelText) -> Reviews:
        lines = read_parallel(text, (self.language,))[self.language]
        return Reviews([line.lower() if self.lowercase else line for line in lines], [0] * len(lines))
