"""Rewards that read special tokens, from PPO's tokens to their texts."""

import pytest
import torch
from tokenizer_kinds import ENDS, save_kind
from transformers import AutoModelForSequenceClassification

from elastic_lightning.algorithms import PPO
from elastic_lightning.policies import ModelSource, Prompts, Responses, Sampling
from elastic_lightning.policies.special_tokens import end_ids
from elastic_lightning.rewards import ClassifierReward, FunctionReward, WeightedReward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = save_kind("two ends", folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def batch(folder):
    """A prompt and a response that thinks and ends its turn, as tokens."""
    tokenizer = PPO(ModelSource(str(folder)), FunctionReward(len)).tokenizer
    prompt = tokenizer("the film")["input_ids"]
    written = tokenizer("<think>bad</think>good<end_of_turn>", add_special_tokens=False)["input_ids"]
    assert written[-1] == tokenizer.convert_tokens_to_ids(ENDS["two ends"][1])
    one = torch.ones(1, max(len(prompt), len(written)), dtype=torch.bool)
    prompts, responses = (torch.tensor([ids]) for ids in (prompt, written))
    return Prompts(prompts, one[:, : len(prompt)]), Responses(responses, one[:, : len(written)])


def thinks(prompts, responses):
    return ["</think>" in response for response in responses]


def ppo(folder, reward):
    return PPO(ModelSource(str(folder)), reward, sampling=Sampling(max_new_tokens=4))


def test_a_function_reads_them_on_request_and_others_beside_it_do_not(folder, batch):
    rewards = {"with": FunctionReward(thinks, special_tokens=True), "without": FunctionReward(thinks)}
    texts, scores = ppo(folder, WeightedReward(rewards)).score(*batch)
    assert {name: part.tolist() for name, part in scores.components.items()} == {"with": [1.0], "without": [0.0]}
    assert "think" not in texts.responses[0] and texts.complete == [True]


def test_a_classifier_scores_the_tokens_as_they_were_sampled(folder, batch, tmp_path):
    module = ppo(folder, FunctionReward(len))
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(tmp_path)
    module.tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path), label=0, output="logit", special_tokens=True)
    prompts, responses = batch
    without_end = responses.tokens[:, :-1]
    assert responses.tokens[0, -1].item() in end_ids(module.drawn_tokens.eos_token_id)
    expected = model.eval()(input_ids=torch.cat([prompts.tokens, without_end], dim=1)).logits[:, 0]
    found = ppo(folder, reward).score(prompts, responses)[1].total
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
