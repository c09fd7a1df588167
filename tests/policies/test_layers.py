import pytest
import torch
from policy_cases import ROWS, left_padded
from transformers import AutoConfig, AutoModelForCausalLM

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ActorCritic, CausalLM, Responses, load_policy, make_reference
from elastic_lightning.policies.layers import layer_stack

RESPONSES = Responses(
    torch.tensor([[3, 4, 5], [6, 1, 0], [9, 9, 2], [28, 1, 0]]),
    torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True, True, False]]),
)


def deep(model_type, layers=4):
    """A policy of four layers, random weights."""
    sizes = {"gpt2": {"n_embd": 16, "n_layer": layers, "n_head": 2}}.get(
        model_type, {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=30, bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3, **sizes
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gpt_neox"])
def test_the_stack_is_that_of_the_layers(model_type):
    lm = CausalLM(deep(model_type))
    assert len(layer_stack(lm.backbone)) == 4


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "opt"])
def test_only_the_upper_layers_and_the_last_norm_are_trained(model_type):
    lm = CausalLM(deep(model_type), trainable_layers=1)
    trained = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    layer = {f"{name}" for name, _ in layer_stack(lm.backbone)[3].named_parameters()}
    others = {name for name in trained if not any(name.endswith(f".3.{suffix}") for suffix in layer)}
    assert len(trained) > len(others) > 0 and all("norm" in name or "ln_f" in name for name in others), others


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("trained", [1, 3])
def test_the_trunk_run_once_gives_the_same_states_and_gradients(model_type, trained):
    lm = CausalLM(deep(model_type), trainable_layers=trained)
    actor = ActorCritic(lm, separate_value_trunk=True).eval()
    prompts = left_padded(ROWS)
    trunk = lm.trunk_hidden(prompts, RESPONSES)
    assert trunk.shape == (4, prompts.tokens.shape[1] + 2, 16) and not trunk.requires_grad
    results = []
    for given in (None, trunk):
        actor.zero_grad()
        hidden = lm.response_hidden(prompts, RESPONSES, trunk=given)
        values = actor.values(prompts, RESPONSES, trunk=given)
        (hidden.square().sum() + values.sum()).backward()
        gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
        results.append((hidden, values, gradients))
    (hidden, values, gradients), (other, other_values, other_gradients) = results
    assert torch.equal(hidden, other) and torch.equal(values, other_values)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())


def test_the_lower_layers_are_not_run_again():
    lm = CausalLM(deep("gpt2"), trainable_layers=1)
    ran = []
    for number, layer in enumerate(layer_stack(lm.backbone)):
        layer.mlp.register_forward_hook(lambda *args, number=number: ran.append(number))
    trunk = lm.trunk_hidden(left_padded(ROWS), RESPONSES)
    assert ran == [0, 1, 2]
    lm.response_hidden(left_padded(ROWS), RESPONSES, trunk=trunk)
    assert ran == [0, 1, 2, 3]
    lm.response_hidden(left_padded(ROWS), RESPONSES)
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_reference_shares_the_trunk_and_its_run():
    lm = CausalLM(deep("llama"), trainable_layers=2)
    reference = make_reference(lm)
    shared = [p.data_ptr() == q.data_ptr() for p, q in zip(lm.parameters(), reference.lm.parameters(), strict=True)]
    assert shared == [not parameter.requires_grad for parameter in lm.parameters()] and not all(shared)
    prompts = left_padded(ROWS)
    before = reference.logprobs(prompts, RESPONSES)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    trunk = lm.trunk_hidden(prompts, RESPONSES)
    torch.testing.assert_close(reference.logprobs(prompts, RESPONSES, trunk=trunk), before)
    moved = ActorCritic(lm).evaluate(prompts, RESPONSES, trunk=trunk).logprobs
    assert (moved - before)[RESPONSES.mask].abs().max() > 0.01


@pytest.mark.parametrize("layers", [0, 4, 5])
def test_a_number_of_layers_that_leaves_no_trunk_is_refused(layers):
    with pytest.raises(UserError, match="trainable_layers must be between 1 and 3"):
        CausalLM(deep("gpt2"), trainable_layers=layers)


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_layers_that_return_tuples_are_refused(model_type):
    config = AutoConfig.for_model(
        model_type, vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, bos_token_id=None
    )
    with pytest.raises(UserError, match="trainable_layers does not work with"):
        CausalLM(AutoModelForCausalLM.from_config(config).eval(), trainable_layers=1)


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_gradient_checkpointing_changes_no_gradient_and_recomputes(folder, request):
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = load_policy(request.getfixturevalue(folder)).model
        lm = CausalLM(model, gradient_checkpointing=checkpointing)
        ran = []
        layer_stack(lm.backbone)[0].mlp.register_forward_pre_hook(lambda *args, ran=ran: ran.append(1))
        lm.response_hidden(left_padded(ROWS), RESPONSES).square().sum().backward()
        assert not any(module.training for module in model.modules())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        runs.append(len(ran))
    assert runs == [1, 2]
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)


def test_gradient_checkpointing_leaves_decoding_its_cache(gpt2_folder):
    from elastic_lightning.policies import Sampling, sample

    rollouts = []
    for checkpointing in (False, True):
        actor = ActorCritic(CausalLM(load_policy(gpt2_folder).model, gradient_checkpointing=checkpointing)).eval()
        rollouts.append(sample(actor, left_padded(ROWS), Sampling(max_new_tokens=5), torch.full((4, 5), 0.4), 1, 0))
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
