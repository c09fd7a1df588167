"""IMDB film reviews (Maas et al., ACL 2011), in the setting of RL4LMs' sentiment task."""

from __future__ import annotations

import random

from elastic_lightning.data.files import column, read_hub, read_splits
from elastic_lightning.data.reviews import Reviews, ReviewsDataModule, Stage
from elastic_lightning.errors import UserError

TEST_REVIEWS = 5000  # of the shuffled test half, as in RL4LMs
VALIDATION_SHARE = 0.2  # of the training half, as in RL4LMs


class IMDBDataModule(ReviewsDataModule):
    """Film reviews from the hub or from files; prompts are the first half of a review's words."""

    def __init__(
        self,
        path: str | None = None,
        hub_id: str = "stanfordnlp/imdb",
        text_column: str = "text",
        label_column: str = "label",
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
        """
        Args:
            path: folder with train.* and test.* files (JSONL, CSV, both also gzipped, or Parquet), or one file; from
                the hub by default.
            hub_id: data set on the hub, where no path is given.
            text_column: name of the column of texts.
            label_column: name of the column of labels, 0 or 1 (or false, true); the reward model alone needs it.
            task: which stage to serve: language_model, reward_model or prompts.
            batch_size: rows a training batch on one process.
            eval_batch_size: rows a validation or test batch.
            tokenizer: hub id or folder; that of the model being trained by default.
            block_size: tokens of a packed block.
            max_tokens: longest text of the reward model; longer ones lose their beginning.
            max_prompt_tokens: longest prompt; longer ones lose their beginning.
            prompt_fraction: share of a review's words that makes the prompt.
            eval_prompts: prompts of a validation.
            eval_texts: human texts on which perplexity is measured, of a policy or a language model.
            limit_texts: use only so many training texts.
            seed: of the order of the data and of the split.
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
            limit_texts,
            seed,
        )
        self.path, self.hub_id, self.text_column, self.label_column = path, hub_id, text_column, label_column

    def load(self) -> dict[str, Reviews]:
        data = read_splits(self.path) if self.path is not None else read_hub(self.hub_id)
        splits = {name: self._reviews(data[name]) for name in ("train", "validation", "test") if name in data}
        train = _shuffled(splits["train"], self.seed)
        if "test" in splits:
            test = Reviews(*(part[:TEST_REVIEWS] for part in _shuffled(splits["test"], self.seed)))
        else:
            train, test = _cut(train, VALIDATION_SHARE / 2)
        if "validation" in splits:
            validation = splits["validation"]
        else:
            train, validation = _cut(train, VALIDATION_SHARE)
        return {"train": train, "validation": validation, "test": test}

    def _reviews(self, data) -> Reviews:
        texts = column(data, self.text_column, "data.init_args.text_column")
        if any(text is None for text in texts):
            raise UserError(f"the column {self.text_column!r} has empty entries: drop those rows")
        other = next((text for text in texts if not isinstance(text, str)), None)
        if other is not None:
            raise UserError(f"the column {self.text_column!r} must hold text, it holds {other!r}")
        labels = self._labels(data)
        cleaned = [" ".join(text.replace("<br />", " ").split()) for text in texts]
        keep = [index for index, text in enumerate(cleaned) if text]
        return Reviews([cleaned[index] for index in keep], [labels[index] for index in keep])

    def _labels(self, data) -> list[int]:
        """The column of labels; without one all 0, where no stage reads them."""
        if self.label_column not in data.column_names and self.task != "reward_model":
            return [0] * len(data)
        labels = column(data, self.label_column, "data.init_args.label_column")
        if all(isinstance(label, int | float) and label in (0, 1) for label in labels):
            return [int(label) for label in labels]
        held = sorted({label if isinstance(label, int | float) else str(label) for label in labels}, key=str)[:5]
        raise UserError(f"the column {self.label_column!r} must hold 0 and 1, it holds {held}")


def _shuffled(reviews: Reviews, seed: int) -> Reviews:
    order = list(range(len(reviews.texts)))
    random.Random(seed).shuffle(order)
    return Reviews([reviews.texts[index] for index in order], [reviews.labels[index] for index in order])


def _cut(reviews: Reviews, share: float) -> tuple[Reviews, Reviews]:
    """The reviews without their last share, and that share."""
    cut = len(reviews.texts) - max(1, int(len(reviews.texts) * share))
    return Reviews(*(part[:cut] for part in reviews)), Reviews(*(part[cut:] for part in reviews))
