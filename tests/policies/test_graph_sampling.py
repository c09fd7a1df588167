"""The static step against eager decoding: uncaptured on a CPU, captured where there is CUDA."""

import pytest
import torch
from policy_cases import ROWS, left_padded, make_actor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ActorCritic, CausalLM, GraphSampler, Prompts, Sampling, counter_uniforms, sample
from elastic_lightning.policies.graph_sampling import _StaticDecode
from elastic_lightning.policies.static_steps import static_steps_agree

EOS, PAD = 1, 0
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.7, "min_new_tokens": 4},
    {"min_new_tokens": 12},
    {"max_new_tokens": 1},
]
ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def both(actor, prompts, options=None, step=0, sampler=None):
    """Rollouts of the eager loop and of the static step under the same uniforms, on the policy's device."""
    device = next(actor.parameters()).device
    sampling = Sampling(**{"max_new_tokens": 12} | (options or {}))
    uniforms = counter_uniforms(3, step, torch.arange(len(prompts.tokens), device=device), sampling.max_new_tokens)
    prompts = Prompts(*(tensor.to(device) for tensor in prompts))
    sampler = sampler or GraphSampler(actor, sampling, EOS, PAD)
    return sample(actor, prompts, sampling, uniforms, EOS, PAD), sampler(prompts, uniforms), sampler


def assert_same(eager, static, atol=None):
    assert torch.equal(static.tokens, eager.tokens) and torch.equal(static.mask, eager.mask)
    atol = atol or (3e-5 if static.tokens.device.type == "cpu" else 1e-4)
    torch.testing.assert_close(static.logprobs, eager.logprobs, atol=atol, rtol=0)
    torch.testing.assert_close(static.values, eager.values, atol=atol, rtol=0)


def only(sampler):
    """The buffers that a sampler holds; they hold a graph where there is CUDA."""
    (decode,) = sampler._shapes.values()
    steps = sampler.sampling.max_new_tokens > 1
    assert (decode.graph is not None) == (steps and decode.tokens.device.type == "cuda")
    return decode


def scratch(model_type, **options):
    """A random policy of an architecture, with attention that matters."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    config = AutoConfig.for_model(model_type, **{"vocab_size": 30} | size | special | options)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return ActorCritic(CausalLM(model)).eval()


LLAMA = {"intermediate_size": 32, "num_key_value_heads": 2}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
LONG = {"rope_type": "longrope", "long_factor": [5.0, 7.0], "short_factor": [1.0, 1.0], "rope_theta": 1e4}


@ON_EACH_DEVICE
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_static_steps_draw_what_eager_steps_draw(folder, lora, options, device, request):
    actor, sampler = make_actor(request.getfixturevalue(folder), lora).to(device), None
    for step, extra in enumerate((2, 0, 5) if device == "cuda" else (2,)):  # a graph is to be used again
        eager, static, sampler = both(actor, left_padded(ROWS * 4, extra), options, step, sampler)
        assert_same(eager, static)
        only(sampler)


@ON_EACH_DEVICE
def test_a_value_trunk(gpt2_folder, device):
    eager, static, _ = both(make_actor(gpt2_folder, separate_value_trunk=True).to(device), left_padded(ROWS))
    assert_same(eager, static)


@ON_EACH_DEVICE
def test_buffers_serve_batches_of_like_shape_and_keep_nothing_of_the_one_before(llama_folder, device):
    actor = make_actor(llama_folder).to(device)
    _, first, sampler = both(actor, left_padded(ROWS))
    kept, decode = first.tokens.clone(), only(sampler)
    for step, prompts in enumerate([left_padded(ROWS[::-1]), left_padded(ROWS, extra=9), left_padded([[7]] * 4)]):
        assert_same(*both(actor, prompts, {}, step, sampler)[:2])
        assert only(sampler) is decode
    assert torch.equal(first.tokens, kept), "an earlier rollout must not be overwritten"
    assert_same(*both(actor, left_padded(ROWS * 2), {}, 0, sampler)[:2])
    assert only(sampler) is not decode


@ON_EACH_DEVICE
def test_buffers_born_in_a_validation_serve_the_training(gpt2_folder, device):
    """Lightning validates in inference mode, whose tensors cannot be written to outside."""
    actor, prompts = make_actor(gpt2_folder).to(device), left_padded(ROWS)
    with torch.inference_mode():
        _, first, sampler = both(actor, prompts)
    assert not first.logprobs.is_inference()
    assert_same(*both(actor, prompts, {}, 1, sampler)[:2])


def change_(actor):
    """Other weights in the same places."""
    with torch.no_grad():
        for parameter in actor.lm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)


@ON_EACH_DEVICE
def test_weights_changed_in_place_are_seen(gpt2_folder, device):
    actor, prompts = make_actor(gpt2_folder).to(device), left_padded(ROWS)
    _, before, sampler = both(actor, prompts)
    decode = only(sampler)
    change_(actor)
    eager, after, _ = both(actor, prompts, {}, 0, sampler)
    assert_same(eager, after)
    assert only(sampler) is decode and not torch.equal(before.logprobs, after.logprobs)


@ON_EACH_DEVICE
def test_weights_that_have_moved_are_captured_anew(gpt2_folder, device):
    """Lightning moves them between a fit and the next; a graph would read where they were."""
    actor, prompts = make_actor(gpt2_folder).to(device), left_padded(ROWS)
    _, _, sampler = both(actor, prompts)
    decode = only(sampler)
    moved = [parameter.data for parameter in actor.parameters()]
    for parameter, old in zip(actor.parameters(), moved, strict=True):
        parameter.data = old.clone()
        old.fill_(torch.nan)
    assert_same(*both(actor, prompts, {}, 1, sampler)[:2])
    assert only(sampler) is not decode


@ON_EACH_DEVICE
def test_autocast_keeps_no_weight_from_before_it_changed(gpt2_folder, device):
    """What autocast has cast it keeps till its outermost context ends: a graph would read that for ever."""
    actor, prompts = make_actor(gpt2_folder).to(device), left_padded(ROWS)
    with torch.autocast(device, torch.bfloat16, cache_enabled=True):
        _, before, sampler = both(actor, prompts)
        decode = only(sampler)
        change_(actor)
        _, after, _ = both(actor, prompts, {}, 0, sampler)
        assert only(sampler) is decode
    with torch.autocast(device, torch.bfloat16):  # a cache of its own, empty
        _, anew, _ = both(actor, prompts)
    assert_same(anew, after)
    assert not torch.equal(before.logprobs, after.logprobs)


@ON_EACH_DEVICE
def test_with_and_without_autocast_buffers_are_of_another_type(gpt2_folder, device):
    actor, prompts = make_actor(gpt2_folder).to(device), left_padded(ROWS)
    with torch.autocast(device, torch.bfloat16):
        _, _, sampler = both(actor, prompts)
        assert only(sampler).cache.layers[0].keys.dtype == torch.bfloat16
    assert_same(*both(actor, prompts, {}, 1, sampler)[:2])


@ON_EACH_DEVICE
@pytest.mark.parametrize(
    ("model_type", "options", "agree"),
    [
        ("gpt2", {}, True),
        ("llama", LLAMA, True),
        ("falcon", {"alibi": False}, True),
        ("falcon", {"alibi": True}, False),  # takes the shape of its mask for that of the text
        ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 4}, False),  # counts from the end of the cache, in numbers
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_architecture_that_makes_more_of_a_mask_is_refused(model_type, options, agree, device):
    actor, prompts = scratch(model_type, **options).to(device), left_padded(ROWS)
    assert bool(static_steps_agree(actor.lm)) == agree
    if agree:
        assert_same(*both(actor, prompts)[:2])
    else:
        with pytest.raises(UserError, match=f"{model_type} needs more than a mask"):
            GraphSampler(actor, Sampling(), EOS, PAD)


def test_half_precision_is_not_taken_for_a_difference(gpt2_folder, llama_folder):
    assert all(static_steps_agree(make_actor(folder).lm.bfloat16()) for folder in (gpt2_folder, llama_folder))


def test_longrope_past_its_first_length_and_chunked_attention_take_no_static_masks():
    first = {"original_max_position_embeddings": 64}
    phi = scratch("phi3", **LLAMA, **first, rope_parameters=LONG | first).lm
    assert phi.takes_static_masks(64) and not phi.takes_static_masks(128)
    llama = scratch("llama", **LLAMA).lm
    assert llama.takes_static_masks(128)
    llama.config.attention_chunk_size = 100
    assert llama.takes_static_masks(64) and not llama.takes_static_masks(128)


class NothingFromTheCPU(TorchFunctionMode):
    """Raises where numbers that Python holds are made a tensor: on a GPU a copy that is waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            raise AssertionError(f"a step makes a tensor of {args[0]}")
        return function(*args, **(kwargs or {}))


def start_without_numbers(sampler):
    """Decode with tensors that have shapes alone: whatever asks for a number, as no captured step may, raises."""
    for module in (sampler.lm, sampler.policy.value_head):
        for part in module.modules():
            for name, tensor in part._parameters.items():
                part._parameters[name] = None if tensor is None else torch.nn.Parameter(torch.empty(tensor.shape))
            for name, tensor in part._buffers.items():
                part._buffers[name] = None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype)
    sampler.textless = torch.zeros(2, dtype=torch.int64)
    prompts = Prompts(torch.zeros(4, 9, dtype=torch.int64), torch.ones(4, 9, dtype=torch.bool))
    decode, steps = _StaticDecode(sampler, 4, 64, torch.device("cpu")), sampler.sampling.max_new_tokens
    decode.start(prompts, torch.zeros(4, steps), torch.full((4,), steps))
    return decode


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "top_p": 0.7, "min_new_tokens": 4, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "falcon"])
def test_a_step_asks_for_no_number(model_type, options):
    actor = scratch(model_type, **(LLAMA if model_type == "llama" else {}))
    sampler = GraphSampler(actor, Sampling(**{"max_new_tokens": 12} | options), [EOS, 2], PAD)
    with FakeTensorMode(), torch.no_grad():
        decode = start_without_numbers(sampler)
        decode._draw()
        with NothingFromTheCPU():
            decode._step()


def test_that_test_sees_a_step_that_does():
    actor = scratch("llama", **LLAMA, **DYNAMIC)
    sampler = GraphSampler(actor, Sampling(max_new_tokens=12), EOS, PAD)
    with FakeTensorMode(), torch.no_grad(), pytest.raises(DataDependentOutputException):
        start_without_numbers(sampler)
    with NothingFromTheCPU(), pytest.raises(AssertionError, match="of \\[3\\]"):
        torch.tensor([3])


@pytest.mark.cuda
def test_a_step_that_waits_for_the_device_is_not_captured():
    actor = scratch("llama", **LLAMA, **DYNAMIC).cuda()
    with pytest.warns(UserWarning, match="waits for the GPU within a step"):
        eager, static, sampler = both(actor, left_padded(ROWS))
    assert_same(eager, static)
    assert next(iter(sampler._shapes.values())).graph is None


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
