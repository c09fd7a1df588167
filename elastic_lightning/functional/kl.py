"""How far a policy is from its reference: estimators, exact values, and the coefficient that prices the distance.

`B` is the batch, `T` the response, `V` the vocabulary; everything is in nats. The estimators (John Schulman,
"Approximating KL Divergence", 2020) take the log-probabilities of tokens *sampled from the policy*; their mean
estimates KL(policy || reference).
"""

import math

import torch
from torch import Tensor

from elastic_lightning.functional.precision import at_least_float32


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p - log q, elementwise: unbiased, of high variance, often negative. The one to put in a reward."""
    return at_least_float32(logprobs) - at_least_float32(reference_logprobs)


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log p - log q)^2 / 2, elementwise: biased, of low variance, never negative."""
    return 0.5 * kl_k1(logprobs, reference_logprobs).square()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p), elementwise: unbiased, of low variance, never negative.

    The one to watch; its gradient is not that of the KL.
    """
    log_ratio = kl_k1(reference_logprobs, logprobs)
    # exp(x) - 1 is 0 in float32 for the small x of a policy that has hardly moved; expm1 is not.
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary: [B, T, V] twice -> [B, T], float32 whatever the input type.

    A token the policy never chooses (logit -inf) adds nothing; one that only the reference never chooses makes it inf.
    """
    logprobs = logits.float().log_softmax(-1)
    return _expectation(logprobs, logprobs - reference_logits.float().log_softmax(-1))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next token: [B, T, V] -> [B, T], float32 whatever the input type. Logits may be -inf."""
    logprobs = logits.float().log_softmax(-1)
    return _expectation(logprobs, -logprobs)


def _expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """Mean of the values [..., V] under the distribution, where 0 * inf is 0, in the gradient too."""
    probabilities = logprobs.exp()
    return (probabilities * values.masked_fill(probabilities == 0, 0.0)).sum(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the given tokens: [B, T, V] and int64 [B, T] -> [B, T], float32 whatever the input type.

    Tokens must lie in the vocabulary, at padding too (put 0 there). The whole log-softmax is never formed.
    """
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen.float() - logits.float().logsumexp(-1)


class FixedKL:
    """A KL coefficient that stays as it is.

    Args:
        coefficient: price of a nat, in units of reward.

    Raises:
        ValueError: when the coefficient is negative or not finite.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = _non_negative(coefficient)

    def update(self, kl: float | Tensor, n: int) -> None:
        """Take note of the KL of a global batch of `n` episodes, in nats a sequence.

        Raises:
            ValueError: when the KL is not finite.
        """
        _finite(kl)

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = _non_negative(state["coefficient"])


class AdaptiveKL(FixedKL):
    """A KL coefficient that steers the KL towards a target (Ziegler et al., 2019, arXiv:1909.08593, section 2.2).

    Args:
        coefficient: price of a nat at the start, in units of reward; 0 stays 0.
        target: the KL wanted, in nats a sequence.
        horizon: episodes in which the coefficient may change by about a fifth.

    Raises:
        ValueError: when the coefficient is negative, or target or horizon is not positive.
    """

    def __init__(self, coefficient: float, target: float = 6.0, horizon: int = 10_000) -> None:
        super().__init__(coefficient)
        self.target = _positive("target", target)
        self.horizon = _positive("horizon", horizon)

    def update(self, kl: float | Tensor, n: int) -> None:
        """Scale the coefficient by 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon.

        Args:
            kl: nats a sequence, mean over the global batch.
            n: episodes in the global batch.

        Raises:
            ValueError: when the KL is not finite, or the batch is so large that the coefficient could turn negative.
        """
        if n >= 5 * self.horizon:
            raise ValueError(f"a batch of {n} episodes needs a KL horizon above {n / 5:g}, got {self.horizon:g}")
        error = min(max(_finite(kl) / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * n / self.horizon


def _finite(kl: float | Tensor) -> float:
    if not math.isfinite(kl):
        raise ValueError(f"the KL to the reference must be finite, got {float(kl)}")
    return float(kl)


def _non_negative(coefficient: float) -> float:
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"the KL coefficient must be finite and not negative, got {coefficient}")
    return float(coefficient)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"the KL {name} must be finite and positive, got {value}")
    return value
