"""Against what plain tokenizers and plain models do: what stands around a text, what ends one, what has no text."""

import pytest
import torch
from policy_cases import left_padded
from tokenizer_kinds import CAUSAL, ENDS, KINDS, save_kind, sentences
from transformers import AutoModelForCausalLM

from elastic_lightning.policies import (
    ActorCritic,
    GraphSampler,
    Responses,
    Sampling,
    as_policy,
    greedy,
    load_policy,
    load_tokenizer,
    sample,
)
from elastic_lightning.policies.special_tokens import Frame, encode_open, encode_whole
from elastic_lightning.policies.text import decode_texts, ended

TEXTS = [*sentences(4, seed=1), "good", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_tokenizer_puts_around_a_text(kind):
    tokenizer = KINDS[kind]()
    tokenizer.truncation_side = "left"
    assert encode_whole(tokenizer, TEXTS) == tokenizer(TEXTS)["input_ids"]
    cut = tokenizer(TEXTS, truncation=True, max_length=5)["input_ids"]
    assert encode_whole(tokenizer, TEXTS, longest=5) == cut
    after = {"wordpiece": 1, "t5": 1, "marian": 1}.get(kind, 0)
    assert encode_open(tokenizer, TEXTS) == [ids[: len(ids) - after] for ids in tokenizer(TEXTS)["input_ids"]]
    assert encode_open(tokenizer, TEXTS, longest=5 - after) == [ids[: len(ids) - after] for ids in cut]
    once = tokenizer(TEXTS, add_special_tokens=True)["input_ids"]
    spelled = tokenizer.batch_decode(once)  # as some chat templates spell it out
    if kind in ("llama", "two ends"):
        assert all(len(ids) <= len(tokenizer(text)["input_ids"]) - 1 for ids, text in zip(once, spelled, strict=True))
        assert all(ids.count(once[0][0]) == 1 for ids in encode_open(tokenizer, spelled))


def test_an_unknown_word_is_no_special_token(word_tokenizer):
    """A vocabulary of words has the same token for an unknown word as before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
    template = TemplateProcessing(single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    assert Frame.of(tokenizer) == ([2], [1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for kind in CAUSAL:
        made[kind] = str(tmp_path_factory.mktemp("kind"))
        save_kind(kind, made[kind])
    return made


PROMPTS = left_padded([[9, 8, 7], [11], [5, 20, 30, 12], [6, 10]] * 5)
WAYS = [{}, {"top_k": 1}, {"top_p": 0.7, "temperature": 0.8}, {"min_new_tokens": 3}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["two ends", "wordpiece"])
def test_every_end_ends_and_what_has_no_text_is_not_drawn(folders, kind, way):
    model, tokenizer, _ = load_policy(folders[kind])
    ends = tokenizer.convert_tokens_to_ids(ENDS[kind])
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 3  # ids without text are likely
        model.lm_head.weight[ends] *= 2
    actor, sampling = ActorCritic(as_policy(model)).eval(), Sampling(max_new_tokens=12, **way)
    uniforms = torch.rand(20, 12, generator=torch.Generator().manual_seed(0))
    drawn = actor.lm.drawn_tokens(tokenizer)
    assert drawn.eos_token_id == tuple(ends) and drawn.textless.tolist() == list(range(len(tokenizer), 128))
    rollout = sample(actor, PROMPTS, sampling, uniforms, **drawn._asdict())
    captured = GraphSampler(actor, sampling, **drawn._asdict())(PROMPTS, uniforms)
    torch.testing.assert_close(captured.tokens, rollout.tokens)
    torch.testing.assert_close(captured.logprobs, rollout.logprobs, atol=1e-4, rtol=0)
    number = []
    for prompt, keep, tokens, mask, logprobs in zip(*PROMPTS, *rollout[:3], strict=True):
        response, prompt = tokens[mask].tolist(), prompt[keep].tolist()
        first = next((at for at, token in enumerate(response) if token in ends), None)
        assert len(response) == (12 if first is None else first + 1)
        assert first is None or first >= sampling.min_new_tokens
        assert max(response) < len(tokenizer)
        plain = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        scores = (plain / sampling.temperature).log_softmax(-1)  # untruncated, as the update has it
        expected = scores.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[mask], expected.detach(), atol=1e-4, rtol=0)
        if way.get("top_k") == 1:
            plain[:, len(tokenizer) :] = -torch.inf
            assert plain.argmax(-1).tolist() == response
        number.append(first)
    assert way.get("top_k") == 1 or len(set(number)) > 2  # some end early
    texts = actor.lm.decode(tokenizer, PROMPTS, rollout.responses)
    assert texts.complete == [first is not None for first in number]
    assert torch.equal(ended(rollout.responses, ends), torch.tensor(texts.complete))
    if way.get("top_k") == 1:
        assert torch.equal(greedy(actor.lm, PROMPTS, 12, **drawn._asdict()).tokens, rollout.tokens)


def test_a_draw_is_that_of_the_tokens_with_text(folders):
    """Uniform numbers in order draw the tokens in order, each as often as its share of what may be drawn."""
    model, tokenizer, _ = load_policy(folders["llama"])
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 4
    actor, number = ActorCritic(as_policy(model)).eval(), 4000
    uniforms = (torch.arange(number)[:, None] + 0.5) / number
    prompts = left_padded([[5, 20, 30]] * number)
    drawn = actor.lm.drawn_tokens(tokenizer)._asdict()
    tokens = sample(actor, prompts, Sampling(max_new_tokens=1), uniforms, **drawn).tokens[:, 0]
    logits = model(input_ids=torch.tensor([[5, 20, 30]])).logits[0, -1, : len(tokenizer)]
    expected = logits.detach().softmax(-1)
    torch.testing.assert_close(tokens.bincount(minlength=len(tokenizer)) / number, expected, atol=1 / number, rtol=0)


def test_a_config_that_nobody_set_ends_nothing(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.generation_config.eos_token_id = [50256]  # GPT2Config's, outside this vocabulary
    model.save_pretrained(tmp_path)
    load_tokenizer(folders["llama"]).save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path))
    assert as_policy(loaded.model).ends(loaded.tokenizer) == (loaded.tokenizer.eos_token_id,)


def test_special_tokens_within_a_text_are_kept_on_request():
    tokenizer = KINDS["two ends"]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ends = tokenizer.convert_tokens_to_ids(ENDS["two ends"])
    written = "<think>bad</think>good"
    rows = [tokenizer("the film", add_special_tokens=True)["input_ids"]]
    responses = [tokenizer(written, add_special_tokens=False)["input_ids"] + [ends[1]]]
    prompts, (tokens, mask) = left_padded(rows, extra=2), left_padded(responses)
    plain = decode_texts(tokenizer, prompts, Responses(tokens, mask), ends)
    marked = decode_texts(tokenizer, prompts, Responses(tokens, mask), ends, special_tokens=True)
    assert "think>" not in "".join((*plain.prompts, *plain.responses)) and plain.complete == marked.complete == [True]
    text = marked.prompts[0] + marked.responses[0]
    assert tokenizer(text)["input_ids"] == [*rows[0], *responses[0][:-1]] and "</think>" in text
