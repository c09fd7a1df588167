"""The reward of a model of preferences: its logit, and what normalises it."""

import json
import shutil

import pytest
import torch
from preference_folders import PROMPTS, RESPONSES, TEXTS, close, plain_scores, preference_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA
from elastic_lightning.policies.adapters import add_lora
from elastic_lightning.rewards import ClassifierReward, PreferenceReward, ScoreNormalization, read_normalization, score


@pytest.mark.parametrize("base", ["gpt2_folder", "llama_folder"])
def test_the_score_is_the_logit(tmp_path, base, request):
    folder = preference_folder(tmp_path / "model", request.getfixturevalue(base))
    expected = plain_scores(folder)
    assert expected.std() > 0.1, "the case should tell texts apart"
    close(PreferenceReward(folder)(PROMPTS, RESPONSES), expected)
    close(PreferenceReward(folder, batch_size=2)(PROMPTS, RESPONSES), expected)
    close(PreferenceReward(folder, on="response")(PROMPTS[:2], RESPONSES[:2]), plain_scores(folder, RESPONSES[:2]))
    assert score(PreferenceReward(folder), PROMPTS, RESPONSES).components == {}


def test_it_is_normalised_by_what_was_saved_with_it(tmp_path, llama_folder):
    folder = preference_folder(tmp_path / "model", llama_folder, normalization=(0.5, 0.25))
    expected = plain_scores(folder)
    close(PreferenceReward(folder)(PROMPTS, RESPONSES), (expected - 0.5) / 0.25)
    close(PreferenceReward(folder, normalise=False)(PROMPTS, RESPONSES), expected)


def test_scores_that_were_measured_have_mean_0_and_deviation_1(tmp_path, llama_folder):
    folder = preference_folder(tmp_path / "model", llama_folder)
    ScoreNormalization.of(PreferenceReward(folder)(PROMPTS, RESPONSES)).write(folder)
    scores = PreferenceReward(folder)(PROMPTS, RESPONSES)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_normalisation_by_hand(tmp_path):
    ScoreNormalization.of(torch.tensor([1.0, 3.0])).write(tmp_path)
    assert json.loads((tmp_path / "reward_normalization.json").read_text()) == {"mean": 2.0, "deviation": 1.0}
    assert read_normalization(tmp_path) == ScoreNormalization(2.0, 1.0)
    assert ScoreNormalization(2.0, 4.0).apply(torch.tensor([2.0, 10.0])).tolist() == [0.0, 2.0]
    assert read_normalization(tmp_path / "none") is None


@pytest.mark.parametrize("scores", [[1.0, 1.0], [float("nan"), 1.0], []])
def test_scores_that_cannot_be_normalised(scores):
    with pytest.raises(UserError, match="cannot be normalised"):
        ScoreNormalization.of(torch.tensor(scores))


@pytest.mark.parametrize("text", ["", "[]", '{"mean": 1}', '{"mean": 1, "deviation": "x"}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "reward_normalization.json").write_text(text)
    with pytest.raises(UserError, match=r"reward_normalization\.json: it needs the numbers mean and deviation"):
        read_normalization(tmp_path)


@pytest.mark.parametrize("base", ["gpt2_folder", "llama_folder"])
def test_an_adapter_is_merged(tmp_path, base, request):
    base = request.getfixturevalue(base)
    torch.manual_seed(0)
    model = add_lora(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), LoRA(rank=3), task_type="SEQ_CLS"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in TEXTS]
    reward = PreferenceReward(str(tmp_path / "adapter"))
    torch.testing.assert_close(reward(PROMPTS, RESPONSES), torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in reward.named_parameters())


def test_models_without_a_head(tmp_path, llama_folder):
    for kind in (PreferenceReward, ClassifierReward):
        with pytest.raises(UserError, match=r"holds no Llama\w+: 1 of its weights are missing, e\.g\. score\.weight"):
            kind(llama_folder)
    from elastic_lightning.policies import load_policy

    policy = load_policy(llama_folder, lora=LoRA(rank=2))
    policy.model.save_pretrained(tmp_path / "policy")
    policy.tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="has no classification head: is it a policy's"):
        PreferenceReward(str(tmp_path / "policy"))
    (tmp_path / "policy" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot load the adapter"):
        PreferenceReward(str(tmp_path / "policy"))


def test_several_labels_are_refused(tmp_path, classifier_folder, llama_folder):
    with pytest.raises(UserError, match="has 2 labels, a model of preferences has one score: use ClassifierReward"):
        PreferenceReward(classifier_folder)
    with pytest.raises(UserError, match="has 3 labels"):
        PreferenceReward(preference_folder(tmp_path / "three", llama_folder, labels=3))


def test_more_texts_than_a_batch_come_back_in_their_order(tmp_path, llama_folder):
    folder = preference_folder(tmp_path / "model", llama_folder)
    texts = [" ".join(f"w{3 + (5 * i + j) % 27}" for j in range(1 + (7 * i) % 10)) for i in range(23)]
    reward, widths = PreferenceReward(folder, batch_size=4), []
    reward.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    close(reward(texts, [""] * 23), plain_scores(folder, texts))
    assert widths == sorted(widths) and len(widths) == 6  # those of like length together


def test_a_moved_folder_keeps_its_normalisation(tmp_path, llama_folder):
    folder = preference_folder(tmp_path / "model", llama_folder, normalization=(1.0, 2.0))
    shutil.move(folder, tmp_path / "moved")
    assert PreferenceReward(str(tmp_path / "moved")).normalization == ScoreNormalization(1.0, 2.0)
