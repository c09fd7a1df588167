"""The number is sacrebleu's, whole, in batches and over ranks."""

import random
import sys

import pytest
import sacrebleu
import torch
from torchmetrics.text import SacreBLEUScore

from elastic_lightning.errors import UserError
from elastic_lightning.metrics import CorpusBLEU

TEXT = "A man in the street; 2 women, a dog's t-shirt & 1,000 red bikes. What? The people ride on 3.5 é of it"
WORDS = TEXT.split()


def noisy_pairs(count=500, seed=0):
    """Sentences of 0 to 15 words, and the same with words dropped, swapped, doubled, in another case or all gone."""
    luck = random.Random(seed)
    hypotheses, references = [], []
    for _ in range(count):
        words = luck.choices(WORDS, k=luck.randint(0, 15))
        noisy = [luck.choice(WORDS) if luck.random() < 0.2 else word for word in words if luck.random() > 0.1]
        noisy = [word for word in noisy for _ in range(1 + (luck.random() < 0.05))]
        hypothesis = " ".join(noisy) if luck.random() > 0.02 else ""
        hypotheses.append(hypothesis.upper() if luck.random() < 0.1 else hypothesis)
        references.append(" ".join(words))
    return hypotheses, references


def scored(hypotheses, references, **options):
    metric = CorpusBLEU(**options)
    metric.update(hypotheses, references)
    return metric.compute().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"lowercase": False}, {"tokenize": "none"}, {"tokenize": "intl"}])
def test_it_is_sacrebleus_number(seed, options):
    pairs = noisy_pairs(seed=seed)
    truth = sacrebleu.corpus_bleu(pairs[0], [pairs[1]], **{"lowercase": True} | options).score
    assert 20 < truth < 80
    assert scored(*pairs, **options) == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize(
    ("hypotheses", "references"),
    [
        (["a dog runs"], ["a dog runs"]),  # no 4-gram at all
        (["the dog a sees man"], ["a man sees the dog"]),  # no 3-gram matches
        (["dog the man", "a b c d e"], ["the man has a dog", "e d c b a"]),  # single words alone match
        (["x y z x y z"], ["a b c d"]),  # nothing matches
        (["", ""], ["a b", "c"]),  # nothing said
        (["a b c d e"], [""]),  # nothing asked for
    ],
)
def test_orders_without_a_match(hypotheses, references):
    truth = sacrebleu.corpus_bleu(hypotheses, [references], lowercase=True).score
    assert scored(hypotheses, references) == pytest.approx(truth, abs=1e-4)


def test_torchmetrics_differs_there():
    hypotheses, references = ["the dog a sees man"], ["a man sees the dog"]
    theirs = 100 * SacreBLEUScore(tokenize="13a", lowercase=True)(hypotheses, [[text] for text in references]).item()
    assert theirs == 0
    assert scored(hypotheses, references) > 20


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of the one whose states were set by hand
def test_batches_and_halves_make_the_whole():
    hypotheses, references = noisy_pairs()
    whole = sacrebleu.corpus_bleu(hypotheses, [references], lowercase=True).score

    batched = CorpusBLEU()
    for start in range(0, 500, 7):
        batched.update(hypotheses[start : start + 7], references[start : start + 7])
    batched.update([], [])
    assert batched.compute().item() == pytest.approx(whole, abs=1e-4)

    first, second, added = CorpusBLEU(), CorpusBLEU(), CorpusBLEU()
    first.update(hypotheses[:180], references[:180])
    second.update(hypotheses[180:], references[180:])
    for state in ("matches", "ngrams", "lengths"):
        assert getattr(first, state).dtype == torch.int64
        setattr(added, state, getattr(first, state) + getattr(second, state))
    assert added.compute().item() == pytest.approx(whole, abs=1e-4)
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole, abs=1e-4)
    # and not what a mean of the two would be
    parts = (scored(hypotheses[:180], references[:180]), scored(hypotheses[180:], references[180:]))
    assert sum(parts) / 2 != pytest.approx(whole, abs=1e-2)


def test_the_signature_is_that_of_the_number():
    scorer = sacrebleu.metrics.BLEU(lowercase=True)
    scorer.corpus_score(["a"], [["a"]])
    metric = CorpusBLEU()
    assert metric.signature == str(scorer.get_signature())
    metric.update(*noisy_pairs(3))
    assert metric.signature == f"nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert "case:mixed|eff:no|tok:char" in CorpusBLEU(lowercase=False, tokenize="char").signature


def test_wrong_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="one reference a hypothesis: got 1 for 2"):
        CorpusBLEU().update(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no tokenizer '14b'; it has none, zh, 13a"):
        CorpusBLEU(tokenize="14b")
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UserError, match="pip install sacrebleu"):
        CorpusBLEU()
