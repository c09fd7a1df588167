import math

import pytest
import torch

from elastic_lightning.functional import AdaptiveKL, FixedKL, entropy, exact_kl, kl_k1, kl_k2, kl_k3, token_logprobs

INFINITY = float("inf")


def random_logits(seed, dtype=torch.float32):
    return torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distribution(logits):
    """Softmax of a list of numbers, in plain Python."""
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl_oracle(logits, reference_logits):
    pairs = zip(distribution(logits), distribution(reference_logits), strict=True)
    return sum(p * math.log(p / q) for p, q in pairs if p > 0)


def entropy_oracle(logits):
    return -sum(p * math.log(p) for p in distribution(logits) if p > 0)


def at_every_position(function, *logits):
    return torch.tensor([[function(*(each[b, t].tolist() for each in logits)) for t in range(3)] for b in range(2)])


def test_estimators_by_hand():
    # p = 1/2, q = 1/4: log ratio log 2; k3 = 1/2 - 1 + log 2.
    p, q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    assert kl_k1(p, q).item() == pytest.approx(math.log(2))
    assert kl_k2(p, q).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(p, q).item() == pytest.approx(-0.5 + math.log(2))


def test_unbiased_estimators_average_to_the_exact_kl():
    logits, reference = random_logits(0), random_logits(1)
    p, lp, lq = logits.softmax(-1), logits.log_softmax(-1), reference.log_softmax(-1)
    expected = at_every_position(kl_oracle, logits, reference)
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((p * estimator(lp, lq)).sum(-1), expected)


def test_k3_is_never_negative_and_keeps_tiny_differences():
    lp = torch.full((3,), -8.0)
    # The series x^2/2 + x^3/6 + ... at an x that float32 holds exactly, where exp(x) - 1 - x would be 0.
    x = 3 * 2.0**-14
    lq = lp + torch.tensor([x, -x, 0.0])
    assert kl_k3(lp, lq).tolist() == pytest.approx([x**2 / 2, x**2 / 2, 0.0], rel=1e-2)
    assert (kl_k3(lp, lq) >= 0).all()


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_estimators_of_bfloat16_are_float32(estimator):
    lp, lq = torch.tensor([-1.0, -2.5]).bfloat16(), torch.tensor([-1.5, -0.125]).bfloat16()
    assert estimator(lp, lq).dtype == torch.float32
    torch.testing.assert_close(estimator(lp, lq), estimator(lp.float(), lq.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_kl_and_entropy_against_plain_python(dtype):
    logits, reference = random_logits(0, dtype), random_logits(1, dtype)
    assert exact_kl(logits, reference).dtype == entropy(logits).dtype == torch.float32
    torch.testing.assert_close(exact_kl(logits, reference), at_every_position(kl_oracle, logits, reference))
    torch.testing.assert_close(entropy(logits), at_every_position(entropy_oracle, logits))


def test_impossible_tokens_add_nothing():
    logits, reference = torch.tensor([[[1.0, 1.0, -INFINITY]]]), torch.tensor([[[0.0, math.log(3), -INFINITY]]])
    # (1/2, 1/2, 0) against (1/4, 3/4, 0), and against a reference to which the third token is possible.
    assert entropy(logits).item() == pytest.approx(math.log(2))
    assert exact_kl(logits, reference).item() == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2)
    uniform = torch.zeros(1, 1, 3)
    assert exact_kl(logits, uniform).item() == pytest.approx(math.log(3) - math.log(2))
    assert exact_kl(uniform, logits).item() == INFINITY


def test_impossible_tokens_leave_the_gradient_finite():
    for function in (entropy, lambda logits: exact_kl(logits, torch.zeros(1, 1, 3))):
        logits = torch.tensor([[[1.0, 2.0, -INFINITY]]], requires_grad=True)
        without = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
        function(logits).sum().backward()
        # A constant shift of the reference changes no gradient: the third token might as well not exist.
        (entropy(without) if function is entropy else exact_kl(without, torch.zeros(1, 1, 2))).sum().backward()
        torch.testing.assert_close(logits.grad[..., :2], without.grad)
        assert logits.grad[..., 2].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_against_plain_python(dtype):
    logits, tokens = random_logits(0, dtype), torch.tensor([[0, 6, 3], [2, 2, 5]])
    got = token_logprobs(logits, tokens)
    assert got.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            expected = math.log(distribution(logits[b, t].tolist())[tokens[b, t]])
            assert got[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_token_logprobs_of_huge_logits_do_not_overflow():
    logits = torch.tensor([[[1000.0, 1000.0, -INFINITY]]])
    assert token_logprobs(logits, torch.tensor([[0]])).item() == pytest.approx(-math.log(2), abs=1e-4)
    assert token_logprobs(logits, torch.tensor([[2]])).item() == -INFINITY


def test_fixed_coefficient_stays():
    controller = FixedKL(0.02)
    controller.update(100.0, n=64)
    assert controller.coefficient == 0.02


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.2 * (1 + 0.1 * 0.05)),  # a tenth above the target
        (100.0, 0.2 * (1 + 0.2 * 0.05)),  # held at a fifth
        (0.0, 0.2 * (1 - 0.2 * 0.05)),
        (6.0, 0.2),
    ],
)
def test_adaptive_coefficient_by_hand(kl, expected):
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(torch.tensor(kl), n=500)
    assert controller.coefficient == pytest.approx(expected)


def test_adaptive_coefficient_resumes():
    controller, resumed = AdaptiveKL(0.2), AdaptiveKL(0.9)
    controller.update(9.0, n=256)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coefficient == controller.coefficient != 0.2


@pytest.mark.parametrize("controller", [FixedKL(0.2), AdaptiveKL(0.2)])
@pytest.mark.parametrize("kl", [float("nan"), INFINITY, torch.tensor(float("nan"))])
def test_a_kl_that_is_not_finite_is_refused_and_leaves_the_coefficient(controller, kl):
    with pytest.raises(ValueError, match=r"KL to the reference must be finite, got (nan|inf)"):
        controller.update(kl, n=8)
    assert controller.coefficient == 0.2


def test_a_batch_that_could_turn_the_coefficient_negative_is_refused():
    with pytest.raises(ValueError, match=r"needs a KL horizon above 25\.6"):
        AdaptiveKL(0.2, horizon=16).update(0.0, n=128)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedKL(-0.1), "coefficient must be finite and not negative, got -0.1"),
        (lambda: AdaptiveKL(float("nan")), "coefficient must be finite and not negative, got nan"),
        (lambda: AdaptiveKL(0.1, target=0), "target must be finite and positive, got 0"),
        (lambda: AdaptiveKL(0.1, horizon=-5), "horizon must be finite and positive, got -5"),
        (lambda: FixedKL(0.1).load_state_dict({"coefficient": -1.0}), "coefficient must be finite and not negative"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
