"""The toy world: generated film reviews whose language is known exactly. No download."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from elastic_lightning.checks import check_counts
from elastic_lightning.data.reviews import Reviews, ReviewsDataModule, Stage
from elastic_lightning.data.toy_grammar import review_grammar, toy_tokenizer

SPLIT_SEEDS = {"train": 1, "validation": 2, "test": 3}


class ToyReviewsDataModule(ReviewsDataModule):
    """Reviews drawn from `review_grammar`; prompts are the first part of a review's words."""

    def __init__(
        self,
        task: Stage = "prompts",
        train_texts: int = 20_000,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        tokenizer: str | None = None,
        block_size: int = 64,
        max_tokens: int = 64,
        max_prompt_tokens: int = 32,
        prompt_fraction: float = 0.5,
        eval_prompts: int = 256,
        eval_texts: int = 256,
        seed: int = 42,
    ) -> None:
        """
        Args:
            task: which stage to serve: language_model, reward_model or prompts.
            train_texts: reviews to draw for training.
            batch_size: rows a training batch on one process.
            eval_batch_size: rows a validation or test batch.
            tokenizer: hub id or folder; that of the model being trained by default.
            block_size: tokens of a packed block.
            max_tokens: longest text of the reward model; longer ones lose their beginning.
            max_prompt_tokens: longest prompt; longer ones lose their beginning.
            prompt_fraction: share of a review's words that makes the prompt.
            eval_prompts: prompts of a validation.
            eval_texts: human texts on which perplexity is measured, of a policy or a language model.
            seed: of the reviews and of their order.
        """
        super().__init__(
            task,
            batch_size,
            eval_batch_size,
            tokenizer,
            block_size,
            max_tokens,
            max_prompt_tokens,
            prompt_fraction,
            eval_prompts,
            eval_texts,
            None,
            seed,
        )
        check_counts("data's ", locals(), "train_texts")
        self.train_texts = train_texts

    def load(self) -> dict[str, Reviews]:
        sizes = {"train": self.train_texts, "validation": 1000, "test": 1000}
        grammar = review_grammar()
        return {
            split: Reviews(*grammar.sample(size, self.seed * 10 + SPLIT_SEEDS[split])) for split, size in sizes.items()
        }

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """The tokenizer of whole words; the grammar decides how many."""
        return toy_tokenizer(review_grammar().words)
