import math

import pytest
import torch

from elastic_lightning.functional import ppo_policy_loss, ppo_value_loss

LENGTHS = [4, 1, 3, 0]
MASK = torch.tensor([[step < length for step in range(4)] for length in LENGTHS])
VALID = [(row, step) for row, length in enumerate(LENGTHS) for step in range(length)]


def random_tensors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 4, generator=generator) for _ in range(count)]


def policy_oracle(logprobs, old_logprobs, advantages, clip):
    losses, clipped_count = [], 0
    for at in VALID:
        ratio, advantage = math.exp(logprobs[at] - old_logprobs[at]), advantages[at].item()
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        losses.append(-min(ratio * advantage, bounded * advantage))
        clipped_count += bounded * advantage < ratio * advantage
    return sum(losses) / len(VALID), clipped_count / len(VALID)


def value_oracle(values, old_values, returns, clip):
    losses, clipped_count = [], 0
    for at in VALID:
        value, old, target = values[at].item(), old_values[at].item(), returns[at].item()
        held = old + min(max(value - old, -clip), clip)
        losses.append(max((value - target) ** 2, (held - target) ** 2) / 2)
        clipped_count += abs(held - target) > abs(value - target)
    return sum(losses) / len(VALID), clipped_count / len(VALID)


def gradient(loss_function, leaf, *others):
    leaf = leaf.clone().requires_grad_()
    loss, _ = loss_function(leaf, *others)
    loss.backward()
    return loss.detach(), leaf.grad


def garbage_at_padding(values, garbage):
    return values.where(MASK, garbage)


def test_policy_loss_by_hand():
    # Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1 and clip 0.2: terms -1.2, 2, -0.5, 0.8.
    logprobs = torch.tensor([[2.0, 2.0, 0.5, 0.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, clip_fraction = ppo_policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, clip=0.2)
    assert loss.item() == pytest.approx((-1.2 + 2.0 - 0.5 + 0.8) / 4)
    assert clip_fraction.item() == 0.5


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_loss_against_a_loop(clip):
    logprobs, old_logprobs, advantages = random_tensors(3)
    loss, clip_fraction = ppo_policy_loss(logprobs, old_logprobs, advantages, MASK, clip)
    assert (loss.item(), clip_fraction.item()) == pytest.approx(policy_oracle(logprobs, old_logprobs, advantages, clip))


def test_policy_gradient_at_ratio_one_is_the_negated_advantage():
    logprobs, advantages = random_tensors(2)
    _, grad = gradient(ppo_policy_loss, logprobs, logprobs, advantages, MASK, 0.2)
    torch.testing.assert_close(grad, torch.where(MASK, -advantages / len(VALID), 0.0))


def test_clipped_tokens_have_no_gradient():
    mask = torch.ones(1, 2, dtype=torch.bool)
    _, grad = gradient(ppo_policy_loss, torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), mask, 0.2)
    assert grad[0, 0] == 0
    assert grad[0, 1].item() == pytest.approx(math.e / 2)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_garbage_at_padding_reaches_neither_losses_nor_gradients(garbage):
    tensors = random_tensors(3)
    dirty = [garbage_at_padding(tensor, garbage) for tensor in tensors]
    for loss_function in (ppo_policy_loss, ppo_value_loss):
        loss, grad = gradient(loss_function, *tensors, MASK, 0.2)
        dirty_loss, dirty_grad = gradient(loss_function, *dirty, MASK, 0.2)
        assert torch.equal(loss, dirty_loss)
        assert torch.equal(grad, dirty_grad)
        assert not grad[~MASK].any()


def test_value_loss_by_hand():
    # Old value 0, clip 0.5. Value 1 for return 2: held at 0.5, (1.5)^2 > 1. Value 1 for return 0: plain 1 > 0.25.
    loss, clip_fraction = ppo_value_loss(
        torch.tensor([[1.0, 1.0]]),
        torch.zeros(1, 2),
        torch.tensor([[2.0, 0.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        clip=0.5,
    )
    assert loss.item() == pytest.approx(0.5 * (2.25 + 1.0) / 2)
    assert clip_fraction.item() == 0.5


@pytest.mark.parametrize("clip", [0.1, 0.2, 1.0])
def test_value_loss_against_a_loop(clip):
    values, old_values, returns = random_tensors(3)
    loss, clip_fraction = ppo_value_loss(values, old_values, returns, MASK, clip)
    assert (loss.item(), clip_fraction.item()) == pytest.approx(value_oracle(values, old_values, returns, clip))


def test_value_loss_without_clip_is_half_the_squared_error():
    values, old_values, returns = random_tensors(3)
    loss, clip_fraction = ppo_value_loss(values, old_values, returns, MASK, clip=None)
    expected = sum((values[at].item() - returns[at].item()) ** 2 for at in VALID) / len(VALID) / 2
    assert loss.item() == pytest.approx(expected)
    assert clip_fraction.item() == 0


def test_bfloat16_losses_are_computed_in_float32():
    tensors = [tensor.bfloat16() for tensor in random_tensors(3)]
    for loss_function in (ppo_policy_loss, ppo_value_loss):
        loss, _ = loss_function(*tensors, MASK, 0.2)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, loss_function(*(tensor.float() for tensor in tensors), MASK, 0.2)[0])


def test_a_batch_without_valid_tokens_has_loss_zero_and_a_gradient():
    tensors = random_tensors(3)
    for loss_function in (ppo_policy_loss, ppo_value_loss):
        loss, grad = gradient(loss_function, *tensors, torch.zeros_like(MASK), 0.2)
        assert loss == 0
        assert not grad.any()
