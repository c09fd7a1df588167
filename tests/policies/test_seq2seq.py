"""Encoder-decoders as policies, against plain transformers: one row at a time, without padding."""

import pytest
import torch
from policy_cases import ROWS, left_padded
from seq2seq_models import KINDS, build
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    ActorCritic,
    CausalLM,
    FrozenCopy,
    LoRA,
    ModelSource,
    Responses,
    RolloutCopy,
    Sampling,
    Seq2SeqLM,
    greedy,
    load_policy,
    load_translator,
    sample,
)
from elastic_lightning.policies.loading import as_policy, disable_dropout
from elastic_lightning.policies.saving import save_model

PAD, EOS, VOCABULARY = 0, 1, 30
START = {"marian": 0, "bart": 1, "t5": 0}


@pytest.fixture(params=KINDS)
def model(request):
    return build(request.param, VOCABULARY, PAD, EOS, START[request.param])


@pytest.fixture(params=KINDS)
def folder(request, tmp_path, tokenizer_folder):
    from transformers import PreTrainedTokenizerFast

    build(request.param, VOCABULARY, PAD, EOS, START[request.param]).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    return str(tmp_path)


def responses(rows: int = 4, length: int = 5) -> Responses:
    """Random responses of different lengths, wrong tokens behind their ends."""
    tokens = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([1 + (length - 1 + row) % length for row in range(rows)])
    return Responses(tokens, torch.arange(length) < lengths[:, None])


@torch.no_grad()
def plain_logits(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits [T, V] that predict each response token, by the model's own forward on one row."""
    inputs = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=inputs).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_whole_model(model, extra, temperature):
    lm, answer = Seq2SeqLM(model), responses()
    prompts = left_padded(ROWS, extra, pad=29)
    hidden = lm.response_hidden(prompts, answer)
    logprobs, entropy = lm.token_statistics(hidden, answer, temperature)
    for i, row in enumerate(ROWS):
        tokens = answer.tokens[i][answer.mask[i]].tolist()
        expected = (plain_logits(model, row, tokens).double() / temperature).log_softmax(-1)
        picked = expected[range(len(tokens)), tokens].float()
        torch.testing.assert_close(logprobs[i, : len(tokens)], picked, atol=1e-5, rtol=1e-5)
        whole = -(expected.exp() * expected).sum(-1).float()
        torch.testing.assert_close(entropy[i, : len(tokens)], whole, atol=1e-5, rtol=1e-5)
        assert logprobs[i, len(tokens) :].eq(0).all()
        logits = lm.logits(hidden[i, : len(tokens)])
        torch.testing.assert_close(
            logits.log_softmax(-1)[range(len(tokens)), tokens], expected_at_one(model, row, tokens)
        )


def expected_at_one(model, row, tokens):
    return plain_logits(model, row, tokens).log_softmax(-1)[range(len(tokens)), tokens]


def test_the_gradient_is_that_of_the_whole_model(model):
    lm, answer = Seq2SeqLM(model), responses()
    prompts = left_padded(ROWS, extra=2, pad=29)
    total, _ = lm.token_loss(
        lm.response_hidden(prompts, answer), answer, lambda logprobs, entropy, part: -logprobs.sum()
    )
    total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for i, row in enumerate(ROWS):
        tokens = answer.tokens[i][answer.mask[i]].tolist()
        inputs = torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])
        logits = model(input_ids=torch.tensor([row]), decoder_input_ids=inputs).logits[0]
        nn.functional.cross_entropy(logits, torch.tensor(tokens), reduction="sum").backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_greedy_is_hugging_faces(model):
    prompts = left_padded(ROWS, extra=1, pad=29)
    tokens, mask = greedy(Seq2SeqLM(model), prompts, 12, EOS, PAD)
    for i, row in enumerate(ROWS):
        plain = model.generate(torch.tensor([row]), num_beams=1, do_sample=False, max_new_tokens=12, use_cache=False)[
            0, 1:
        ].tolist()
        assert tokens[i][mask[i]].tolist() == plain


@torch.no_grad()
@pytest.mark.parametrize("separate_value_trunk", [False, True])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5, "min_new_tokens": 3}])
def test_the_sampler_keeps_what_a_full_forward_gives(model, separate_value_trunk, truncation):
    actor = ActorCritic(Seq2SeqLM(model), separate_value_trunk)
    nn.init.normal_(actor.value_head.weight)
    prompts = left_padded(ROWS * 4, pad=29)
    sampling = Sampling(max_new_tokens=8, temperature=0.8, **truncation)
    uniforms = torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
    rollout = sample(actor, prompts, sampling, uniforms, EOS, PAD)
    whole = actor.evaluate(prompts, rollout.responses, sampling.temperature)
    torch.testing.assert_close(rollout.logprobs, whole.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.values, whole.values.masked_fill(~rollout.mask, 0), atol=1e-5, rtol=1e-5)
    more = sample(actor, left_padded(ROWS * 4, extra=5, pad=29), sampling, uniforms, EOS, PAD)
    assert torch.equal(more.tokens, rollout.tokens)


def test_dropout_is_off_even_under_gradient_checkpointing(model):
    disable_dropout(model)
    prompts, answer = left_padded(ROWS), responses()
    gradients = []
    for checkpointing in (False, True):
        lm = Seq2SeqLM(model, gradient_checkpointing=checkpointing)
        total, _ = lm.token_loss(
            lm.response_hidden(prompts, answer), answer, lambda logprobs, entropy, part: logprobs.sum()
        )
        total.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
        model.zero_grad()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_copies(model):
    lm = Seq2SeqLM(model)
    reference, low = FrozenCopy(lm), RolloutCopy(lm, torch.bfloat16)
    prompts, answer = left_padded(ROWS), responses()
    before = lm.response_logits(prompts, answer)
    for parameter in model.parameters():
        if parameter.requires_grad:  # what is not trained is shared
            parameter += 0.1
    assert torch.equal(reference.response_logits(prompts, answer), before)
    low.refresh(lm)
    for ours, theirs in zip(low.lm.parameters(), lm.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())


def test_a_folder_is_loaded_as_what_it_is(folder, gpt2_folder):
    loaded = load_policy(folder)
    assert isinstance(as_policy(loaded.model), Seq2SeqLM) and isinstance(
        as_policy(load_policy(gpt2_folder).model), CausalLM
    )
    with pytest.raises(UserError, match="decoder-only"):
        as_policy(loaded.model, trainable_layers=1)
    with pytest.raises(UserError, match="no encoder-decoder"):
        load_translator(ModelSource(gpt2_folder))


@torch.no_grad()
def test_lora_and_saving(folder, tmp_path):
    loaded = load_policy(folder, lora=LoRA(rank=2))
    lm = as_policy(loaded.model)
    trained = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    prompts, answer = left_padded(ROWS), responses()
    start = lm.response_logits(prompts, answer)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    moved = lm.response_logits(prompts, answer)
    assert not torch.allclose(moved, start, atol=1e-3)
    with lm.adapter_off():
        assert torch.equal(lm.response_logits(prompts, answer), start)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "merged")
    merged = as_policy(load_policy(str(tmp_path / "merged")).model)
    torch.testing.assert_close(merged.response_logits(prompts, answer), moved, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture",
    [
        {
            "model_type": "marian",
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "max_position_embeddings": 32,
        },
        {"model_type": "t5", "d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2},
    ],
)
def test_an_architecture_can_generate_and_be_saved(architecture, tokenizer_folder, tmp_path):
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2} if "encoder_layers" in architecture else {}
    loaded = load_policy(architecture=architecture | heads, tokenizer=tokenizer_folder)
    config = loaded.model.config
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (PAD, EOS, PAD)
    assert config.vocab_size == VOCABULARY
    save_model(loaded.model, loaded.tokenizer, tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    prompts = left_padded(ROWS[:1])
    tokens, mask = greedy(as_policy(loaded.model), prompts, 6, EOS, PAD)
    plain = again.generate(prompts.tokens, num_beams=1, do_sample=False, max_new_tokens=6)[0, 1:].tolist()
    assert tokens[mask].tolist() == plain


def test_architectures_that_change_their_logits_are_refused(model):
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    model.forward = capped
    with pytest.raises(UserError, match="changes its logits"):
        Seq2SeqLM(model)


def test_a_model_that_cannot_begin_is_refused(model):
    vars(model.config)["decoder_start_token_id"] = None
    with pytest.raises(UserError, match="decoder_start_token_id"):
        Seq2SeqLM(model)


def test_the_context_of_encoder_and_decoder():
    lm = Seq2SeqLM(build("marian", VOCABULARY, PAD, EOS, PAD))
    lm.check_context(48, 48)
    with pytest.raises(UserError, match=r"prompts of 49 tokens.*max_prompt_tokens"):
        lm.check_context(49, 1)
    with pytest.raises(UserError, match=r"responses of 49 tokens.*max_new_tokens"):
        lm.check_context(1, 49)
    Seq2SeqLM(build("t5", VOCABULARY, PAD, EOS, PAD)).check_context(1000, 1000)  # relative positions
