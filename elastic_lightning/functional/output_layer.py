"""Statistics and losses of tokens from the hidden states that predict them, a chunk of tokens at a time.

The logits of a whole batch in float32, [B, T, V], are the largest tensor of a PPO update: 600 MB for 64 responses of 48
tokens over a vocabulary of 50,000. Here only those of one chunk exist. `N` counts the valid tokens of a batch, `H` is
the width of the hidden states, `V` the vocabulary. Everything behind the matrix products is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# (logprobs [n], entropy [n], which of the N tokens they are) -> a scalar to be *summed* over the chunks.
TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]

CHUNK_LOGITS = 2**23  # on a CPU, where a chunk should fit the cache: 32 MB
CHUNK_LOGITS_ACCELERATOR = 2**27  # 512 MB: large enough to keep the matrix units busy


class TokenStatistics(NamedTuple):
    """Log-probability of each token and entropy of the distribution it was drawn from, float32, in nats."""

    logprobs: Tensor
    entropy: Tensor


@torch.no_grad()
def output_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float = 1.0
) -> TokenStatistics:
    """Statistics [N] of `tokens` int64 [N] under softmax((hidden @ weight.T + bias) / temperature); no gradient.

    Args:
        hidden: [N, H], the states that predict the tokens.
        weight: [V, H], of the output layer.
        bias: [V] or None.
        tokens: [N], in the vocabulary.
        temperature: divides the logits.
    """
    weight, bias = _in_compute_dtype(weight, bias)
    parts = [
        _Chunk(hidden[part], weight, bias, tokens[part], temperature).statistics()
        for part in _chunks(len(tokens), weight)
    ]
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def output_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, loss: TokenLoss, temperature: float = 1.0
) -> tuple[Tensor, TokenStatistics]:
    """A loss of the statistics of `output_statistics`, with gradients to hidden states, weight and bias.

    The gradients are made in the forward pass, while the chunk's logits are there: nothing is computed twice and
    nothing of size V is kept for the backward pass but the gradient of the weight. So `loss` must be a sum over tokens
    of functions of each token's own statistics, and the result can be differentiated once. (The idea is that of
    Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989, for any loss of a token.)

    Returns:
        The sum of `loss` over the chunks (a scalar with gradient) and the statistics [N] without.
    """
    total, logprobs, entropy = _OutputLoss.apply(hidden, weight, bias, tokens, loss, temperature)
    return total, TokenStatistics(logprobs, entropy)


class _Chunk:
    """The logits of n tokens and what follows from them; one exponential a logit."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float) -> None:
        self.tokens, self.temperature = tokens[:, None], temperature
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.to(weight.dtype), weight, bias).float()
        if temperature != 1:
            logits /= temperature
        logits -= logits.amax(dim=-1, keepdim=True)
        self.logits = logits  # [n, V], the largest of each row 0
        self.weights = logits.exp()  # [n, V], proportional to the probabilities
        self.total = self.weights.sum(dim=-1)  # [n], 1 or more

    def statistics(self) -> TokenStatistics:
        log_total = self.total.log()
        logprobs = self.logits.gather(-1, self.tokens).squeeze(-1) - log_total
        # A batched product sums on the way, where weights * logits would be one more tensor of this size.
        mean = torch.bmm(self.weights[:, None], self.logits[:, :, None]).flatten() / self.total
        return TokenStatistics(logprobs, log_total - mean)

    def logit_gradient(self, statistics: TokenStatistics, logprob: Tensor, entropy: Tensor | None) -> Tensor:
        """Gradient [n, V] to the unscaled logits from those to the statistics [n]; takes this chunk's tensors."""
        if entropy is None:
            gradient = self.weights.mul_((-logprob / self.total)[:, None])
        else:  # d entropy / d logit = -p * (log p + entropy)
            shift = (self.total.log() - statistics.entropy)[:, None]
            factor = self.logits.sub_(shift).mul_(-entropy[:, None]).sub_(logprob[:, None])
            gradient = self.weights.mul_(factor).div_(self.total[:, None])
        gradient.scatter_add_(-1, self.tokens, logprob[:, None])
        return gradient.div_(self.temperature) if self.temperature != 1 else gradient


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, loss, temperature):
        own_weight, own_bias = _in_compute_dtype(weight, bias)
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts = []
        for part in _chunks(len(tokens), weight):
            chunk = _Chunk(hidden[part], own_weight, own_bias, tokens[part], temperature)
            statistics = chunk.statistics()
            value, slopes = _differentiate(loss, statistics, part)
            total += value
            parts.append(statistics)
            if any(ctx.needs_input_grad):
                gradient = chunk.logit_gradient(statistics, *slopes)
                _add_gradients(gradients, gradient, hidden, own_weight, part)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.gradients = gradients
        logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(logprobs, entropy)
        return total, logprobs, entropy

    @staticmethod
    def backward(ctx, outer, *_):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of output_loss were used up by an earlier backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(outer).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _differentiate(loss: TokenLoss, statistics: TokenStatistics, part: slice) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of a chunk and its gradients to logprobs and entropy (None where it does not depend on the entropy)."""
    leaves = [tensor.detach().requires_grad_() for tensor in statistics]
    with torch.enable_grad():
        value = loss(*leaves, part)
    logprob, entropy = torch.autograd.grad(value, leaves, allow_unused=True)
    if logprob is None:
        logprob = torch.zeros_like(statistics.logprobs)
    return value.detach(), [logprob, entropy]


def _add_gradients(
    gradients: list[Tensor | None], logit_gradient: Tensor, hidden: Tensor, weight: Tensor, part: slice
) -> None:
    to_hidden, to_weight, to_bias = gradients
    if to_bias is not None:
        to_bias += logit_gradient.sum(dim=0)
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float16:  # a sum over tokens, not yet scaled: float16 would overflow
            weight = weight.float()
        logit_gradient = logit_gradient.to(weight.dtype)
        if to_hidden is not None:
            to_hidden[part] = (logit_gradient @ weight).to(to_hidden.dtype)
        if to_weight is not None:
            states = hidden[part].to(weight.dtype)
            if weight.dtype == torch.float32:
                to_weight.addmm_(logit_gradient.T, states)
            else:
                to_weight += logit_gradient.T @ states


def _in_compute_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The output layer in autocast's type where that is on: cast once, not once a chunk."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def _chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    """Slices of as many tokens as the chunk's logits allow; one empty slice when there are none."""
    budget = CHUNK_LOGITS if weight.device.type == "cpu" else CHUNK_LOGITS_ACCELERATOR
    size = max(1, budget // weight.shape[0])
    for start in range(0, max(tokens, 1), size):
        yield slice(start, min(start + size, tokens))
