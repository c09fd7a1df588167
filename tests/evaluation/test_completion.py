"""Completions of a policy: those of `generate` and of transformers, and ended early where they hold a stop string."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.completion import PolicyCompleter
from elastic_lightning.evaluation.generate import generate, load
from elastic_lightning.policies import Sampling

PROMPTS = ["w3 w4", "w9", "w21 w22 w23", "w5", "w6"]


def test_rows_are_those_of_generate(gpt2_folder):
    """Also over several calls, each of which goes on with the random numbers."""
    sampling = Sampling(max_new_tokens=8, temperature=0.8, top_p=0.9)
    expected = [row["response"] for row in generate(*load(gpt2_folder), PROMPTS, sampling, seed=5)]
    completer = PolicyCompleter.load(gpt2_folder, sampling, seed=5)
    assert completer.complete(PROMPTS[:2]) + completer.complete(PROMPTS[2:]) == expected
    assert completer.complete(PROMPTS) != expected


def test_greedy_is_that_of_transformers(gpt2_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2_folder), AutoTokenizer.from_pretrained(gpt2_folder)
    completer = PolicyCompleter.load(gpt2_folder, Sampling(max_new_tokens=8, top_k=1))
    for prompt, completion in zip(PROMPTS, completer.complete(PROMPTS), strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0]
        assert prompt + completion == tokenizer.decode(whole, skip_special_tokens=True)


def test_stop_strings_end_a_row(gpt2_folder):
    sampling = Sampling(max_new_tokens=24)
    whole = PolicyCompleter.load(gpt2_folder, sampling).complete(PROMPTS)
    word = whole[0].split()[2]
    steps = []
    completer = PolicyCompleter.load(gpt2_folder, sampling, stops=[f"{word}"])
    stopped, step = completer.complete(PROMPTS), completer.policy.lm.step
    for long, short in zip(whole, stopped, strict=True):
        at = long.find(word)
        assert short == (long if at < 0 else long[: at + len(word)])
    assert any(len(short) < len(long) for long, short in zip(whole, stopped, strict=True))

    def counted(*arguments):
        steps.append(1)
        return step(*arguments)

    completer = PolicyCompleter.load(gpt2_folder, sampling, stops=[f"{word}"])
    completer.policy.lm.step = counted
    completer.complete(PROMPTS[:1])
    assert len(steps) == len(stopped[0].split()) - 1  # no step after the last row has ended


def test_context(gpt2_folder):
    completer = PolicyCompleter.load(gpt2_folder, Sampling(max_new_tokens=60))
    completer.check(PROMPTS[1:2])
    for call in (completer.check, completer.complete):
        with pytest.raises(UserError, match="5 tokens and 60 new ones make 65, but the model's context is 64"):
            call(["w3", "w3 w4 w5 w6 w7"])


def test_special_tokens_of_the_tokenizer(llama_folder):
    """A tokenizer that begins each text with a token of its own does so here."""
    from tokenizers.processors import TemplateProcessing

    policy, tokenizer = load(llama_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    completer = PolicyCompleter(policy, tokenizer, Sampling(max_new_tokens=4, top_k=1))
    [completion] = completer.complete(["w3 w4"])
    assert (
        completer.complete(["w3 w4"])
        == [completion]
        != PolicyCompleter.load(llama_folder, completer.sampling).complete(["w3 w4"])
    )
    with torch.no_grad():
        whole = policy.lm.model.generate(torch.tensor([[tokenizer.eos_token_id, 3, 4]]), max_new_tokens=4)[0]
    assert completion.split() == tokenizer.decode(whole[3:], skip_special_tokens=True).split()
