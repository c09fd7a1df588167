"""What is measured of a policy at validation: reward, and every way in which language can be lost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from elastic_lightning.functional import entropy, exact_kl, token_logprobs
from elastic_lightning.metrics import DistinctN, Mean, SequenceKL, TokenPerplexity
from elastic_lightning.policies import Responses, Texts
from elastic_lightning.ranks import sum_of_ranks


class PolicyMetrics(nn.Module):
    """Metrics over one validation, right on any number of ranks.

    - reward: mean score of sampled responses;
    - kl: exact KL to the initial policy at each sampled prefix, summed over a response (nats per sequence);
    - perplexity: of the policy on human text (forgetting);
    - sample_perplexity: of the samples under the initial policy (fluency);
    - distinct_1, 2, 3: unique n-grams among all n-grams sampled; entropy: nats per token; length: tokens; eos_rate.

    Args:
        text_metrics: further metrics with an attribute `name` and ``update(prompts, responses, complete)`` on texts.
    """

    def __init__(self, text_metrics: list[Metric] | None = None) -> None:
        super().__init__()
        self.reward = Mean()
        self.kl = SequenceKL()
        self.perplexity = TokenPerplexity()
        self.sample_perplexity = TokenPerplexity()
        self.distinct = nn.ModuleList(DistinctN(n) for n in (1, 2, 3))
        self.entropy = Mean()
        self.length = Mean()
        self.eos_rate = Mean()
        self.text_metrics = nn.ModuleList(text_metrics or [])

    def update_samples(self, responses: Responses, complete: list[bool], scores: Tensor) -> None:
        """Add B sampled responses, whether each ended by itself, and their scores [B]."""
        self.reward.update(scores)
        for metric in self.distinct:
            metric.update(responses.tokens, responses.mask)
        self.length.update(responses.mask.sum(dim=1).float())
        self.eos_rate.update(torch.tensor(complete, dtype=torch.float32, device=scores.device))

    def update_texts(self, texts: Texts) -> None:
        """Add B texts to the metrics that read texts."""
        for metric in self.text_metrics:
            metric.update(*texts)

    def update_logits(self, responses: Responses, logits: Tensor, reference_logits: Tensor, temperature: float) -> None:
        """Add B sampled responses by the logits [B, T, V] of the policy and of the initial policy."""
        scaled = logits.float() / temperature
        self.kl.update(exact_kl(scaled, reference_logits.float() / temperature), responses.mask)
        self.entropy.update(entropy(scaled)[responses.mask])
        tokens = responses.tokens.masked_fill(~responses.mask, 0)  # a pad token may lie outside the vocabulary
        self.sample_perplexity.update(-token_logprobs(reference_logits, tokens), responses.mask)

    def update_human(self, nll: Tensor, mask: Tensor | None = None) -> None:
        """Add human text by the policy's negative log-likelihood [B, L] of its tokens; `mask` leaves out padding."""
        self.perplexity.update(nll, torch.ones_like(nll, dtype=torch.bool) if mask is None else mask)

    def compute_and_reset(self) -> dict[str, float]:
        """The values of all metrics that saw data, on this rank or another; then all start anew."""
        metrics: dict[str, Metric] = {
            name: metric for name, metric in self.named_children() if isinstance(metric, Metric)
        }
        metrics |= {f"distinct_{metric.n}": metric for metric in self.distinct}
        metrics |= {metric.name: metric for metric in self.text_metrics}
        seen = sum_of_ranks(torch.tensor([int(metric.update_called) for metric in metrics.values()]))
        values = {}
        for (name, metric), ranks in zip(metrics.items(), seen.tolist(), strict=True):
            if ranks:
                values[name] = float(metric.compute())
            metric.reset()
        return values
