"""What is sharded and what cannot be; sharded runs themselves are in tests/algorithms/test_ranks.py."""

import copy

import pytest
import torch

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ActorCritic, FrozenCopy, LoRA, as_policy, load_policy
from elastic_lightning.policies.sharding import check_apart, filled, gathered, layers_of, models_of, skeleton
from elastic_lightning.rewards import ClassifierReward, FunctionReward, WeightedReward


@pytest.mark.parametrize(("kind", "layers"), [("gpt2", 2), ("llama", 2), ("marian", 5), ("t5", 5)])
def test_layers_are_those_of_the_transformers(request, kind, layers):
    model = load_policy(request.getfixturevalue(f"{kind}_folder")).model
    found = layers_of(model)
    assert len(found) == layers
    assert all(type(layer).__name__.endswith(("Block", "Layer")) for layer in found)


def test_the_models_of_a_reward(classifier_folder):
    parts = {"classifier": ClassifierReward(classifier_folder), "length": FunctionReward("builtins.len")}
    assert models_of(WeightedReward(parts)) == [parts["classifier"].model]


def test_weights_in_two_groups_are_refused(gpt2_folder):
    plain = as_policy(load_policy(gpt2_folder).model)
    check_apart({"policy": ActorCritic(plain, separate_value_trunk=True), "reference": FrozenCopy(plain)})
    lora = as_policy(load_policy(gpt2_folder, lora=LoRA(rank=2)).model)
    with pytest.raises(UserError, match="policy and reference share weights"):
        check_apart({"policy": ActorCritic(lora), "reference": FrozenCopy(lora)})
    with pytest.raises(UserError, match="policy and policy share weights"):
        check_apart({"policy": ActorCritic(lora, separate_value_trunk=True)})


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_skeleton_holds_no_weights_and_is_filled_with_them(gpt2_folder, lora):
    model = load_policy(gpt2_folder, lora=lora).model
    before = copy.deepcopy(model)
    empty = skeleton(model)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert filled(empty, model, keep=False) is None
    whole = filled(empty, model, keep=True)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)) and torch.equal(parameter, model.get_parameter(name))
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(whole(tokens).logits, model(tokens).logits)
    if lora is None:  # still one tensor
        assert whole.lm_head.weight is whole.transformer.wte.weight


def test_nothing_to_gather_changes_nothing():
    with gathered():
        assert torch.is_grad_enabled()
