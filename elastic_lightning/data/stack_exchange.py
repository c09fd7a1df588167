"""Stack Exchange questions with ranked answers, served for the three stages of a chatbot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from elastic_lightning.checks import check_counts
from elastic_lightning.data.dialogue import AsRewardsRead, ChatTemplate, Dialogue, QuestionAnswer
from elastic_lightning.data.module import TextDataModule
from elastic_lightning.data.preferences import Preference, encode_pairs, preference_batch
from elastic_lightning.data.question_sources import read_questions
from elastic_lightning.data.questions import Question, Shares
from elastic_lightning.data.reviews import pack
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import PreferenceBatch, Prompts, Seq2SeqLM, pad
from elastic_lightning.policies.special_tokens import Frame

PART_OF_TASK = {"supervised": "supervised", "pairs": "reward", "prompts": "rl"}
CHOICES = {
    "task": PART_OF_TASK,
    "part": PART_OF_TASK.values(),
    "prompt_format": ("question_answer", "chat"),
    "overlong": ("drop", "truncate"),
}


class StackExchangeDataModule(TextDataModule):
    """Questions from the hub or from files, of which no stage sees another one's.

    Rows hold ``question, response_j, response_k``, as in `lvwerra/stack-exchange-paired`, and perhaps
    ``score_j, score_k``; or ``question, answers``, best first. The columns tell which. Validation and test are halves
    of the held-out questions, and equal questions are one question. Streams of the hub are read in their order until
    there are enough questions; from there on they are lists as all other data, so that any rank and any resumed run
    finds the same rows. What the tokenizer puts before a text stands before each text and each prompt.

    Batches:
        supervised: tokens [B, block_size], texts packed end to end with eos between them; all tokens are targets;
        pairs: `PreferenceBatch`;
        prompts: `Prompts`, questions of max_prompt_tokens or fewer, left-padded. Validation adds batches of packed
            human text [B, block_size], on which the policy's perplexity is measured; for an encoder-decoder
            `PairedTexts` of questions and the first block_size tokens of answers.
    """

    def __init__(
        self,
        path: str | None = None,
        hub_id: str = "lvwerra/stack-exchange-paired",
        task: Literal["supervised", "pairs", "prompts"] = "prompts",
        part: Literal["supervised", "reward", "rl"] | None = None,
        shares: Shares = Shares(),  # noqa: B008 (frozen)
        prompt_format: Literal["question_answer", "chat"] = "question_answer",
        special_tokens: bool = False,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        tokenizer: str | None = None,
        block_size: int = 1024,
        max_tokens: int = 512,
        overlong: Literal["drop", "truncate"] = "drop",
        max_prompt_tokens: int = 512,
        per_question: int | None = None,
        limit_questions: int | None = 100_000,
        eval_questions: int = 1000,
        eval_prompts: int = 256,
        eval_texts: int = 256,
        seed: int = 42,
    ) -> None:
        """
        Args:
            path: a file (JSONL, CSV, both also gzipped, or Parquet), a folder of such files, or a local copy of the
                hub's data set with its folders data/finetune, data/reward, data/rl and data/evaluation; from the hub
                by default.
            hub_id: data set on the hub, where no path is given.
            task: which stage to serve: supervised, pairs or prompts.
            part: whose share of the questions; that of the task by default: supervised, reward or rl.
            shares: how files are shared out, by a hash of the question's text; the same in all stages. The hub's data
                set has parts of its own.
            prompt_format: "Question: …\\n\\nAnswer: …" or the tokenizer's chat template.
            special_tokens: keep the chat template's special tokens in pairs, for a reward that reads them (its option
                of this name).
            batch_size: rows a training batch on one process.
            eval_batch_size: rows a validation or test batch.
            tokenizer: hub id or folder; that of the model being trained by default.
            block_size: tokens of a packed block.
            max_tokens: longest text of a pair, prompt and answer.
            overlong: what becomes of a pair with a longer text: it is dropped, or its texts lose their beginning.
            max_prompt_tokens: longest prompt; longer questions are left out.
            per_question: at most so many pairs of each question, drawn at random, or supervised answers, the first
                ones. All by default, which of ranked answers are the pairs of the best and each other one, and the
                best as the supervised answer.
            limit_questions: use only the first so many training questions.
            eval_questions: questions of the validation, and as many of the test.
            eval_prompts: prompts of a validation.
            eval_texts: human texts on which perplexity is measured, of a policy or a language model.
            seed: of the order of the data and of the draw of pairs.
        """
        super().__init__(tokenizer, seed)
        sizes = ("batch_size", "eval_batch_size", "block_size", "max_tokens", "max_prompt_tokens", "per_question")
        sizes += ("limit_questions", "eval_questions", "eval_prompts", "eval_texts")
        check_counts("data's ", locals(), *sizes)
        check_counts("data's ", locals(), "block_size", least=2)  # the first token of a block has none before it
        part = part or PART_OF_TASK.get(task)
        for name, choices in CHOICES.items():
            if locals()[name] not in choices:
                raise UserError(f"data's {name} must be one of {', '.join(choices)}, got {locals()[name]}")
        self.path, self.hub_id, self.task, self.shares = path, hub_id, task, shares
        self.part, self.prompt_format, self.special_tokens = part, prompt_format, special_tokens
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_prompt_tokens = max_prompt_tokens if task == "prompts" else None  # a policy checks it
        self.block_size, self.max_tokens, self.overlong = block_size, max_tokens, overlong
        self.per_question, self.limit_questions, self.eval_questions = per_question, limit_questions, eval_questions
        self.eval_prompts, self.eval_texts = eval_prompts, eval_texts
        self.splits: dict[str, list[Question]] = {}
        self._rows: dict[Any, Any] = {}

    def load(self) -> dict[str, list[Question]]:
        """The questions of train, validation and test, read from where they lie."""
        return read_questions(self.path, self.hub_id, self.part, self.shares, self.limit_questions, self.eval_questions)

    def train_tokenizer(self, vocabulary: int) -> PreTrainedTokenizerBase:
        """A tokenizer for this text: byte-level BPE of the given size, trained on this part's questions and answers."""
        return train_bpe(_texts(QuestionAnswer(), self.load()["train"], self.per_question), vocabulary)

    # Lightning --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if not self.splits:
            self.splits = self.load()
        self.tokenizer = self.find_tokenizer()
        self.dialogue = ChatTemplate(self.tokenizer) if self.prompt_format == "chat" else QuestionAnswer()
        self._rows = {}
        if stage == "fit":
            self._check_size()

    def train_dataloader(self) -> DataLoader:
        return self.dataloader(self._task_rows("train"), self.batch_size, shuffle=True, collate=self._collate)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation("validation")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        return self._evaluation_loader("test")

    # The three tasks --------------------------------------------------------------------------------------------

    def packed(self, split: str, texts: int | None = None) -> Tensor:
        """Blocks [N, block_size] of the split's first `texts` texts, end to end with eos between them."""
        key = ("packed", split, texts)
        if key not in self._rows:
            written = _texts(self.dialogue, self.splits[split], self.per_question)[:texts]
            self._rows[key] = pack(self.tokenizer, written, self.block_size)
        return self._rows[key]

    def prompts(self, split: str) -> list[list[int]]:
        """Token ids of the split's prompts of max_prompt_tokens or fewer."""
        if ("prompts", split) not in self._rows:
            texts = [self.dialogue.prompt(question.text) for question in self.splits[split]]
            rows = self.encode_prompts(texts)
            kept = [ids for ids in rows if len(ids) <= self.max_prompt_tokens]
            long = f"{split} questions longer than {self.max_prompt_tokens} tokens"
            _tell(kept, len(rows) - len(kept), f"{long}, left out", "raise data's max_prompt_tokens")
            self._rows["prompts", split] = kept
        return self._rows["prompts", split]

    def pairs(self, split: str) -> list[Preference]:
        """The split's pairs, of which no text is longer than max_tokens."""
        if ("pairs", split) not in self._rows:
            read = self.dialogue
            if self.prompt_format == "chat":
                read = AsRewardsRead(read, self.tokenizer, self.special_tokens)
            rows = encode_pairs(self.tokenizer, read, self.splits[split], self.per_question, self.seed)
            if not rows:
                raise UserError(f"no {split} question has two different answers, and a reward model learns from pairs")
            short = [row for row in rows if row.longest() <= self.max_tokens]
            kept = short if self.overlong == "drop" else self._shortened(rows)
            done = "left out" if self.overlong == "drop" else "cut at the beginning"
            long = f"{split} pairs with a text longer than {self.max_tokens} tokens"
            _tell(kept, len(rows) - len(short), f"{long}, {done}", "raise data's max_tokens")
            self._rows["pairs", split] = kept
        return self._rows["pairs", split]

    def _shortened(self, rows: list[Preference]) -> list[Preference]:
        frame = Frame.of(self.tokenizer)
        return [row.shortened(self.max_tokens, frame) for row in rows]

    def _task_rows(self, split: str) -> Any:
        if self.task == "supervised":
            return self.packed(split, None if split == "train" else self.eval_texts)
        return self.pairs(split) if self.task == "pairs" else self.prompts(split)

    def _evaluation(self, split: str) -> DataLoader | list[DataLoader]:
        loader = self._evaluation_loader(split)
        if self.task != "prompts":
            return loader
        return [loader, self._human_text(split)]

    def _human_text(self, split: str) -> DataLoader:
        """What a policy's perplexity is measured on."""
        if not isinstance(self.policy, Seq2SeqLM):
            return self.dataloader(self.packed(split, self.eval_texts), self.eval_batch_size, False, torch.stack)
        answered = ((q.text, answer) for q in self.splits[split] for answer in q.answers[: self.per_question])
        pairs = [(self.dialogue.prompt(asked), answer) for asked, answer in answered][: self.eval_texts]
        return self.human_pairs(pairs, self.eval_batch_size, self.max_prompt_tokens, self.block_size)

    def _evaluation_loader(self, split: str) -> DataLoader:
        rows = self._task_rows(split)[: self.eval_prompts if self.task == "prompts" else None]
        return self.dataloader(rows, self.eval_batch_size, shuffle=False, collate=self._collate)

    def _collate(self, rows: list[Any]) -> Tensor | PreferenceBatch | Prompts:
        if self.task == "supervised":
            return torch.stack(rows)
        if self.task == "pairs":
            return preference_batch(rows, self.tokenizer.pad_token_id)
        return Prompts(*pad(rows, self.tokenizer.pad_token_id, left=True))

    def _check_size(self) -> None:
        rows, needed = len(self._task_rows("train")), self.batch_size * self.process[1]
        if rows < needed:
            raise UserError(
                f"the training data has {rows} rows, less than one batch of {needed}: lower data's batch_size"
            )


def _texts(dialogue: Dialogue, questions: Sequence[Question], per_question: int | None) -> list[str]:
    """Questions with their good answers, the first so many of each."""
    return [
        dialogue.text(question.text, answer) for question in questions for answer in question.answers[:per_question]
    ]


def _tell(kept: list[Any], changed: int, what: str, remedy: str) -> None:
    """Say how many rows are not as they were.

    Raises:
        UserError: no row is left.
    """
    if not kept:
        raise UserError(f"all {changed} {what}: {remedy}")
    if changed:
        rank_zero_info(f"{changed} {what} ({len(kept)} remain)")
