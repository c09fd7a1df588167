import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch

from elastic_lightning.functional import bigram_perplexity

V, D = 7, 0.75


def brute_force(train, test):
    """Interpolated Kneser-Ney by its definition, with dictionaries."""
    pairs, followers, predecessors = Counter(), defaultdict(set), defaultdict(set)
    for row in train:
        for v, w in itertools.pairwise(row):
            pairs[v, w] += 1
            followers[v].add(w)
            predecessors[w].add(v)
    total = Counter()
    for (v, _), count in pairs.items():
        total[v] += count
    nll, tokens = 0.0, 0
    for row in test:
        for v, w in itertools.pairwise(row):
            unigram = (len(predecessors[w]) + 1) / (len(pairs) + V)
            p = max(pairs[v, w] - D, 0) / total[v] + D * len(followers[v]) / total[v] * unigram if total[v] else unigram
            nll, tokens = nll - math.log(p), tokens + 1
    return math.exp(nll / tokens)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    train = torch.randint(0, V - 1, (4, 9), generator=generator)  # the last token is never seen
    test = torch.randint(0, V, (3, 11), generator=generator)
    assert bigram_perplexity(train, test, V, D).item() == pytest.approx(brute_force(train.tolist(), test.tolist()))


def test_probabilities_after_each_token_sum_to_one():
    train = torch.randint(0, V - 1, (4, 9), generator=torch.Generator().manual_seed(0))
    for before in range(V):
        chances = [1 / bigram_perplexity(train, torch.tensor([[before, after]]), V).item() for after in range(V)]
        assert sum(chances) == pytest.approx(1)
