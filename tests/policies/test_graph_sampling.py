"""The static step against eager decoding: uncaptured on any machine, captured where there is CUDA."""

import pytest
import torch
from policy_cases import ROWS, left_padded, make_actor

from elastic_lightning.policies import GraphSampler, Sampling, counter_uniforms, sample

EOS, PAD = 1, 0
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.7, "min_new_tokens": 4},
    {"min_new_tokens": 12},
    {"max_new_tokens": 1},
]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: captures a graph")


def both(actor, prompts, options, step=0, sampler=None, device="cpu"):
    """Rollouts of the eager loop and of the static step under the same uniforms."""
    sampling = Sampling(**{"max_new_tokens": 12} | options)
    uniforms = counter_uniforms(3, step, torch.arange(len(prompts.tokens)), sampling.max_new_tokens).to(device)
    sampler = sampler or GraphSampler(actor, sampling, EOS, PAD)
    return sample(actor, prompts, sampling, uniforms, EOS, PAD), sampler(prompts, uniforms), sampler


def assert_same(eager, static, atol=3e-5):
    assert torch.equal(static.tokens, eager.tokens) and torch.equal(static.mask, eager.mask)
    torch.testing.assert_close(static.logprobs, eager.logprobs, atol=atol, rtol=0)
    torch.testing.assert_close(static.values, eager.values, atol=atol, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_static_steps_draw_what_eager_steps_draw(folder, lora, options, request):
    actor = make_actor(request.getfixturevalue(folder), lora)
    eager, static, _ = both(actor, left_padded(ROWS * 4, extra=2), options)
    assert_same(eager, static)


def test_a_value_trunk(gpt2_folder):
    eager, static, _ = both(make_actor(gpt2_folder, separate_value_trunk=True), left_padded(ROWS), {})
    assert_same(eager, static)


def test_buffers_serve_batches_of_like_shape_and_keep_nothing_of_the_one_before(llama_folder):
    actor = make_actor(llama_folder)
    _, first, sampler = both(actor, left_padded(ROWS), {})
    kept = first.tokens.clone()
    (decode,) = sampler._shapes.values()
    for step, prompts in enumerate([left_padded(ROWS[::-1]), left_padded(ROWS, extra=9), left_padded([[7]] * 4)]):
        assert_same(*both(actor, prompts, {}, step, sampler)[:2])
        assert list(sampler._shapes.values()) == [decode]
    assert torch.equal(first.tokens, kept), "an earlier rollout must not be overwritten"
    assert_same(*both(actor, left_padded(ROWS * 2), {}, 0, sampler)[:2])
    assert list(sampler._shapes.values()) != [decode]


def test_buffers_born_in_a_validation_serve_the_training(gpt2_folder):
    """Lightning validates in inference mode, whose tensors cannot be written to outside."""
    actor, prompts = make_actor(gpt2_folder), left_padded(ROWS)
    with torch.inference_mode():
        _, first, sampler = both(actor, prompts, {})
    assert not first.logprobs.is_inference()
    assert_same(*both(actor, prompts, {}, 1, sampler)[:2])


def test_weights_changed_in_place_are_seen(gpt2_folder):
    actor, prompts = make_actor(gpt2_folder), left_padded(ROWS)
    _, before, sampler = both(actor, prompts, {})
    with torch.no_grad():
        for parameter in actor.lm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    eager, after, _ = both(actor, prompts, {}, 0, sampler)
    assert_same(eager, after)
    assert not torch.equal(before.logprobs, after.logprobs)


def test_decoding_stops_when_every_row_has_ended(llama_folder):
    actor, prompts = make_actor(llama_folder), left_padded([[5, 9, 20]] * 3)
    steps = []
    first = sample(actor, prompts, Sampling(max_new_tokens=9, top_k=1), torch.zeros(3, 9), None, 0).tokens[0].tolist()
    end = next(token for token in first[2:] if token not in first[:2])
    sampler = GraphSampler(actor, Sampling(max_new_tokens=20, top_k=1), end, PAD)
    actor.lm.backbone.register_forward_pre_hook(lambda *args: steps.append(args))
    rollout = sampler(prompts, torch.zeros(3, 20))
    assert rollout.tokens.shape == (3, first.index(end) + 1) and rollout.mask.all()
    assert len(steps) == first.index(end) + 1, "the prompts, and each token but the last"


@cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_a_captured_graph_draws_what_eager_steps_draw(folder, lora, options, request):
    actor = make_actor(request.getfixturevalue(folder), lora).cuda()
    sampler = None
    for step, extra in enumerate((2, 0, 5)):
        prompts = left_padded(ROWS * 4, extra)
        prompts = type(prompts)(*(tensor.cuda() for tensor in prompts))
        eager, static, sampler = both(actor, prompts, options, step, sampler, "cuda")
        assert_same(eager, static, atol=1e-4)
        (decode,) = sampler._shapes.values()
        assert (decode.graph is None) == (options.get("max_new_tokens") == 1)


@cuda
def test_a_captured_graph_sees_weights_changed_in_place(gpt2_folder):
    actor, prompts = make_actor(gpt2_folder).cuda(), left_padded(ROWS)
    prompts = type(prompts)(*(tensor.cuda() for tensor in prompts))
    _, before, sampler = both(actor, prompts, {}, device="cuda")
    graph = next(iter(sampler._shapes.values())).graph
    with torch.no_grad():
        for parameter in actor.lm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    eager, after, _ = both(actor, prompts, {}, 0, sampler, "cuda")
    assert_same(eager, after, atol=1e-4)
    assert next(iter(sampler._shapes.values())).graph is graph and not torch.equal(before.logprobs, after.logprobs)
