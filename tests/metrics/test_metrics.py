import math
from itertools import pairwise

import pytest
import sacrebleu
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from elastic_lightning.functional import distinct_n, jensen_shannon, whiten
from elastic_lightning.metrics import (
    CorpusBLEU,
    DistinctN,
    Mean,
    SequenceKL,
    TokenFrequencyDivergence,
    TokenPerplexity,
)

LENGTHS = [5, 2, 0, 4, 1, 3]
MASK = torch.tensor([[step < length for step in range(5)] for length in LENGTHS])


def batch():
    """Per-token numbers with NaN at padding, tokens that repeat, and scores: six responses of five tokens at most."""
    generator = torch.Generator().manual_seed(0)
    return {
        "values": torch.rand(6, 5, generator=generator).where(MASK, float("nan")),
        "tokens": torch.randint(3, (6, 5), generator=generator),
        "scores": torch.randn(6, generator=generator),
        "mask": MASK,
    }


def build():
    return {
        "kl": SequenceKL(),
        "kl per token": SequenceKL(per="token"),
        "perplexity": TokenPerplexity(),
        "distinct": DistinctN(2),
        "reward": Mean(),
        "frequency": TokenFrequencyDivergence(5),
        "bleu": CorpusBLEU(),
    }


def feed(metrics, values, tokens, scores, mask):
    metrics["kl"].update(values, mask)
    metrics["kl per token"].update(values, mask)
    metrics["perplexity"].update(values, mask)
    metrics["distinct"].update(tokens, mask)
    metrics["reward"].update(scores)
    metrics["frequency"].update(tokens, mask, *references(tokens, mask))
    metrics["bleu"].update(texts(tokens, mask), texts(*references(tokens, mask)))


def references(tokens, mask):
    """Other texts: each token one more, but in the first two columns."""
    return torch.cat([tokens[:, :2], tokens[:, 2:] + 1], dim=1), mask


def texts(tokens, mask):
    return [" ".join(f"w{token}" for token in row[keep]) for row, keep in zip(tokens, mask, strict=True)]


def rows(data, start, stop):
    return {name: tensor[start:stop] for name, tensor in data.items()}


def oracle():
    """The numbers in plain Python, and by sacrebleu."""
    data = batch()
    valid = [data["values"][row, :length].tolist() for row, length in enumerate(LENGTHS)]
    rows = [data["tokens"][row, :length].tolist() for row, length in enumerate(LENGTHS)]
    bigrams = [pair for row in rows for pair in pairwise(row)]
    shifted = [[token + (place > 1) for place, token in enumerate(row)] for row in rows]
    counts = [[sum(row.count(token) for row in side) for token in range(5)] for side in (rows, shifted)]
    hypotheses, truths = ([" ".join(f"w{token}" for token in row) for row in side] for side in (rows, shifted))
    total = sum(map(sum, valid))
    return {
        "kl": total / len(LENGTHS),
        "kl per token": total / sum(LENGTHS),
        "perplexity": math.exp(total / sum(LENGTHS)),
        "distinct": len(set(bigrams)) / len(bigrams),
        "reward": sum(data["scores"].tolist()) / len(LENGTHS),
        "frequency": jensen_shannon(*map(torch.tensor, counts)).item(),
        "bleu": sacrebleu.corpus_bleu(hypotheses, [truths]).score,
    }


def results(metrics):
    return {name: metric.compute().item() for name, metric in metrics.items()}


def test_by_hand():
    mask = torch.tensor([[True, True], [True, False]])
    kl = torch.tensor([[1.0, 2.0], [6.0, 100.0]])
    assert results(
        {
            "sequence": _updated(SequenceKL(), kl, mask),
            "token": _updated(SequenceKL(per="token"), kl, mask),
            "perplexity": _updated(TokenPerplexity(), kl, mask),
            "distinct": _updated(DistinctN(1), torch.tensor([[7, 7], [8, 9]]), mask),
            "reward": _updated(Mean(), torch.tensor([1.0, 4.0])),
        }
    ) == pytest.approx({"sequence": 4.5, "token": 3, "perplexity": math.exp(3), "distinct": 2 / 3, "reward": 2.5})


def _updated(metric, *arguments):
    metric.update(*arguments)
    return metric


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_result_does_not_depend_on_the_batches(size):
    metrics = build()
    for start in range(0, 6, size):
        feed(metrics, **rows(batch(), start, start + size))
    assert results(metrics) == pytest.approx(oracle())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_an_empty_metric_is_nan():
    assert all(math.isnan(value) for value in results(build()).values())


def test_reset_forgets():
    metrics = build()
    feed(metrics, **rows(batch(), 0, 3))
    for metric in metrics.values():
        metric.reset()
    feed(metrics, **batch())
    assert results(metrics) == pytest.approx(oracle())


def test_what_was_reset_in_inference_mode_counts_on_outside_of_it():
    # Trainer.validate runs in inference mode, the validation of Trainer.fit does not.
    metrics = build()
    with torch.inference_mode():
        feed(metrics, **rows(batch(), 0, 3))
        for metric in metrics.values():
            metric.reset()
    feed(metrics, **batch())
    assert results(metrics) == pytest.approx(oracle())


def test_forward_returns_the_batch_and_keeps_the_whole():
    data, metric = batch(), DistinctN(2)
    for half in (rows(data, 0, 3), rows(data, 3, 6)):
        assert metric(half["tokens"], half["mask"]) == pytest.approx(distinct_n(half["tokens"], half["mask"], 2).item())
    assert metric.compute().item() == pytest.approx(oracle()["distinct"])


def test_sums_stay_exact_over_many_small_numbers():
    # A float32 sum would stop growing at 2^24.
    metric = Mean()
    metric.total += 2.0**24
    metric.update(torch.ones(1, dtype=torch.bfloat16))
    assert metric.total.item() == 2**24 + 1
    assert {state.dtype for state in (metric.total, metric.count)} == {torch.float64}


def test_distinct_state_stays_small():
    metric = DistinctN(2)
    tokens, mask = torch.randint(4, (8, 50)), torch.ones(8, 50, dtype=torch.bool)
    for _ in range(20):
        metric.update(tokens, mask)
    assert metric.total == 20 * 8 * 49
    assert sum(map(len, metric.rows)) <= 2 * 16
    assert metric.compute().item() == pytest.approx(16 / (20 * 8 * 49))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match='per must be "sequence" or "token", got \'row\''):
        SequenceKL(per="row")
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        DistinctN(0)
    with pytest.raises(ValueError, match="vocabulary must be positive, got 0"):
        TokenFrequencyDivergence(0)


def rank_main(rank, folder):
    """One of two ranks: uneven shares of the batch, then a share of nothing on the second."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    data = batch()
    share = rows(data, 0, 2) if rank == 0 else rows(data, 2, 6)
    metrics, lopsided = build(), build()
    feed(metrics, **share)
    if rank == 0:
        feed(lopsided, **data)
    whitened = whiten(share["values"], share["mask"], reduce=all_reduce)
    torch.save({"even": results(metrics), "lopsided": results(lopsided), "whitened": whitened}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def all_reduce(tensor):
    dist.all_reduce(tensor)
    return tensor


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_ranks_agree_with_one(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for got in ranks:
        assert got["even"] == pytest.approx(oracle())
        assert got["lopsided"] == pytest.approx(oracle())
    data = batch()
    torch.testing.assert_close(torch.cat([got["whitened"] for got in ranks]), whiten(data["values"], data["mask"]))
