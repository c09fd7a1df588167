"""Chunked statistics and losses against the plain [N, V] computation in float64 and its automatic gradients."""

import pytest
import torch

from elastic_lightning.functional import entropy, output_layer, output_loss, output_statistics, token_logprobs

N, H, V = 13, 8, 29


@pytest.fixture(
    params=[(4, 1), (5, 3), (N, 4), (N, N), (10**6, 10**6)], ids="chunks of {0[0]}, blocks of {0[1]}".format
)
def chunked(request, monkeypatch):
    chunk, block = request.param
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", 4 * V * chunk)
    monkeypatch.setattr(output_layer, "BLOCK_BYTES", 4 * V * block)


def case(bias=True, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(V, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, V, (N,), generator=generator)


def plain(hidden, weight, bias, tokens, temperature):
    logits = hidden.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def a_loss(old, advantages, entropy_coefficient):
    """A clipped surrogate, with every token weighed differently."""

    def loss(logprobs, entropies, part):
        ratio = (logprobs - old[part]).exp()
        surrogate = torch.minimum(ratio * advantages[part], ratio.clamp(0.8, 1.2) * advantages[part])
        total = -surrogate.sum()
        return total - (entropy_coefficient * advantages[part] * entropies).sum() if entropy_coefficient else total

    return loss


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_statistics_are_those_of_the_whole_softmax(chunked, bias, temperature):
    hidden, weight, offset, tokens = case(bias)
    statistics = output_statistics(hidden, weight, offset, tokens, temperature)
    logprobs, entropies = plain(hidden, weight, offset, tokens, temperature)
    torch.testing.assert_close(statistics.logprobs.double(), logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.entropy.double(), entropies, atol=1e-5, rtol=0)
    assert not statistics.logprobs.requires_grad
    logits = torch.nn.functional.linear(hidden, weight, offset) / temperature
    torch.testing.assert_close(statistics.logprobs, token_logprobs(logits, tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(statistics.entropy, entropy(logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_plain_loss(chunked, bias, temperature, entropy_coefficient):
    hidden, weight, offset, tokens = case(bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        old = plain(hidden, weight, offset, tokens, temperature)[0].float()
        old += 0.3 * torch.randn(N, generator=generator)
    loss = a_loss(old, torch.randn(N, generator=generator), entropy_coefficient)
    inputs = [tensor for tensor in (hidden, weight, offset) if tensor is not None]

    expected = loss(*plain(hidden, weight, offset, tokens, temperature), slice(None))
    gradients = torch.autograd.grad(0.1 * expected, inputs)
    total, statistics = output_loss(hidden, weight, offset, tokens, loss, temperature)
    ours = torch.autograd.grad(0.1 * total, inputs)

    assert total.item() == pytest.approx(expected.item(), abs=1e-5)
    assert not statistics.logprobs.requires_grad and not statistics.entropy.requires_grad
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)
    assert min(gradient.abs().max() for gradient in gradients) > 1e-3


def test_only_what_needs_a_gradient_gets_one(chunked):
    hidden, weight, _, tokens = case(bias=False)
    weight = weight.detach()
    total, _ = output_loss(hidden, weight, None, tokens, a_loss(torch.zeros(N) - 3, torch.ones(N), 0.0))
    total.backward()
    assert hidden.grad.abs().max() > 0 and weight.grad is None
    with torch.no_grad():
        alone, _ = output_loss(hidden, weight, None, tokens, a_loss(torch.zeros(N) - 3, torch.ones(N), 0.0))
    assert not alone.requires_grad and alone.item() == pytest.approx(total.item(), abs=1e-6)


def test_a_second_backward_pass_is_refused():
    hidden, weight, _, tokens = case(bias=False)
    total, _ = output_loss(hidden, weight, None, tokens, a_loss(torch.zeros(N) - 3, torch.ones(N), 0.0))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        total.backward()


def test_under_autocast_statistics_are_float32_and_gradients_have_their_tensors_type(chunked):
    hidden, weight, _, tokens = case(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        total, statistics = output_loss(hidden, weight, None, tokens, a_loss(torch.zeros(N) - 3, torch.ones(N), 0.1))
    total.backward()
    assert {total.dtype, statistics.logprobs.dtype, statistics.entropy.dtype} == {torch.float32}
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float()  # what a linear layer gives under autocast
    torch.testing.assert_close(statistics.logprobs, token_logprobs(rounded, tokens), atol=1e-5, rtol=0)
    logprobs, _ = plain(hidden, weight, None, tokens, 1.0)
    assert (statistics.logprobs - logprobs).abs().max() > 1e-4, "the case should show that the product was rounded"
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_bfloat16_weights(chunked):
    hidden, weight, offset, tokens = case(dtype=torch.bfloat16)
    loss = a_loss(torch.zeros(N) - 3, torch.ones(N), 0.1)
    total, _ = output_loss(hidden, weight, offset, tokens, loss)
    ours = torch.autograd.grad(total, (hidden, weight, offset))
    expected = torch.autograd.grad(
        loss(*plain(hidden, weight, offset, tokens, 1.0), slice(None)), (hidden, weight, offset)
    )
    for gradient, other in zip(ours, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient - other).abs().max() < 0.03 * other.abs().max()


def test_a_sum_over_many_tokens_does_not_overflow_float16():
    """The head's gradient is a sum over tokens until `backward` scales it."""
    count = 2500
    hidden = torch.full((count, 1), 40.0, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0], [0.01]], dtype=torch.float16, requires_grad=True)
    loss = lambda logprobs, entropies, part: -logprobs.sum()  # noqa: E731
    total, _ = output_loss(hidden, weight, None, torch.zeros(count, dtype=torch.int64), loss)
    (total / count).backward()
    expected = 40 * torch.tensor([[0.0], [0.01]]).mul(40).softmax(0)[1]
    torch.testing.assert_close(weight.grad.float(), torch.stack([-expected, expected]), rtol=1e-2, atol=0)


def test_a_default_type_of_bfloat16_leaves_statistics_float32():
    """As under Lightning's precision bf16-true."""
    hidden, weight, _, tokens = case(bias=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = a_loss(torch.zeros(N, dtype=torch.float32) - 3, torch.ones(N, dtype=torch.float32), 0.0)
        total, statistics = output_loss(hidden, weight, None, tokens, loss)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {total.dtype, statistics.logprobs.dtype, statistics.entropy.dtype} == {torch.float32}


def test_no_tokens():
    hidden, weight, offset, tokens = case()
    total, statistics = output_loss(
        hidden[:0], weight, offset, tokens[:0], lambda logprobs, entropies, part: logprobs.sum()
    )
    total.backward()
    assert total == 0 and statistics.logprobs.shape == (0,) and not weight.grad.any()


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((2, 1), 100.0), torch.tensor([[1.0], [-1.0], [0.5]])
    statistics = output_statistics(hidden, weight, None, torch.tensor([0, 1]))
    assert statistics.logprobs.tolist() == pytest.approx([0.0, -200.0])
    assert statistics.entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
