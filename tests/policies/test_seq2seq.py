"""What only an encoder-decoder does; what it has in common with causal models is tested beside them."""

import functools

import pytest
import torch
from policy_cases import ROWS, SEQ2SEQ, left_padded, plain_logits
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    ActorCritic,
    ModelSource,
    PairedTexts,
    Responses,
    Sampling,
    Seq2SeqLM,
    as_policy,
    load_policy,
    load_translator,
    sample,
)
from elastic_lightning.policies.loading import disable_dropout

RESPONSES = Responses(
    torch.tensor([[3, 4, 5, 1], [6, 1, 9, 9], [9, 9, 2, 17], [28, 0, 1, 7]]),
    torch.tensor([[True] * 4, [True, True, False, False], [True] * 4, [True, True, True, False]]),
)


@pytest.fixture(params=SEQ2SEQ)
def model(request):
    return load_policy(request.getfixturevalue(request.param)).model


def greedy(lm, prompts, length=10):
    uniforms = torch.zeros(len(prompts.tokens), length)
    return sample(ActorCritic(lm), prompts, Sampling(max_new_tokens=length, top_k=1), uniforms, 1, 0)


def negative_log_likelihood(lm):
    """Of the responses, with gradients."""
    hidden = lm.response_hidden(left_padded(ROWS, extra=2), RESPONSES)
    return lm.token_loss(hidden, RESPONSES, lambda logprobs, entropy, part: -logprobs.sum())[0]


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


def test_greedy_decoding_is_that_of_generate(model):
    rollout = greedy(Seq2SeqLM(model), left_padded(ROWS, extra=3))
    assert len({tuple(row) for row in rollout.tokens.tolist()}) > 1
    for i, row in enumerate(ROWS):
        options = {"num_beams": 1, "do_sample": False, "use_cache": False, "max_new_tokens": 10}
        generated = model.generate(input_ids=torch.tensor([row]), **options)[0, 1:]
        assert rollout.tokens[i][rollout.mask[i]].tolist() == generated.tolist()


def test_gradients_are_those_of_the_whole_model(model):
    ours = gradients_of(negative_log_likelihood(Seq2SeqLM(model)), model)
    total = 0
    for row, tokens, mask in zip(ROWS, *RESPONSES, strict=True):
        target = tokens[mask]
        before = torch.tensor([[model.config.decoder_start_token_id, *target[:-1].tolist()]])
        logits = model(input_ids=torch.tensor([row]), decoder_input_ids=before).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    assert_same_gradients(ours, gradients_of(total, model))


def test_the_statistics_of_pairs_are_those_of_the_whole_model(model):
    logprobs = Seq2SeqLM(model).pair_statistics(PairedTexts(left_padded(ROWS, extra=1), RESPONSES)).logprobs
    for i, row in enumerate(ROWS):
        target = RESPONSES.tokens[i][RESPONSES.mask[i]]
        expected = plain_logits(model, row, target.tolist()).log_softmax(-1)[range(len(target)), target]
        torch.testing.assert_close(logprobs[i][RESPONSES.mask[i]], expected, atol=1e-5, rtol=0)
    assert not logprobs[~RESPONSES.mask].any()


def test_text_without_a_source_has_no_statistics(model):
    with pytest.raises(UserError, match="PairedTexts"):
        Seq2SeqLM(model).next_token_statistics(torch.tensor([[3, 4, 5]]))


def test_the_prompt_is_read_once(model):
    lm, calls = Seq2SeqLM(model), {"encoder": 0, "written": [], "keys of the source": 0}
    model.get_encoder().register_forward_hook(lambda *args: calls.update(encoder=calls["encoder"] + 1))
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: calls["written"].append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    names = ("encoder_attn.k_proj", "EncDecAttention.k")
    for name, module in model.named_modules():
        if name.endswith(names):
            module.register_forward_hook(lambda *args: calls.update({(k := "keys of the source"): calls[k] + 1}))
    state, _ = lm.start(left_padded(ROWS), new_tokens=4)
    keys = [layer.keys.data_ptr() for layer in state.cache.self_attention_cache.layers]
    for _ in range(4):
        lm.step(state, torch.tensor([5, 6, 7, 8]))
    assert calls == {"encoder": 1, "written": [1] * 5, "keys of the source": 3}
    assert keys == [layer.keys.data_ptr() for layer in state.cache.self_attention_cache.layers], "allocated once"
    with pytest.raises(IndexError, match="holds 5 tokens"):
        lm.step(state, torch.tensor([5, 6, 7, 8]))


def test_gradient_checkpointing_recomputes_and_leaves_dropout_off(model):
    """Transformers recomputes in training mode alone, in which Marian's and BART's layers drop by their own rates."""
    disable_dropout(model)
    gradients, runs, ran = [], [], []
    for half in (model.get_encoder(), model.get_decoder()):
        norm = next(module for name, module in half.named_modules() if name.endswith("layer_norm"))
        norm.register_forward_hook(lambda *args: ran.append(1))
    for checkpointing in (False, True):
        lm = Seq2SeqLM(model, gradient_checkpointing=checkpointing)
        ran.clear()
        gradients.append(gradients_of(negative_log_likelihood(lm), model))
        assert not any(module.training for module in model.modules())
        runs.append(len(ran))
    assert runs == [2, 4], "a layer of the encoder and one of the decoder"
    assert_same_gradients(*gradients)


def test_compiling_the_update_makes_one_graph_for_all_lengths(marian_folder, monkeypatch):
    """As far as capturing goes: generating code would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    fields = AutoConfig.from_pretrained(marian_folder).to_dict() | {"encoder_layers": 1, "decoder_layers": 1}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**fields)).eval()
    plain, lm = Seq2SeqLM(model), Seq2SeqLM(model)
    lm.compile_update()
    for rows, extra, length in ((4, 0, 3), (4, 2, 2), (2, 5, 4)):
        prompts = left_padded(ROWS[:rows], extra)
        responses = Responses(*(part[:rows, :length] for part in RESPONSES))
        hidden = [each.response_hidden(prompts, responses) for each in (lm, plain)]
        torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)
        assert all(each.requires_grad for each in hidden)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_context_limits_prompts_and_responses_apart(marian_folder, t5_folder):
    lm = Seq2SeqLM(load_policy(marian_folder).model)
    lm.check_context(40, 40)
    with pytest.raises(UserError, match=r"prompts of 41 tokens .* context is 40 .*shorten the prompts"):
        lm.check_context(41, 1)
    with pytest.raises(UserError, match=r"responses of 41 tokens .*max_new_tokens"):
        lm.check_context(1, 41)
    state, _ = lm.start(left_padded([[5] * 40]), new_tokens=39)
    for _ in range(39):
        lm.step(state, torch.tensor([5]))
    Seq2SeqLM(load_policy(t5_folder).model).check_context(10_000, 10_000)  # its positions are relative


# Where logits come from


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("folder", SEQ2SEQ)
def test_logits_are_the_models_own_in_any_precision(folder, dtype, request):
    model = load_policy(request.getfixturevalue(folder), dtype=dtype).model
    lm, row, response = Seq2SeqLM(model), ROWS[2], [3, 4, 5]
    with torch.no_grad():
        hidden = lm.response_hidden(left_padded([row]), Responses(torch.tensor([response]), torch.ones(1, 3).bool()))
        assert torch.equal(lm.logits(hidden)[0], plain_logits(model, row, response))


@pytest.mark.parametrize(("fields", "scale"), [({}, 0.25), ({"scale_decoder_outputs": False}, 1)], ids=["T5", "v1.1"])
def test_the_scale_of_the_hidden_states_is_found(t5_folder, fields, scale):
    model = load_policy(t5_folder).model
    for name, value in fields.items():
        setattr(model.config, name, value)
    assert Seq2SeqLM(model).hidden_scale == scale


def test_models_that_change_their_logits_are_refused(model):
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    with pytest.raises(UserError, match="soft-capping or scaling"):
        Seq2SeqLM(model)


@pytest.mark.parametrize("pad", [0, 1])
def test_positions_that_depend_on_pad_tokens_are_refused(bart_folder, pad):
    """M2M-100's positions skip pad tokens, which a policy may draw; NLLB's pad token is 1."""
    fields = AutoConfig.from_pretrained(bart_folder).to_dict() | {"model_type": "m2m_100", "pad_token_id": pad}
    with pytest.raises(UserError, match="skip pad tokens"):
        Seq2SeqLM(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**fields)).eval())


def test_a_decoder_that_cannot_start_is_refused(t5_folder):
    model = load_policy(t5_folder).model
    del model.config.decoder_start_token_id
    assert Seq2SeqLM(model).start_token == model.generation_config.decoder_start_token_id == 0
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        Seq2SeqLM(model)


def test_a_translator_is_an_encoder_decoder(gpt2_folder, marian_folder):
    assert isinstance(load_translator(ModelSource(marian_folder)).lm, Seq2SeqLM)
    with pytest.raises(UserError, match="no encoder-decoder"):
        load_translator(ModelSource(gpt2_folder))


def test_what_is_for_causal_models_is_refused(model):
    with pytest.raises(UserError, match="trainable_layers is for decoder-only models"):
        as_policy(model, trainable_layers=1)
    assert not Seq2SeqLM(model).takes_static_masks(64)


def test_building_a_policy_draws_no_random_numbers_and_leaves_no_hooks(model):
    state = torch.get_rng_state()
    Seq2SeqLM(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
