import pytest
import torch
from policy_cases import ROWS, left_padded, make_actor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ActorCritic, CausalLM, Responses, Sampling, load_policy, sample
from elastic_lightning.policies.cache import PreallocatedLayer

SIZE = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1}
SIZE |= {"eos_token_id": 1}


def build(model_type, initializer_range=0.3, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZE, initializer_range=initializer_range, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_the_preallocated_cache_is_the_dynamic_cache(llama_folder):
    model = load_policy(llama_folder).model
    caches = DynamicCache(), Cache(layers=[PreallocatedLayer(9) for _ in range(2)])
    torch.manual_seed(0)
    for chunk in (4, 1, 3, 1):
        tokens = torch.randint(2, 30, (3, chunk))
        one, two = (model(input_ids=tokens, past_key_values=cache, use_cache=True).logits for cache in caches)
        assert torch.equal(one, two)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for dynamic, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(dynamic.keys, ours.keys) and torch.equal(dynamic.values, ours.values)


def test_the_preallocated_cache_is_allocated_once():
    layer = PreallocatedLayer(5)
    keys, _ = layer.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    start = keys.data_ptr()
    for _ in range(2):
        keys, values = layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    assert keys.data_ptr() == start and keys.shape == values.shape == (2, 1, 5, 4)
    with pytest.raises(IndexError, match="holds 5 tokens"):
        layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4}),
        ("gpt_neox", {}),
        ("bloom", {"n_head": 2, "n_layer": 2}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    ],
)
@torch.no_grad()
def test_other_architectures_decode_as_their_full_forward_does(model_type, fields):
    """Windows of attention that end inside the text, position ids the model makes itself, biases on distance."""
    model = build(model_type, **fields)
    prompts = left_padded(ROWS)
    rollout = sample(ActorCritic(CausalLM(model)), prompts, Sampling(max_new_tokens=8), torch.rand(4, 8), None, 0)
    for i, row in enumerate(ROWS):
        tokens = rollout.tokens[i].tolist()
        logits = model(input_ids=torch.tensor([row + tokens])).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1)[range(8), tokens]
        torch.testing.assert_close(rollout.logprobs[i], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("lora", [False, True])
def test_response_logits_are_those_of_the_whole_model(gpt2_folder, lora):
    lm = make_actor(gpt2_folder, lora).lm
    prompts, tokens = left_padded(ROWS), torch.randint(2, 30, (4, 5))
    logits = lm.response_logits(prompts, Responses(tokens, torch.ones(4, 5, dtype=torch.bool)))
    for i, row in enumerate(ROWS):
        expected = lm.model(input_ids=torch.tensor([row + tokens[i].tolist()])).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(logits[i], expected, atol=1e-5, rtol=1e-5)


def test_logits_are_made_for_responses_alone(gpt2_folder):
    actor, shapes = make_actor(gpt2_folder), []
    actor.lm.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    prompts = left_padded([[5] * 9, [6] * 4])
    rollout = sample(actor, prompts, Sampling(max_new_tokens=3), torch.rand(2, 3), None, 0)
    assert shapes == [(2, 30)] * 3
    shapes.clear()
    actor.lm.response_logits(prompts, rollout.responses)
    assert shapes == [(2, 3, 30)]
    shapes.clear()
    actor.evaluate(prompts, rollout.responses)
    assert shapes == [], "log-probabilities are made a chunk at a time, without the output layer's forward"


@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0], ids="weights {}".format)
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_that_change_their_logits_are_refused(model_type, fields, scale):
    """Small random logits too, on which soft-capping hardly shows: after training it would."""
    with pytest.raises(UserError, match="soft-capping or scaling"):
        CausalLM(build(model_type, initializer_range=scale, **fields))


def test_gemma2_without_soft_capping_is_welcome():
    CausalLM(build("gemma2", head_dim=8, final_logit_softcapping=None))


@pytest.mark.parametrize("model_type", ["mamba", "jamba"])
def test_a_model_without_a_cache_of_keys_and_values_is_refused(model_type):
    """A state-space layer finds no state of its own there and would decode each token as if it were the first."""
    fields = {"state_size": 4} if model_type == "mamba" else {**SIZE, "use_mamba_kernels": False}
    fields = {**fields, "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model(model_type, **fields)
    with pytest.raises(UserError, match="cache of keys and values"):
        CausalLM(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_models_pass_the_checks(llama_folder, gpt2_folder, dtype):
    for folder in (llama_folder, gpt2_folder):
        CausalLM(load_policy(folder, dtype=dtype).model)


def test_building_a_policy_draws_no_random_numbers_and_leaves_no_hooks(gpt2_folder):
    model = load_policy(gpt2_folder).model
    state = torch.get_rng_state()
    CausalLM(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
