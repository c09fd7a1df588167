import pytest
import torch
from policy_cases import EVERY_KIND, ROWS, left_padded, make_actor, plain_logits, plain_logprobs, plain_values

from elastic_lightning.policies import (
    ActorCritic,
    Responses,
    Sampling,
    as_policy,
    counter_uniforms,
    load_policy,
    sample,
)

EOS = 1


def rollout_of(actor, prompts, temperature=1.0, length=12, pad=0):
    uniforms = counter_uniforms(3, 0, torch.arange(len(prompts.tokens)), length)
    return sample(actor, prompts, Sampling(max_new_tokens=length, temperature=temperature), uniforms, EOS, pad)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "trunk"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@EVERY_KIND
def test_sampling_a_full_forward_and_plain_transformers_agree(folder, lora, separate, temperature, request):
    actor = make_actor(request.getfixturevalue(folder), lora, separate)
    rows = ROWS * 4
    prompts = left_padded(rows, extra=2)
    rollout = rollout_of(actor, prompts, temperature)
    lengths = rollout.mask.sum(dim=1).tolist()
    assert min(lengths) < max(lengths), "the case should hold rows that ended before others"
    evaluation = actor.evaluate(prompts, rollout.responses, temperature)
    mask = rollout.mask
    torch.testing.assert_close(evaluation.logprobs[mask], rollout.logprobs[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluation.values[mask], rollout.values[mask], atol=1e-5, rtol=0)
    for i, row in enumerate(rows):
        response = rollout.tokens[i, : lengths[i]].tolist()
        expected = plain_logprobs(actor.lm.model, row, response, temperature)
        torch.testing.assert_close(rollout.logprobs[i, : lengths[i]].double(), expected, atol=1e-5, rtol=0)
        values = plain_values(actor, row, response)
        torch.testing.assert_close(rollout.values[i, : lengths[i]], values, atol=1e-5, rtol=1e-5)


@EVERY_KIND
def test_an_active_adapter_changes_the_log_probabilities(folder, request):
    actor, prompts = make_actor(request.getfixturevalue(folder), lora=True), left_padded(ROWS)
    rollout = rollout_of(actor, prompts)
    with actor.lm.adapter_off():
        without = actor.evaluate(prompts, rollout.responses).logprobs
    assert (without - rollout.logprobs)[rollout.mask].abs().mean() > 0.05


@EVERY_KIND
def test_left_padding_changes_nothing(folder, request):
    actor = make_actor(request.getfixturevalue(folder))
    near, far = left_padded(ROWS), left_padded(ROWS, extra=9)
    rollout, padded = rollout_of(actor, near), rollout_of(actor, far)
    assert torch.equal(rollout.tokens, padded.tokens) and torch.equal(rollout.mask, padded.mask)
    torch.testing.assert_close(rollout.logprobs, padded.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.values, padded.values, atol=1e-5, rtol=1e-5)
    one, two = actor.evaluate(near, rollout.responses), actor.evaluate(far, rollout.responses)
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(ours[rollout.mask], theirs[rollout.mask], atol=1e-5, rtol=1e-5)


@EVERY_KIND
def test_a_pad_token_outside_the_vocabulary_changes_nothing(folder, request):
    actor = make_actor(request.getfixturevalue(folder), separate_value_trunk=True)
    outside = actor.lm.config.vocab_size + 5
    known, foreign = left_padded(ROWS * 4), left_padded(ROWS * 4, pad=outside)
    rollout, other = rollout_of(actor, known), rollout_of(actor, foreign, pad=outside)
    assert (other.tokens == outside).any() and torch.equal(rollout.mask, other.mask)
    assert torch.equal(rollout.tokens[rollout.mask], other.tokens[rollout.mask])
    assert torch.equal(rollout.values, other.values)
    evaluation = actor.evaluate(foreign, other.responses)
    assert all(tensor.isfinite().all() for tensor in evaluation)
    torch.testing.assert_close(evaluation.logprobs[other.mask], rollout.logprobs[other.mask], atol=1e-5, rtol=0)


@EVERY_KIND
def test_what_stands_after_the_end_does_not_matter(folder, request):
    actor, prompts = make_actor(request.getfixturevalue(folder)), left_padded([[5, 6], [7]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    tokens = torch.tensor([[3, 4, 5, 6], [8, 1, 9, 9]])
    other = torch.tensor([[3, 4, 5, 6], [8, 1, 2, 28]])
    one, two = (actor.evaluate(prompts, Responses(each, mask)) for each in (tokens, other))
    for ours, theirs in zip(one, two, strict=True):
        assert torch.equal(ours[mask], theirs[mask])


@EVERY_KIND
def test_entropy_is_that_of_the_scaled_distribution(folder, request):
    actor = make_actor(request.getfixturevalue(folder))
    prompt, response = [5, 9], [4, 8, 3]
    responses = Responses(torch.tensor([response]), torch.ones(1, 3, dtype=torch.bool))
    entropy = actor.evaluate(left_padded([prompt]), responses, temperature=0.7).entropy[0]
    logits = plain_logits(actor.lm.model, prompt, response)
    for t in range(3):
        probabilities = (logits[t].double() / 0.7).softmax(-1)
        assert entropy[t].item() == pytest.approx(-sum(p * p.log() for p in probabilities).item(), abs=1e-5)


@pytest.mark.parametrize("separate", [False, True])
@EVERY_KIND
def test_values_start_at_zero(folder, separate, request):
    actor = ActorCritic(as_policy(load_policy(request.getfixturevalue(folder)).model), separate)
    assert not any(parameter.any() for parameter in actor.value_head.parameters())
    rollout = rollout_of(actor, left_padded(ROWS))
    assert torch.equal(rollout.values, torch.zeros_like(rollout.values))


@EVERY_KIND
def test_a_value_trunk_shares_nothing_with_the_policy(folder, request):
    actor = make_actor(request.getfixturevalue(folder), separate_value_trunk=True)
    prompts = left_padded(ROWS)
    rollout = rollout_of(actor, prompts)
    actor.evaluate(prompts, rollout.responses).values.sum().backward()
    assert all(parameter.grad is None for parameter in actor.lm.parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in actor.value_trunk.parameters())


@EVERY_KIND
def test_bfloat16_gives_float32_statistics(folder, request):
    actor = ActorCritic(as_policy(load_policy(request.getfixturevalue(folder), dtype="bfloat16").model)).eval()
    prompts = left_padded(ROWS)
    rollout = rollout_of(actor, prompts)
    evaluation = actor.evaluate(prompts, rollout.responses)
    tensors = [rollout.logprobs, rollout.values, *evaluation]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    torch.testing.assert_close(evaluation.logprobs[rollout.mask], rollout.logprobs[rollout.mask], atol=0.2, rtol=0)
