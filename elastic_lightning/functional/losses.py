"""The two clipped losses of PPO (Schulman et al., 2017, arXiv:1707.06347) as means over response tokens.

All tensors are [B, T] (batch, response) and aligned to the response; masks are bool. What stands at padding reaches
neither a loss nor a gradient. Sums over micro-batches are the caller's: weigh each loss by its share of valid tokens.
"""

import torch
from torch import Tensor

from elastic_lightning.functional.advantages import masked_mean, zero_padding


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, negated to be minimised.

    Args:
        logprobs: [B, T], of the response tokens under the policy in training.
        old_logprobs: [B, T], of the same tokens when they were sampled.
        advantages: [B, T], usually whitened.
        mask: bool [B, T].
        clip: the ratio counts no further than 1 - clip and 1 + clip.

    Returns:
        The loss, and the share of valid tokens whose clipped term is strictly the larger.
    """
    advantages = zero_padding(advantages, mask)
    ratio = torch.exp(zero_padding(logprobs, mask) - zero_padding(old_logprobs, mask))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(plain, clipped), mask), masked_mean(clipped > plain, mask)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the value, or of the value held near its old self, whichever is larger.

    Args:
        values: [B, T], of the value head in training.
        old_values: [B, T], of the same states when they were sampled.
        returns: [B, T], the target.
        mask: bool [B, T].
        clip: values count no further than this from the old ones, in units of reward; None does not clip.

    Returns:
        The loss, and the share of valid tokens whose clipped term is strictly the larger.
    """
    values, old_values, returns = (zero_padding(tensor, mask) for tensor in (values, old_values, returns))
    plain = (values - returns).square()
    held = values if clip is None else values.clamp(old_values - clip, old_values + clip)
    clipped = (held - returns).square()
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean(clipped > plain, mask)
