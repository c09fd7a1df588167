import pytest
import torch
from policy_cases import CAUSAL, EVERY_KIND, inputs_of, make_actor
from tokenizer_kinds import save_kind, sentences
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from elastic_lightning.algorithms import PreferenceModel, RewardModel
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource, load_policy, load_tokenizer
from elastic_lightning.policies.merging import merge_adapter
from elastic_lightning.policies.saving import save_model
from elastic_lightning.rewards import ClassifierReward


def logits_of(model):
    """Logits of a response, by the model's own forward."""
    return model(**inputs_of(model, [3, 4, 5, 20], [9, 28, 2, 1])[0]).logits


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
@EVERY_KIND
def test_a_saved_policy_is_the_policy_for_any_transformers_user(tmp_path, folder, lora, request):
    model, tokenizer = (
        make_actor(request.getfixturevalue(folder), lora).lm.model,
        load_tokenizer(request.getfixturevalue(folder)),
    )
    before, expected = snapshot(model), logits_of(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_model(model, tokenizer, tmp_path / "deep" / "folder")
    plain_class = AutoModelForCausalLM if folder in CAUSAL else AutoModelForSeq2SeqLM
    plain = plain_class.from_pretrained(tmp_path / "deep" / "folder")
    assert not (tmp_path / "deep" / "folder" / "adapter_config.json").exists()
    torch.testing.assert_close(logits_of(plain), expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "folder").get_vocab() == tokenizer.get_vocab()
    after = snapshot(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(logits_of(model), expected)
    assert load_policy(str(tmp_path / "deep" / "folder")).unmerged_adapter is False


@EVERY_KIND
def test_an_adapter_alone(tmp_path, folder, request):
    model = make_actor(request.getfixturevalue(folder), lora=True).lm.model
    save_model(model, load_tokenizer(request.getfixturevalue(folder)), tmp_path, adapter="adapter")
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    adapter = sum(parameter.numel() * 4 for name, parameter in model.named_parameters() if "lora_" in name)
    assert adapter <= size < adapter + 8000
    loaded = load_policy(str(tmp_path)).model
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_another_kind_is_refused_before_anything_is_written(tmp_path, gpt2_folder):
    loaded = load_policy(gpt2_folder)
    with pytest.raises(UserError, match="merged or adapter"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "new", adapter="both")
    assert not (tmp_path / "new").exists()


def classifier(kind, folder, lora):
    """A classifier of two labels or of one, from a decoder whose tokenizer has no pad token."""
    source = ModelSource(str(folder), lora=LoRA(rank=2) if lora else None)
    return RewardModel(source) if kind == "labels" else PreferenceModel(source)


@pytest.mark.parametrize("lora", ["merged", "merged later", None], ids=str)
@pytest.mark.parametrize("kind", ["labels", "pairs"])
def test_a_saved_classifier_reads_padded_batches(tmp_path, kind, lora):
    save_kind("llama", tmp_path / "policy")
    torch.manual_seed(0)
    module = classifier(kind, tmp_path / "policy", lora is not None)
    later = lora == "merged later"
    module.save_pretrained(tmp_path / "saved", adapter="adapter" if later else "merged")
    if later:
        merge_adapter(tmp_path / "saved", tmp_path / "whole")
    folder = tmp_path / ("whole" if later else "saved")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = sentences(3, seed=5)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].bool().all() and tokenizer.padding_side == "right"
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        alone = [module.model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts]
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-5, rtol=1e-5)
    reward = ClassifierReward(str(folder), label=0, output="logit", batch_size=2)
    torch.testing.assert_close(reward(texts, [""] * 3), scores[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pad is eos", "llama", "marian"])
def test_a_saved_tokenizer_pads_as_its_model_reads(tmp_path, kind):
    original = save_kind(kind, tmp_path / "policy")
    loaded = load_policy(str(tmp_path / "policy"))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.padding_side == ("right" if kind == "marian" else "left")
    assert saved.pad_token == (original.pad_token or original.eos_token) and saved.get_vocab() == original.get_vocab()
    assert saved.special_tokens_map.items() >= original.special_tokens_map.items()
