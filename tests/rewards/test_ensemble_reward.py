"""Ensembles of reward models by their members' scores, averaged weights by a model averaged by hand."""

import numpy as np
import pytest
import torch
from preference_folders import PROMPTS, RESPONSES, close, plain_scores, preference_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from elastic_lightning.errors import UserError
from elastic_lightning.rewards import EnsembleReward, ScoreNormalization, WeightAveragedReward, score
from elastic_lightning.rewards.ensemble import distinct_names


@pytest.fixture(scope="module")
def folders(tmp_path_factory, llama_folder):
    root = tmp_path_factory.mktemp("reward_models")
    return [preference_folder(root / f"seed_{seed}" / "final", llama_folder, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def normalised(tmp_path_factory, llama_folder):
    root = tmp_path_factory.mktemp("normalised")
    parts = [(0.5, 2.0), (-1.0, 0.5)]
    return [preference_folder(root / f"seed_{i}", llama_folder, i, normalization=part) for i, part in enumerate(parts)]


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({}, lambda scores: scores.mean(0)),
        ({"combine_by": "min"}, lambda scores: scores.min(0)),
        ({"combine_by": "lower_bound"}, lambda scores: scores.mean(0) - scores.std(0)),
        ({"combine_by": "lower_bound", "deviations": 2.5}, lambda scores: scores.mean(0) - 2.5 * scores.std(0)),
    ],
)
def test_what_the_members_agree_on(folders, options, oracle):
    members = np.stack([plain_scores(folder).numpy() for folder in folders])
    reward = EnsembleReward(folders, **options)
    scores = score(reward, PROMPTS, RESPONSES)
    close(scores.total, torch.from_numpy(oracle(members)))
    close(reward(PROMPTS, RESPONSES), scores.total)
    assert list(scores.components) == ["seed_0", "seed_1", "seed_2"]
    for name, expected in zip(scores.components, members, strict=True):
        close(scores.components[name], torch.from_numpy(expected))


def test_members_are_normalised_each_by_its_own(normalised):
    first, second = (plain_scores(folder) for folder in normalised)
    close(EnsembleReward(normalised)(PROMPTS, RESPONSES), ((first - 0.5) / 2 + (second + 1) / 0.5) / 2)
    close(EnsembleReward(normalised, normalise=False)(PROMPTS, RESPONSES), (first + second) / 2)


@pytest.mark.parametrize("kind", [EnsembleReward, WeightAveragedReward])
def test_raw_and_normalised_scores_are_not_mixed(folders, normalised, kind):
    with pytest.raises(UserError, match=r"seed_0 has a reward_normalization.json and .*seed_1/final has none"):
        kind([normalised[0], folders[1]])
    kind([normalised[0], folders[1]], normalise=False)


def test_names_are_what_tells_the_folders_apart():
    assert distinct_names(["runs/rm_1/final", "runs/rm_2/final"]) == ["rm_1", "rm_2"]
    assert distinct_names(["a/x/1", "a/y/1", "a/y/2"]) == ["x_1", "y_1", "y_2"]
    assert distinct_names(["rm", "../other/rm"]) == ["rm", "other_rm"]
    assert distinct_names(["a_b/c", "a/b_c"]) == distinct_names(["rm", "../rm"]) == ["model_1", "model_2"]


@pytest.mark.parametrize("kind", [EnsembleReward, WeightAveragedReward])
def test_wrong_lists_of_folders(folders, kind):
    for paths in ([], folders[:1]):
        with pytest.raises(UserError, match="two or more folders"):
            kind(paths)
    with pytest.raises(UserError, match="given twice"):
        kind([folders[0], folders[1], folders[0] + "/"])
    with pytest.raises(UserError, match="no such folder"):
        kind([folders[0], "./none"])


def test_wrong_ways_to_combine(folders):
    with pytest.raises(UserError, match="combine_by must be mean, min or lower_bound, got 'max'"):
        EnsembleReward(folders, combine_by="max")


def average(folder, folders):
    """The mean of the weights, saved."""
    models = [AutoModelForSequenceClassification.from_pretrained(path) for path in folders]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
    models[0].load_state_dict(mean)
    models[0].save_pretrained(folder)
    AutoTokenizer.from_pretrained(folders[0]).save_pretrained(folder)
    return str(folder)


def test_averaged_weights(tmp_path, folders):
    expected = plain_scores(average(tmp_path, folders))
    members = torch.stack([plain_scores(folder) for folder in folders])
    assert (expected - members).abs().amin(dim=1).max() > 0.1 and (expected - members.mean(0)).abs().max() > 0.01
    reward = WeightAveragedReward(folders)
    close(reward(PROMPTS, RESPONSES), expected)
    assert len(list(reward.parameters())) == len(list(reward.model.parameters()))  # one model is left
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    half = WeightAveragedReward(folders, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.score.weight, reward.model.score.weight.bfloat16())


def test_averaged_weights_are_normalised_by_the_mean(tmp_path, normalised):
    reward = WeightAveragedReward(normalised)
    assert reward.normalization == ScoreNormalization(-0.25, 1.25)
    close(reward(PROMPTS, RESPONSES), (plain_scores(average(tmp_path, normalised)) + 0.25) / 1.25)


def llama(folder, tokenizer, **options):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1}
    LlamaForSequenceClassification(LlamaConfig(**{"vocab_size": 30} | size | heads | options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2\.\S+ is None in the one, \(\d+.* in the other"),
        ({"intermediate_size": 48}, r"is \(16, 32\) in the one, \(16, 48\) in the other"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight is \(8, 16\) in the one, \(16, 16\) in the other"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}, "their num_attention_heads differ"),
        ({"hidden_act": "gelu"}, "their hidden_act differ"),
    ],
)
def test_unlike_models_are_not_averaged(tmp_path, word_tokenizer, options, reason):
    tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
    first, second = (llama(tmp_path / name, tokenizer, **o) for name, o in (("a", {}), ("b", options)))
    with pytest.raises(UserError, match=rf"the weights of .*a and .*b cannot be averaged: .*{reason}"):
        WeightAveragedReward([first, second])


def test_unlike_kinds_are_not_averaged(tmp_path, folders, gpt2_folder):
    other = preference_folder(tmp_path / "gpt2", gpt2_folder)
    with pytest.raises(UserError, match=r"the one is a LlamaForSeq.*, the other a GPT2ForSeq"):
        WeightAveragedReward([folders[0], other])


def test_unlike_tokenizers_are_not_averaged(tmp_path, folders, llama_folder, word_tokenizer):
    other = preference_folder(
        tmp_path / "pad", llama_folder, tokenizer=word_tokenizer(eos_token="<eos>", pad_token="w29")
    )
    with pytest.raises(UserError, match=r"their tokenizers differ \(special tokens\)"):
        WeightAveragedReward([folders[0], other])
    tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_tokens(["more"])
    other = preference_folder(tmp_path / "more", llama_folder, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"their tokenizers differ \(token 'more'\)"):
        WeightAveragedReward([folders[0], other])
