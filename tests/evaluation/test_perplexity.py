"""Sliding-window perplexity against a loop over tokens in float64."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.perplexity import Document, sliding_perplexity, tokens_to_score, window_nll, windows
from elastic_lightning.policies import as_policy, load_policy

LENGTH, STRIDE = 16, 6


def document(tokens, first=1):
    generator = torch.Generator().manual_seed(tokens)
    return Document(torch.randint(2, 30, (tokens,), generator=generator).tolist(), first)


@pytest.fixture(params=["gpt2_folder", "llama_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


def brute_force(folder, documents, length, stride):
    """Each token alone: the context is all from the beginning of the first window that holds the token."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    nll = []
    for tokens, first in documents:
        for at in range(max(first, 1), len(tokens)):
            begin = 0
            while begin + length <= at:
                begin += stride
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens[begin:at]])).logits[0, -1]
            nll.append(-torch.log_softmax(logits, dim=0)[tokens[at]].item())
    return math.exp(math.fsum(nll) / len(nll)), len(nll)


@pytest.mark.parametrize("tokens", [2, 5, 15, 16, 17, 22, 23, 28, 29, 41])
def test_one_text_equals_token_by_token(folder, tokens):
    lm = as_policy(load_policy(folder).model)
    measured = sliding_perplexity(lm, [document(tokens)], LENGTH, STRIDE)
    expected, scored = brute_force(folder, [document(tokens)], LENGTH, STRIDE)
    assert measured.perplexity == pytest.approx(expected, rel=1e-5)
    assert measured.tokens == scored == tokens - 1 and measured.documents == 1
    assert measured.nll == pytest.approx(math.log(expected), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_many_texts_and_contexts_that_are_not_scored(folder, stride):
    documents = [document(40, first=7), document(3), document(1), document(18, first=17), document(9, first=20)]
    documents += [document(33, first=20)]
    lm = as_policy(load_policy(folder).model)
    expected, scored = brute_force(folder, documents, LENGTH, stride)
    for batch_size in (1, 3, 100):
        measured = sliding_perplexity(lm, documents, LENGTH, stride, batch_size)
        assert measured.perplexity == pytest.approx(expected, rel=1e-5)
        assert measured.tokens == scored == tokens_to_score(documents) == 33 + 2 + 0 + 1 + 0 + 13


def test_batches_of_windows_equal_one_by_one(folder):
    lm = as_policy(load_policy(folder).model)
    cut = [window for tokens in (40, 2, 17, 31) for window in windows(document(tokens), LENGTH, STRIDE)]
    assert len({len(window.tokens) for window in cut}) > 2
    together = window_nll(lm, cut)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, torch.cat([window_nll(lm, [window]) for window in cut]), atol=1e-4, rtol=1e-5)


def test_windows_by_hand():
    def spans(tokens, first=1):
        return [(w.tokens[0], w.tokens[-1], w.scored) for w in windows(Document([*range(tokens)], first), 6, 4)]

    assert spans(5) == [(0, 4, 4)]
    assert spans(6) == [(0, 5, 5)]
    assert spans(7) == [(0, 5, 5), (4, 6, 1)]
    assert spans(10) == [(0, 5, 5), (4, 9, 4)]
    assert spans(11) == [(0, 5, 5), (4, 9, 4), (8, 10, 1)]
    assert spans(11, first=7) == [(4, 9, 3), (8, 10, 1)]
    assert spans(1) == spans(0) == spans(4, first=4) == []


def test_what_is_watched_adds_up(gpt2_folder):
    lm, seen = as_policy(load_policy(gpt2_folder).model), []
    measured = sliding_perplexity(lm, [document(40), document(12)], LENGTH, STRIDE, 2, lambda *now: seen.append(now))
    assert sum(tokens for tokens, _ in seen) == measured.tokens == 39 + 11
    assert len(seen) == 3 and seen[-1][1] == measured.perplexity


def test_what_cannot_be_measured_is_refused(gpt2_folder):
    lm = as_policy(load_policy(gpt2_folder).model)  # 64 positions
    for wrong in ((1, 1), (8, 8), (8, 0)):
        with pytest.raises(UserError, match="windows need length >= 2"):
            sliding_perplexity(lm, [document(5)], *wrong)
    with pytest.raises(UserError, match="no token to score"):
        sliding_perplexity(lm, [document(1), document(0)])
    with pytest.raises(UserError, match="65 tokens do not fit the model's context of 64"):
        sliding_perplexity(lm, [document(65)])
    sliding_perplexity(lm, [document(64)])  # a short text does not care for a long window
