import math

import pytest
import torch

from elastic_lightning.functional import gae, masked_mean, whiten, zero_padding

LENGTHS = [5, 1, 3, 0]
MASK = torch.tensor([[step < length for step in range(5)] for length in LENGTHS])


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)


def garbage_at_padding(values):
    return values.where(MASK, float("nan"))


def test_gae_of_one_response_by_hand():
    # deltas from the end: 1 - .5 = .5;  0 + .5*.5 - 1 = -.75;  advantages: .5;  -.75 + .5*.5*.5 = -.625
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0, 9.0]]),
        torch.tensor([[1.0, 0.5, 9.0]]),
        torch.tensor([[True, True, False]]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[-0.625, 0.5, 0.0]]
    assert returns.tolist() == [[0.375, 1.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma, lam):
    rewards, values = random_batch()
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        value = [*values[row, :length].tolist(), 0.0]
        for step in range(5):
            expected = sum(
                (gamma * lam) ** (later - step) * (rewards[row, later].item() + gamma * value[later + 1] - value[later])
                for later in range(step, length)
            )
            assert advantages[row, step].item() == pytest.approx(expected, abs=1e-5)
            value_here = value[step] if step < length else 0.0
            assert returns[row, step].item() == pytest.approx(expected + value_here, abs=1e-5)


def test_gae_without_discount_returns_the_rewards_to_come():
    rewards, values = random_batch()
    _, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert returns[0, 1].item() == pytest.approx(sum(rewards[0, 1:].tolist()), abs=1e-5)


def test_gae_ignores_garbage_at_padding():
    rewards, values = random_batch()
    clean = gae(rewards, values, MASK, 1.0, 0.95)
    dirty = gae(garbage_at_padding(rewards), garbage_at_padding(values), MASK, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_gae_of_bfloat16_is_computed_in_float32():
    rewards, values = (tensor.bfloat16() for tensor in random_batch())
    advantages, _ = gae(rewards, values, MASK, 1.0, 0.95)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, gae(rewards.float(), values.float(), MASK, 1.0, 0.95)[0])


def test_whiten_by_hand():
    # Valid: 1, 3, 5. Mean 3, biased variance 8/3.
    values = torch.tensor([[1.0, 3.0], [5.0, float("nan")]])
    mask = torch.tensor([[True, True], [True, False]])
    scaled = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(whiten(values, mask), torch.tensor([[-scaled, 0.0], [scaled, 0.0]]))
    torch.testing.assert_close(
        whiten(values, mask, shift_mean=False), torch.tensor([[3 - scaled, 3.0], [3 + scaled, 0.0]])
    )


def test_whiten_keeps_its_digits_beside_a_large_mean():
    values = torch.tensor([[10_000.0, 10_000.5, 10_001.0]])
    expected = 0.5 / math.sqrt(0.5 / 3)
    torch.testing.assert_close(
        whiten(values, torch.ones(1, 3, dtype=torch.bool)), torch.tensor([[-expected, 0.0, expected]])
    )


def test_whiten_of_nothing_and_of_equals_is_finite():
    assert whiten(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert whiten(torch.full((1, 3), 7.0), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0, 0.0]]


def test_whiten_reduces_the_moments_of_all_ranks():
    here, there = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    # Mean of 1, 2, 3, 6 is 3, so the other rank brings (2, 9), then (3-3)^2 + (6-3)^2.
    brought = iter([torch.tensor([2.0, 9.0]), torch.tensor(9.0)])
    whitened = whiten(here, everywhere, reduce=lambda tensor: tensor + next(brought))
    together = whiten(torch.cat([here, there]), torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(whitened, together[:1])
    assert next(brought, None) is None


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0], [5.0, float("inf"), float("nan")], [8.0, 8.0, 8.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert masked_mean(values, mask).item() == 3.5
    assert masked_mean(values, mask, dim=1).tolist() == [3.0, 5.0, 0.0]
    assert masked_mean(values, mask, dim=0).tolist() == [3.0, 2.0, 6.0]
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0


def test_masked_mean_passes_no_gradient_to_padding():
    values = torch.tensor([2.0, float("nan"), 4.0], requires_grad=True)
    masked_mean(values, torch.tensor([True, False, True])).backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_zero_padding_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3\] and \[2, 1\]"):
        zero_padding(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))
