import pytest
import torch
from policy_cases import make_actor
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_lightning.errors import UserError
from elastic_lightning.policies import load_policy, load_tokenizer
from elastic_lightning.policies.saving import save_model

TOKENS = torch.tensor([[3, 4, 5, 20], [9, 28, 2, 1]])


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_a_saved_policy_is_the_policy_for_any_transformers_user(tmp_path, folder, lora, request):
    model, tokenizer = (
        make_actor(request.getfixturevalue(folder), lora).lm.model,
        load_tokenizer(request.getfixturevalue(folder)),
    )
    before, expected = snapshot(model), model(input_ids=TOKENS).logits
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_model(model, tokenizer, tmp_path / "deep" / "folder")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "folder")
    assert not (tmp_path / "deep" / "folder" / "adapter_config.json").exists()
    torch.testing.assert_close(plain(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "folder").get_vocab() == tokenizer.get_vocab()
    after = snapshot(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(model(input_ids=TOKENS).logits, expected)
    assert load_policy(str(tmp_path / "deep" / "folder")).unmerged_adapter is False


def test_an_adapter_alone(tmp_path, llama_folder):
    model = make_actor(llama_folder, lora=True).lm.model
    save_model(model, load_tokenizer(llama_folder), tmp_path, adapter="adapter")
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    adapter = sum(parameter.numel() * 4 for name, parameter in model.named_parameters() if "lora_" in name)
    assert adapter <= size < adapter + 4000
    loaded = load_policy(str(tmp_path)).model
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_another_kind_is_refused_before_anything_is_written(tmp_path, gpt2_folder):
    loaded = load_policy(gpt2_folder)
    with pytest.raises(UserError, match="merged or adapter"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "new", adapter="both")
    assert not (tmp_path / "new").exists()
