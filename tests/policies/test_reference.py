import pytest
import torch
from policy_cases import EVERY_KIND, ROWS, left_padded, make_actor

from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    AdapterOff,
    CausalLM,
    FrozenCopy,
    Responses,
    as_policy,
    load_policy,
    make_reference,
)

TOKENS = torch.tensor([[3, 4, 5], [6, 1, 0], [9, 9, 2], [28, 1, 0]])
RESPONSES = Responses(TOKENS, torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True, True, False]]))


def train(lm):
    """One step of gradient descent on everything trainable."""
    loss = -lm.response_logits(left_padded(ROWS), RESPONSES).log_softmax(-1)[..., 7].mean()
    loss.backward()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


@EVERY_KIND
def test_a_frozen_copy_stays_while_the_policy_moves(folder, request):
    lm = as_policy(load_policy(request.getfixturevalue(folder)).model)
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    reference = make_reference(lm)
    assert isinstance(reference, FrozenCopy)
    before = reference.response_logits(left_padded(ROWS), RESPONSES)
    torch.testing.assert_close(before, lm.response_logits(left_padded(ROWS), RESPONSES))
    weights = {name: weight.clone() for name, weight in reference.weights().items()}
    train(lm)
    assert torch.equal(reference.response_logits(left_padded(ROWS), RESPONSES), before)
    assert (lm.response_logits(left_padded(ROWS), RESPONSES) - before).abs().max() > 0.01
    assert all(torch.equal(weight, weights[name]) for name, weight in reference.weights().items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert trained and all(parameter.requires_grad for parameter in trained)
    assert not before.requires_grad


@pytest.mark.parametrize("lora", [False, True])
@EVERY_KIND
def test_the_copy_names_its_weights_as_the_policy_does(folder, lora, request):
    lm = make_actor(request.getfixturevalue(folder), lora).lm
    weights = FrozenCopy(lm).weights()
    assert list(weights) == [name for name, _ in lm.named_parameters()]
    for name, parameter in lm.named_parameters():
        assert torch.equal(weights[name], parameter)
        shared = weights[name].data_ptr() == parameter.data_ptr()
        assert shared != parameter.requires_grad, "what is trained is copied, the rest is not"


@EVERY_KIND
def test_adapter_off_is_the_base_model(folder, request):
    lm = make_actor(request.getfixturevalue(folder), lora=True).lm
    reference = make_reference(lm)
    assert isinstance(reference, AdapterOff)
    base = as_policy(load_policy(request.getfixturevalue(folder)).model)
    expected = base.response_logits(left_padded(ROWS), RESPONSES)
    online = lm.response_logits(left_padded(ROWS), RESPONSES)
    logits = reference.response_logits(left_padded(ROWS), RESPONSES)
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad and (logits - online).abs().max() > 0.1
    torch.testing.assert_close(lm.response_logits(left_padded(ROWS), RESPONSES), online)  # the adapter is on again
    train(lm)
    torch.testing.assert_close(reference.response_logits(left_padded(ROWS), RESPONSES), expected)


@EVERY_KIND
def test_adapter_off_leaves_trainability_as_it_was(folder, request):
    lm = make_actor(request.getfixturevalue(folder), lora=True).lm
    before = {name: parameter.requires_grad for name, parameter in lm.named_parameters()}
    make_reference(lm).response_logits(left_padded(ROWS), RESPONSES)
    assert {name: parameter.requires_grad for name, parameter in lm.named_parameters()} == before


def test_adapter_off_needs_an_adapter(gpt2_folder):
    with pytest.raises(UserError, match="adapter_off needs a LoRA policy"):
        make_reference(CausalLM(load_policy(gpt2_folder).model), "adapter_off")


@EVERY_KIND
def test_a_frozen_copy_of_a_lora_policy_keeps_the_adapter_it_had(folder, request):
    lm = make_actor(request.getfixturevalue(folder), lora=True).lm
    reference = make_reference(lm, "frozen_copy")
    before = reference.response_logits(left_padded(ROWS), RESPONSES)
    torch.testing.assert_close(before, lm.response_logits(left_padded(ROWS), RESPONSES))
    train(lm)
    assert torch.equal(reference.response_logits(left_padded(ROWS), RESPONSES), before)
