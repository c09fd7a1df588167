"""Likelihood of texts under another model: against a loop over single texts and tokens."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from elastic_lightning.errors import UserError
from elastic_lightning.metrics import LanguageModelNLL

EOS = 1
TEXTS = ["w3 w4 w5", "", "w9", "w20 w21 w3 w7 w8 w9 w10", "w5", "", "w12 w13 nonsense"]
COMPLETE = [True, True, False, True, True, False, False]


def ids(text):
    return [int(word[1:]) if word[1:].isdigit() else 2 for word in text.split()]


@torch.no_grad()
def brute_force(folder, texts=TEXTS, complete=COMPLETE, begin=EOS, longest=64):
    """Nats and tokens, one forward for each token of each text."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = []
    for text, ended in zip(texts, complete, strict=True):
        before = [begin]
        for token in (ids(text) + [EOS] * ended)[:longest]:
            logits = model(torch.tensor([before])).logits[0, -1].double()
            nats.append(-torch.log_softmax(logits, -1)[token].item())
            before.append(token)
    return sum(nats), len(nats)


def fed(metric, texts=TEXTS, complete=COMPLETE):
    metric.update([""] * len(texts), texts, complete)
    return metric


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_it_is_the_loops_number(request, folder, size):
    path = request.getfixturevalue(folder)
    nats, tokens = brute_force(path)
    metric = fed(LanguageModelNLL(path, batch_size=size))
    assert metric.tokens.item() == tokens == 3 + 1 + 1 + 1 + 7 + 1 + 2 + 3
    assert metric.compute().item() == pytest.approx(nats / tokens, rel=1e-5)
    assert metric.perplexity().item() == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_prompts_are_not_read(gpt2_folder):
    metric, other = LanguageModelNLL(gpt2_folder), LanguageModelNLL(gpt2_folder)
    metric.update(["w3"] * 7, TEXTS, COMPLETE)
    assert metric.compute() == fed(other).compute()


def test_a_text_begins_with_its_own_token_where_there_is_one(gpt2_folder, word_tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    word_tokenizer(bos_token="w29", eos_token="<eos>", pad_token="<pad>").save_pretrained(tmp_path)
    nats, tokens = brute_force(gpt2_folder, begin=29)
    assert nats != pytest.approx(brute_force(gpt2_folder)[0], rel=1e-3)
    assert fed(LanguageModelNLL(str(tmp_path))).compute().item() == pytest.approx(nats / tokens, rel=1e-5)


def test_a_tokenizer_without_beginning_and_end_is_refused(gpt2_folder, word_tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    word_tokenizer(pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither bos_token nor eos_token"):
        LanguageModelNLL(str(tmp_path))


def test_a_long_text_counts_up_to_the_context(gpt2_folder):
    text = " ".join(f"w{3 + position % 27}" for position in range(70))
    nats, tokens = brute_force(gpt2_folder, [text], [True])
    metric = fed(LanguageModelNLL(gpt2_folder), [text], [True])
    assert metric.tokens.item() == tokens == 64
    assert metric.compute().item() == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_tokens_there_is_no_number(gpt2_folder):
    metric = LanguageModelNLL(gpt2_folder)
    assert math.isnan(metric.compute())
    metric.update([], [], [])
    assert math.isnan(fed(metric, ["", ""], [False, False]).compute())


def test_halves_make_the_whole(gpt2_folder):
    first, second = LanguageModelNLL(gpt2_folder), LanguageModelNLL(gpt2_folder)
    fed(first, TEXTS[:2], COMPLETE[:2])
    fed(second, TEXTS[2:], COMPLETE[2:])
    first.merge_state(second)
    nats, tokens = brute_force(gpt2_folder)
    assert first.compute().item() == pytest.approx(nats / tokens, rel=1e-5)


def test_the_model_is_nobodys_parameter(gpt2_folder):
    metric = LanguageModelNLL(gpt2_folder, name="english_nll")
    holder = nn.ModuleDict({"metric": metric})
    assert holder.state_dict() == {} and list(holder.parameters()) == []
    holder.load_state_dict({}, strict=True)
    holder.to(torch.bfloat16).to(torch.float32)  # the measuring model keeps its type
    nats, tokens = brute_force(gpt2_folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fed(metric)
    assert metric.compute().item() == pytest.approx(nats / tokens, rel=1e-5)
    assert copy.deepcopy(metric).compute() == metric.compute() and metric.name == "english_nll"
    metric.reset()
    assert fed(metric).compute().item() == pytest.approx(nats / tokens, rel=1e-5)


def test_wrong_arguments_are_named(gpt2_folder, tmp_path):
    with pytest.raises(UserError, match="batch_size must be 1 or more, got 0"):
        LanguageModelNLL(gpt2_folder, batch_size=0)
    with pytest.raises(UserError, match="no such folder"):
        LanguageModelNLL(str(tmp_path / "nothing"))
