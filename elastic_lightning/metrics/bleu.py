"""BLEU of a corpus, as sacrebleu scores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic_lightning.errors import UserError

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU


class CorpusBLEU(Metric):
    """``sacrebleu.corpus_bleu`` (Post, 2018, arXiv:1804.08771) with one reference a hypothesis, in [0, 100].

    The state is what the score is made of: matched and possible n-grams of each order and the two lengths, summed over
    batches and ranks. sacrebleu counts them and sacrebleu scores them, exponential smoothing included, where
    torchmetrics has 0 as soon as one order has no match. Texts are plain: sacrebleu tokenizes. NaN without any word.

    Args:
        lowercase: compare in lower case.
        tokenize: name of one of sacrebleu's tokenizers; "none" splits at spaces.

    Raises:
        UserError: sacrebleu is not installed, or has no tokenizer of that name.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    matches: Tensor
    ngrams: Tensor
    lengths: Tensor

    def __init__(self, lowercase: bool = True, tokenize: str = "13a", **kwargs) -> None:
        super().__init__(**kwargs)
        self.scorer = _scorer(lowercase, tokenize)
        for state, size in (("matches", 4), ("ngrams", 4), ("lengths", 2)):
            self.add_state(state, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def signature(self) -> str:
        """What has to stand beside the number: case, tokenizer, smoothing and version, in sacrebleu's words."""
        return str(self.scorer.get_signature())

    def update(self, hypotheses: list[str], references: list[str]) -> None:
        """Add B hypotheses and their B references."""
        if len(hypotheses) != len(references):
            raise ValueError(f"one reference a hypothesis: got {len(references)} for {len(hypotheses)}")
        if not hypotheses:
            return
        batch = self.scorer.corpus_score(hypotheses, [references])
        self.matches = self.matches + torch.tensor(batch.counts, device=self.device)
        self.ngrams = self.ngrams + torch.tensor(batch.totals, device=self.device)
        self.lengths = self.lengths + torch.tensor([batch.sys_len, batch.ref_len], device=self.device)

    def compute(self) -> Tensor:
        lengths = self.lengths.tolist()
        if not any(lengths):
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        score = self.scorer.compute_bleu(self.matches.tolist(), self.ngrams.tolist(), *lengths, smooth_method="exp")
        return torch.tensor(score.score, dtype=torch.float64, device=self.device)


def _scorer(lowercase: bool, tokenize: str) -> BLEU:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError("BLEU is scored by sacrebleu, which is not installed: pip install sacrebleu") from error

    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"sacrebleu has no tokenizer {tokenize!r}; it has {', '.join(BLEU.TOKENIZERS)}")
    # The signature states the number of references, which sacrebleu knows once it saw some. `force` silences its advice
    # on text that is tokenized already, which a batch is too small to tell.
    return BLEU(lowercase, force=True, tokenize=tokenize, smooth_method="exp", references=[["one a hypothesis"]])
