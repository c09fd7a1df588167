import pytest
import torch

from elastic_lightning.errors import UserError
from elastic_lightning.rewards import FunctionReward, WeightedReward, score

PROMPTS, RESPONSES = ["a", "bb", "ccc"], ["x", "", "zzzz"]


def prompt_length():
    return FunctionReward(lambda prompts, responses: [len(prompt) for prompt in prompts])


def response_length():
    return FunctionReward(lambda prompts, responses: [len(response) for response in responses])


def test_sum_and_components_by_hand():
    reward = WeightedReward({"prompt": prompt_length(), "response": response_length()}, {"response": -0.5})
    scores = score(reward, PROMPTS, RESPONSES)
    assert scores.total.tolist() == [1 - 0.5, 2, 3 - 2]
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "prompt": [1, 2, 3],
        "response": [1, 0, 4],
    }
    assert reward(PROMPTS, RESPONSES).tolist() == scores.total.tolist()


def test_one_reward_and_weight_zero():
    assert score(WeightedReward({"only": prompt_length()}), PROMPTS, RESPONSES).total.tolist() == [1, 2, 3]
    silent = WeightedReward({"only": prompt_length()}, {"only": 0})
    scores = score(silent, PROMPTS, RESPONSES)
    assert scores.total.tolist() == [0, 0, 0] and scores.components["only"].tolist() == [1, 2, 3]


def test_weighted_rewards_nest():
    inner = WeightedReward({"prompt": prompt_length()}, {"prompt": 10})
    scores = score(WeightedReward({"inner": inner, "response": response_length()}), PROMPTS, RESPONSES)
    assert scores.total.tolist() == [11, 20, 34]


def test_each_part_is_scored_once():
    calls = []
    counted = FunctionReward(lambda prompts, responses: calls.append(1) or torch.zeros(3))
    score(WeightedReward({"a": counted}), PROMPTS, RESPONSES)
    assert len(calls) == 1


def test_unknown_weights_and_no_rewards():
    with pytest.raises(UserError, match=r"\['typo'\].*\['prompt'\]"):
        WeightedReward({"prompt": prompt_length()}, {"typo": 1.0})
    with pytest.raises(UserError, match="at least one"):
        WeightedReward({})


def test_parts_are_submodules_that_move_with_it():
    linear = torch.nn.Linear(1, 1)
    part = FunctionReward(lambda prompts, responses: torch.zeros(len(prompts)))
    part.model = linear
    assert list(WeightedReward({"part": part}).parameters()) == list(linear.parameters())
