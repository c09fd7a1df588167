import itertools
from collections import Counter

import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from elastic_lightning.callbacks.position import Position
from elastic_lightning.data.loader import ResumableLoader
from elastic_lightning.data.sampler import (
    EndlessSampler,
    EpochSampler,
    LengthSampler,
    even_batch_size,
    sorted_in_batches,
)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    sampler = EpochSampler(20, batch_size=4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(20)) and first != list(range(20))
    assert list(sampler) == first == list(EpochSampler(20, 4, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(20, 4, seed=4)) != first


def test_ranks_share_the_global_batches_of_one_rank():
    whole = list(EpochSampler(30, batch_size=8, seed=1))
    ranks = [list(EpochSampler(30, batch_size=4, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    joined = [row for start in range(0, len(ranks[0]), 4) for rank in ranks for row in rank[start : start + 4]]
    assert joined == whole
    assert len(whole) == 24 == len(EpochSampler(30, 8, seed=1))  # whole batches alone


def test_evaluation_covers_every_row_once_on_any_number_of_ranks():
    for world_size in (1, 2, 3):
        rows = [
            r
            for rank in range(world_size)
            for r in EpochSampler(10, 4, shuffle=False, rank=rank, world_size=world_size)
        ]
        assert sorted(rows) == list(range(10))


LENGTHS = [3 + (7 * row) % 31 for row in range(200)]


def test_batches_by_length_hold_each_row_once():
    sampler = LengthSampler(LENGTHS, batch_size=8, seed=3)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [8] * 25 and len(sampler) == 25
    assert sorted(row for batch in batches for row in batch) == list(range(200))


def test_batches_by_length_are_those_of_sorted_rows_in_another_order():
    batches = list(LengthSampler(LENGTHS, batch_size=8, seed=3))
    spans = [(min(LENGTHS[row] for row in batch), max(LENGTHS[row] for row in batch)) for batch in batches]
    assert spans != sorted(spans)
    ordered = sorted(LENGTHS)
    assert sorted(spans) == [(ordered[start], ordered[start + 7]) for start in range(0, 200, 8)]


def test_batches_by_length_are_a_function_of_seed_and_epoch():
    sampler = LengthSampler(LENGTHS, batch_size=8, seed=3)
    first = list(sampler)
    assert list(sampler) == first == list(LengthSampler(LENGTHS, batch_size=8, seed=3))
    sampler.set_epoch(1)
    second = list(sampler)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert list(LengthSampler(LENGTHS, batch_size=8, seed=4)) != first


@pytest.mark.parametrize("size", [{"batch_size": 12}, {"batch_tokens": 240}])
def test_ranks_share_the_batches_by_length_of_one_rank(size):
    ((name, number),) = size.items()
    whole = list(LengthSampler(LENGTHS, **{name: number}, seed=1))
    ranks = [list(LengthSampler(LENGTHS, **{name: number // 4}, seed=1, rank=rank, world_size=4)) for rank in range(4)]
    assert len(ranks[0]) == len(whole)
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(row for share in shares for row in share)
        assert max(map(len, shares)) - min(map(len, shares)) <= (0 if name == "batch_size" else 1)
        assert all(shares)


def test_what_fills_no_batch_is_left_out_at_random():
    sampler, left_out = LengthSampler(LENGTHS[:30], batch_size=8, seed=1), set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        seen = [row for batch in sampler for row in batch]
        assert len(seen) == 24 == len(set(seen))
        left_out |= set(range(30)) - set(seen)
    assert len(left_out) > 20
    assert list(LengthSampler(LENGTHS[:7], batch_size=8)) == []


def test_batches_of_so_many_tokens():
    sampler = LengthSampler(LENGTHS, batch_tokens=100, seed=1)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(200))
        spans = [sorted(LENGTHS[row] for row in batch) for batch in batches]
        spans.sort(key=lambda span: (span[0], span[-1], -len(span)))
        assert all(len(span) * span[-1] <= 100 for span in spans)
        for span, following in itertools.pairwise(spans):  # not one more would have fitted
            assert span[-1] <= following[0] and (len(span) + 1) * following[0] > 100


def test_a_row_longer_than_the_tokens_is_a_batch_of_its_own():
    batches = list(LengthSampler([2, 2, 90, 50], batch_tokens=10))
    assert sorted(map(sorted, batches)) == [[0, 1], [2], [3]]
    two = [list(LengthSampler([2, 2, 90, 50], batch_tokens=10, rank=rank, world_size=2)) for rank in (0, 1)]
    assert sorted(sorted(a + b) for a, b in zip(*two, strict=True)) == [[0, 1], [2, 3]]  # no rank goes without
    three = [list(LengthSampler([5, 5, 5, 9], batch_tokens=5, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(row for rank in three for batch in rank for row in batch) == [0, 1, 2, 3]
    assert [len(rank) for rank in three] == [1, 1, 1]


def test_some_rows_come_more_often():
    times = [3 if length > 20 else 1 for length in LENGTHS]
    sampler = LengthSampler(LENGTHS, batch_tokens=200, times=times)
    seen = Counter(row for batch in sampler for row in batch)
    assert seen == dict(enumerate(times))


def test_sizes_exclude_each_other():
    for size in ({}, {"batch_size": 4, "batch_tokens": 4}):
        with pytest.raises(ValueError, match="exactly one"):
            LengthSampler(LENGTHS, **size)


def test_the_endless_sampler_is_epoch_after_epoch():
    sampler = EndlessSampler(LengthSampler(LENGTHS, batch_size=40, seed=2))
    twelve = list(itertools.islice(sampler, 12))
    rounds = [twelve[:5], twelve[5:10]]
    for batches in rounds:
        assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert rounds[0] != rounds[1] and rounds[0] == list(LengthSampler(LENGTHS, batch_size=40, seed=2))
    assert list(itertools.islice(sampler, 12)) == twelve
    sampler.set_epoch(1)
    assert list(itertools.islice(sampler, 5)) not in rounds
    with pytest.raises(TypeError):
        len(sampler)


def test_lightning_reaches_the_epoch_through_a_loader():
    for sampler in (LengthSampler(LENGTHS, 8), EndlessSampler(LengthSampler(LENGTHS, 8))):
        _set_sampler_epoch(DataLoader(range(200), batch_sampler=sampler), 5)
        assert sampler.epoch == 5


def test_evaluation_sorted_in_batches():
    order = sorted_in_batches(LENGTHS, 32, seed=1)
    assert sorted(order) == list(range(200))
    batches = [sorted(LENGTHS[row] for row in order[start : start + 32]) for start in range(0, 200, 32)]
    ordered = sorted(LENGTHS)
    expected = [ordered[start : start + 32] for start in range(0, 200, 32)]
    assert sorted(batches) == expected and batches != expected
    assert batches[-1] == ordered[192:]  # the short batch stays the last
    assert order == sorted_in_batches(LENGTHS, 32, seed=1)


# Beginning anywhere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epochs_order_begins_at_any_batch_once(shuffle, world_size):
    for rank in range(world_size):
        sampler = EpochSampler(23, 4, seed=3, shuffle=shuffle, rank=rank, world_size=world_size)
        sampler.set_epoch(2)
        whole = list(sampler)
        for skip in range(4):
            sampler.skip = skip
            assert len(sampler) == len(whole)  # of the epoch, whatever is left of it
            assert list(sampler) == whole[4 * skip :]
            assert list(sampler) == whole


def test_batches_by_length_begin_at_any_batch_once():
    sampler = LengthSampler(LENGTHS, batch_size=8, seed=3)
    whole = list(sampler)
    for skip in (0, 1, 24, 25):
        sampler.skip = skip
        assert list(sampler) == whole[skip:] and list(sampler) == whole


@pytest.mark.parametrize("skip", [0, 1, 24, 25, 26, 60])
def test_an_endless_order_begins_at_any_batch(skip):
    def first(count, skip=0):
        sampler = EndlessSampler(LengthSampler(LENGTHS, batch_size=8, seed=3))
        sampler.set_epoch(1)
        sampler.skip = skip
        return list(itertools.islice(iter(sampler), count))

    assert first(40, skip) == first(40 + skip)[skip:]


def test_a_loader_goes_on_behind_the_batches_that_are_done():
    def loader(position):
        return ResumableLoader(lambda: position, range(20), batch_size=4, sampler=EpochSampler(20, 4, seed=3))

    whole = loader(None)
    _set_sampler_epoch(whole, 6)
    batches = [batch.tolist() for batch in whole]
    done = Position(epoch=6, batches=2, epoch_batches=5, total=32, logged=32)
    state = loader(done).state_dict()
    resumed = loader(None)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == batches[2:]
    assert [batch.tolist() for batch in resumed] == batches and len(resumed) == 5
    assert loader(done._replace(batches=5)).state_dict() == {"epoch": 7, "batches": 0}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [8, 29, 31, 33])
def test_ranks_side_by_side_are_one_rank(size, shuffle):
    def batches(batch_size, rank, world_size):
        sampler = EpochSampler(size, batch_size, seed=1, shuffle=shuffle, rank=rank, world_size=world_size)
        return list(DataLoader(range(size), batch_size, sampler=sampler))

    whole = batches(8, 0, 1)
    ranks = [batches(4, rank, 2) for rank in (0, 1)]
    for batch, *shares in itertools.zip_longest(whole, *ranks, fillvalue=torch.tensor([], dtype=torch.int64)):
        assert torch.cat(shares).tolist() == batch.tolist()
        assert abs(len(shares[0]) - len(shares[1])) <= 1


@pytest.mark.parametrize("size", [{"batch_size": 12}, {"batch_tokens": 240}])
def test_ranks_side_by_side_are_one_rank_by_length(size):
    ((name, number),) = size.items()
    whole = list(LengthSampler(LENGTHS, **{name: number}, seed=1))
    ranks = [list(LengthSampler(LENGTHS, **{name: number // 2}, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


def test_an_even_batch_size_gives_all_ranks_as_many_batches():
    for rows, batch_size, world_size in itertools.product(range(1, 40), range(1, 6), range(1, 6)):
        if rows < world_size:
            continue
        even = even_batch_size(rows, batch_size, world_size)
        samplers = [EpochSampler(rows, even, shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
        counts = {len(DataLoader(range(rows), even, sampler=sampler)) for sampler in samplers}
        assert len(counts) == 1
        assert sorted(row for sampler in samplers for row in sampler) == list(range(rows))
        assert even == batch_size or 0 < rows % (batch_size * world_size) < world_size
