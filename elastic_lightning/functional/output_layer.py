"""Statistics and losses of tokens from the hidden states that predict them, a chunk of tokens at a time.

The logits of a whole batch in float32, [B, T, V], are the largest tensor of a PPO update: 600 MB for 64 responses of 48
tokens over a vocabulary of 50,000. Here only those of one chunk exist, in the type of the matrix products; everything
behind these is float32, on a CPU for a block of rows at a time, small enough for its cache. `N` counts the valid tokens
of a batch, `H` is the width of the hidden states, `V` the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# (logprobs [n], entropy [n], which of the N tokens they are) -> a scalar to be *summed* over the chunks.
TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]

CHUNK_BYTES = 2**27  # of logits: 128 MB make the matrix products efficient
CHUNK_BYTES_ACCELERATOR = 2**29
WEIGHT_ROWS = 2**12  # of the weight's gradient in one matrix product, on a CPU
COLUMNS = 512  # of logits in one float32 matrix product, on a CPU
BLOCK_BYTES = 2**22  # of float32 logits that stand between two matrix products at a time, on a CPU


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
    parts = []
    for chunk in _chunks(len(tokens), weight):
        logits = _logits(hidden[chunk], weight, bias)
        parts += [_Block(logits[rows], tokens[chunk][rows], temperature).statistics() for rows in _blocks(logits)]
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


class _Block:
    """The logits of n tokens and what follows from them; one exponential a logit. Takes the logits it is given."""

    def __init__(self, logits: Tensor, tokens: Tensor, temperature: float) -> None:
        self.tokens, self.temperature = tokens[:, None], temperature
        logits = logits.float()
        if temperature != 1:
            logits /= temperature
        logits -= logits.amax(dim=-1, keepdim=True)
        self.logits = logits  # [n, V], the largest of each row 0
        self.weights = logits.exp()  # [n, V], proportional to the probabilities
        self.total = self.weights.sum(dim=-1)  # [n], 1 or more

    def statistics(self) -> TokenStatistics:
        log_total = self.total.log()
        logprobs = self.logits.gather(-1, self.tokens).squeeze(-1) - log_total
        mean = torch.linalg.vecdot(self.weights, self.logits) / self.total
        return TokenStatistics(logprobs, log_total - mean)

    def logit_gradient(self, statistics: TokenStatistics, logprob: Tensor, entropy: Tensor | None) -> Tensor:
        """Gradient [n, V] to the unscaled logits from those to the statistics [n]; takes this block's tensors."""
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
        gradients = _Gradients(hidden, own_weight, ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts = []
        for chunk in _chunks(len(tokens), own_weight):
            logits = _logits(hidden[chunk], own_weight, own_bias)
            for rows in _blocks(logits):
                part = slice(chunk.start + rows.start, chunk.start + rows.stop)
                block = _Block(logits[rows], tokens[part], temperature)
                statistics = block.statistics()
                value, slopes = _differentiate(loss, statistics, part)
                total += value
                parts.append(statistics)
                if any(ctx.needs_input_grad):
                    logits[rows] = block.logit_gradient(statistics, *slopes)
            gradients.add(logits, chunk)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.gradients = gradients.all()
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


class _Gradients:
    """Gradients to hidden states, weight and bias, those that are needed, summed over chunks in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> None:
        self.hidden, self.weight = hidden, weight
        self.to_hidden_needed, self.to_weight_needed, self.to_bias_needed = needed[:3]
        self.to_hidden: list[Tensor] = []
        self.to_weight: Tensor | None = None
        self.to_bias: Tensor | None = None

    def add(self, logit_gradient: Tensor, chunk: slice) -> None:
        """Add those of one chunk's logits [n, V]."""
        dtype = logit_gradient.dtype
        with torch.autocast(logit_gradient.device.type, enabled=False):
            if self.to_hidden_needed:
                self.to_hidden.append((logit_gradient @ self.weight.to(dtype)).float())
            if self.to_weight_needed:
                self._add_to_weight(logit_gradient, self.hidden[chunk].to(dtype))
            if self.to_bias_needed:
                total = logit_gradient.sum(dim=0, dtype=torch.float32)
                self.to_bias = total if self.to_bias is None else self.to_bias.add_(total)

    def _add_to_weight(self, logit_gradient: Tensor, states: Tensor) -> None:
        first = self.to_weight is None
        if first:
            size = logit_gradient.shape[1], states.shape[1]
            self.to_weight = torch.empty(size, dtype=torch.float32, device=states.device)
        rows = WEIGHT_ROWS if states.device.type == "cpu" else len(self.to_weight)
        for part, columns in zip(self.to_weight.split(rows), logit_gradient.split(rows, dim=1), strict=True):
            product = columns.T @ states  # of so few rows that a CPU's cache holds it
            part.copy_(product) if first else part.add_(product)

    def all(self) -> list[Tensor | None]:
        """In the order of the inputs; None where none is needed."""
        return [torch.cat(self.to_hidden) if self.to_hidden else None, self.to_weight, self.to_bias]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [n, V] in the type of the weight; float32 for float16, whose gradients (sums that are scaled only in the
    backward pass) would overflow."""
    hidden = hidden.to(weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            return _logits_by_columns(hidden, weight, bias)
        logits = F.linear(hidden, weight, bias)
    return logits.float() if logits.dtype == torch.float16 else logits


def _logits_by_columns(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for a weight with many more rows than columns, in float32 on a CPU: in one product its libraries reach
    two thirds of the speed that they have on parts of the vocabulary."""
    logits = hidden.new_empty(len(hidden), len(weight))
    for columns, rows in zip(logits.split(COLUMNS, dim=1), weight.split(COLUMNS), strict=True):
        torch.mm(hidden, rows.T, out=columns)
    return logits if bias is None else logits.add_(bias)


def _in_compute_dtype(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The output layer in autocast's type where that is on: cast once, not once a chunk."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def _chunks(tokens: int, weight: Tensor) -> Iterator[slice]:
    """Even slices of as many tokens as the chunk's logits allow; one empty slice when there are none."""
    budget = CHUNK_BYTES if weight.device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
    return _even_slices(tokens, budget // (weight.element_size() * weight.shape[0]))


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Even slices of rows that a CPU's cache holds; all rows elsewhere."""
    rows, vocabulary = logits.shape
    return _even_slices(rows, BLOCK_BYTES // (4 * vocabulary) if logits.device.type == "cpu" else rows)


def _even_slices(length: int, largest: int) -> Iterator[slice]:
    count = max(1, -(-length // max(1, largest)))
    for index in range(count):
        yield slice(index * length // count, (index + 1) * length // count)
