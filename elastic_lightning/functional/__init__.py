"""Pure functions on tensors: no model, no trainer, and no import but torch."""

from elastic_lightning.functional.advantages import gae, masked_mean, whiten, zero_padding
from elastic_lightning.functional.diversity import distinct_n, ngrams, unique_rows
from elastic_lightning.functional.frequency import jensen_shannon, token_counts
from elastic_lightning.functional.kl import (
    AdaptiveKL,
    FixedKL,
    entropy,
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    token_logprobs,
)
from elastic_lightning.functional.losses import ppo_policy_loss, ppo_value_loss
from elastic_lightning.functional.ngram import bigram_perplexity
from elastic_lightning.functional.output_layer import TokenLoss, TokenStatistics, output_loss, output_statistics
from elastic_lightning.functional.precision import at_least_float32
from elastic_lightning.functional.preference import (
    bradley_terry_loss,
    confidence_bins,
    correlation,
    correlation_sums,
    expected_calibration_error,
    right_pairs,
    wilson_interval,
)
from elastic_lightning.functional.weights import copy_, distance, first_not_finite, float32_copy, lerp_, slerp

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "TokenLoss",
    "TokenStatistics",
    "at_least_float32",
    "bigram_perplexity",
    "bradley_terry_loss",
    "confidence_bins",
    "copy_",
    "correlation",
    "correlation_sums",
    "distance",
    "distinct_n",
    "entropy",
    "exact_kl",
    "expected_calibration_error",
    "first_not_finite",
    "float32_copy",
    "gae",
    "jensen_shannon",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "lerp_",
    "masked_mean",
    "ngrams",
    "output_loss",
    "output_statistics",
    "ppo_policy_loss",
    "ppo_value_loss",
    "right_pairs",
    "slerp",
    "token_counts",
    "token_logprobs",
    "unique_rows",
    "whiten",
    "wilson_interval",
    "zero_padding",
]
