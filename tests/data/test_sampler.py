from elastic_lightning.data.sampler import EpochSampler


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
