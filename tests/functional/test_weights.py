import math

import pytest
import torch

from elastic_lightning.functional import copy_, distance, float32_copy, lerp_, slerp
from elastic_lightning.functional.weights import bit_sums


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "layer.bias": torch.randn(4, generator=generator).to(dtype),
    }


def numbers(named):
    """All numbers of the weights, in one plain list."""
    return [number for tensor in named.values() for number in tensor.flatten().tolist()]


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.005, 0.75, 1.0])
def test_lerp_against_plain_python(source_dtype, weight):
    target, source = weights(0), weights(1, source_dtype)
    expected = [t + weight * (s - t) for t, s in zip(numbers(target), numbers(source), strict=True)]
    lerp_(target, source, weight)
    assert numbers(target) == pytest.approx(expected, abs=1e-6)
    assert {tensor.dtype for tensor in target.values()} == {torch.float32}


def test_lerp_takes_the_tensors_of_each_dtype():
    target, source = weights(0), weights(1)
    source["layer.bias"] = source["layer.bias"].bfloat16()
    expected = [(t + s) / 2 for t, s in zip(numbers(target), numbers(source), strict=True)]
    lerp_(target, source, 0.5)
    assert numbers(target) == pytest.approx(expected, abs=1e-6)


def test_lerp_and_copy_work_in_place_on_parameters_without_a_graph():
    model = torch.nn.Linear(3, 2)
    parameters = dict(model.named_parameters())
    addresses = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    source = {name: torch.ones_like(tensor) for name, tensor in parameters.items()}
    lerp_(parameters, source, 1.0)
    assert set(numbers(parameters)) == {1.0}
    copy_(parameters, {name: tensor.double() * 2 for name, tensor in source.items()})
    assert set(numbers(parameters)) == {2.0}
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == addresses
    assert all(tensor.is_leaf and tensor.grad_fn is None for tensor in model.parameters())


def test_a_slow_average_of_bfloat16_weights_moves_in_float32():
    shadow, online = {"w": torch.ones(1)}, {"w": torch.full((1,), 1.5, dtype=torch.bfloat16)}
    for _ in range(100):
        lerp_(shadow, online, 0.005)
    assert shadow["w"].item() == pytest.approx(1.5 - 0.5 * 0.995**100, abs=1e-5)


def test_copy_casts_to_the_target():
    target, source = weights(0, torch.bfloat16), dict(reversed(weights(1).items()))
    kept = dict(target)
    copy_(target, source)
    for name in source:
        assert target[name] is kept[name]
        assert torch.equal(target[name], source[name].bfloat16())


def test_distance_by_hand():
    # Differences 3 and 4 in two tensors: 5 together.
    a = {"x": torch.tensor([1.0, 4.0]), "y": torch.tensor([[2.0]])}
    b = {"y": torch.tensor([[6.0]]), "x": torch.tensor([1.0, 1.0])}
    assert distance(a, b).item() == 5.0
    assert distance(a, a).item() == 0.0
    assert distance({}, {}).item() == 0.0


def test_distance_in_parts_is_that_of_the_whole(monkeypatch):
    a, b = weights(0), weights(1)
    monkeypatch.setattr("elastic_lightning.functional.weights.PART", 3)
    assert distance(a, b).item() == pytest.approx(math.dist(numbers(a), numbers(b)), rel=1e-6)


def test_distance_across_dtypes_is_float32():
    a, b = weights(0), weights(1, torch.bfloat16)
    expected = math.dist(numbers(a), numbers(b))
    assert distance(a, b).dtype == torch.float32
    assert distance(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_slerp_of_orthogonal_task_vectors_by_hand():
    start = {"w": torch.tensor([10.0, 10.0])}
    a, b = {"w": torch.tensor([12.0, 10.0])}, {"w": torch.tensor([10.0, 12.0])}
    half = slerp(start, a, b, 0.5)["w"].tolist()
    assert half == pytest.approx([10 + math.sqrt(2), 10 + math.sqrt(2)])
    third = slerp(start, a, b, 1 / 3)["w"].tolist()
    assert third == pytest.approx([10 + 2 * math.cos(math.pi / 6), 10 + 2 * math.sin(math.pi / 6)])


def test_slerp_goes_tensor_by_tensor_and_turns_evenly():
    angle = 2.0
    start = {"turned": torch.zeros(2), "still": torch.zeros(2)}
    a = {"turned": torch.tensor([3.0, 0.0]), "still": torch.tensor([1.0, 1.0])}
    b = {"turned": 3 * torch.tensor([math.cos(angle), math.sin(angle)]), "still": torch.tensor([1.0, 1.0])}
    for t in (0.0, 0.25, 0.8, 1.0):
        merged = slerp(start, a, b, t)
        assert merged["turned"].tolist() == pytest.approx([3 * math.cos(t * angle), 3 * math.sin(t * angle)], abs=1e-5)
        assert merged["still"].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.0], [4.0, 0.0], [1.0, 0.0]),  # no task vector
        ([1.0, 1.0], [3.0, 3.0], [1.5, 1.5]),  # parallel
        ([-1.0, 0.0], [3.0, 0.0], [0.0, 0.0]),  # opposite
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_slerp_falls_back_to_a_straight_line(a, b, expected):
    merged = slerp({"w": torch.zeros(2)}, {"w": torch.tensor(a)}, {"w": torch.tensor(b)}, 0.25)
    assert merged["w"].tolist() == pytest.approx(expected)


def test_slerp_returns_new_weights_of_the_dtype_of_the_start():
    start, a, b = weights(0, torch.bfloat16), weights(1), weights(2)
    merged = slerp(start, a, b, 0.0)
    for name in start:
        assert merged[name].dtype == torch.bfloat16
        assert merged[name] is not start[name]
        torch.testing.assert_close(merged[name].float(), a[name], rtol=1e-2, atol=1e-2)


def test_float32_copy_shares_nothing():
    parameters = dict(torch.nn.Linear(3, 2).named_parameters())
    copied = float32_copy(parameters)
    copied["weight"].zero_()
    assert parameters["weight"].any()
    assert not copied["weight"].requires_grad
    assert float32_copy({"w": torch.ones(1, dtype=torch.bfloat16)})["w"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_bit_sums_change_with_a_single_number(dtype):
    weights = {"w": torch.linspace(-1, 1, 12).to(dtype).view(3, 4).t(), "none": torch.zeros(0, dtype=dtype)}
    before = bit_sums(weights)
    assert before == bit_sums({name: tensor.clone() for name, tensor in weights.items()}) and before["none"] == 0
    weights["w"][1, 2] *= 1 + torch.finfo(dtype).eps
    assert bit_sums(weights)["w"] != before["w"]


CALLS = {
    "lerp_": lambda target, source: lerp_(target, source, 0.5),
    "copy_": copy_,
    "distance": distance,
    "slerp, first": lambda target, source: slerp(target, source, target, 0.5),
    "slerp, second": lambda target, source: slerp(target, target, source, 0.5),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_other_names_are_named_and_nothing_is_touched(call):
    target = {name: torch.zeros(1) for name in ("a", "b", "c", "d", "e")}
    source = {name: torch.ones(1) for name in ("e", "z")}
    with pytest.raises(ValueError, match="missing a, b, c and 1 more; unexpected z"):
        call(target, source)
    assert not any(numbers(target))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_other_shapes_are_named(call):
    with pytest.raises(ValueError, match="differ in shape: w"):
        call({"w": torch.zeros(3), "v": torch.zeros(1)}, {"w": torch.zeros(1), "v": torch.zeros(1)})


def test_no_weights_at_all_is_no_error():
    lerp_({}, {}, 0.5)
    copy_({}, {})
