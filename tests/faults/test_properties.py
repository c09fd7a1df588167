"""What must hold for any input, checked on inputs that hypothesis makes up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lightning.data.sampler import EpochSampler, LengthSampler
from elastic_lightning.functional import exact_kl, gae, kl_k1, kl_k2, kl_k3, whiten
from elastic_lightning.policies import ActorCritic, Prompts, Responses, as_policy, counter_uniforms, draw, load_policy
from elastic_lightning.policies.sampling import search

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(lengths, columns):
    return torch.arange(columns) < torch.tensor(lengths)[:, None]


@st.composite
def batches(draw):
    """Rewards and values [B, T] with a mask of responses of 1 to T tokens."""
    columns = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, columns), min_size=1, max_size=5))
    seed, scale = draw(seeds), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    shape = len(lengths), columns
    return normal(seed, *shape, scale=scale), normal(seed + 1, *shape, scale=scale), masks(lengths, columns)


# Generalised advantage estimation -------------------------------------------------------------------------------------


@quick
@given(batches(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_errors(batch, gamma, lam):
    rewards, values, mask = batch
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        v = [*values[row, :length].double().tolist(), 0.0]
        errors = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:]))
            size = 1e-5 * max(1.0, *map(abs, errors), *map(abs, v)) * length
            assert advantages[row, t].item() == pytest.approx(expected, abs=size)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=size)


@quick
@given(batches(), st.floats(0, 1), st.floats(0, 1), st.integers(1, 4))
def test_gae_does_not_see_padding(batch, gamma, lam, more):
    rewards, values, mask = batch
    bad = torch.full((len(mask), more), math.nan)
    padded = [torch.cat([part.masked_fill(~mask, math.nan), bad], dim=1) for part in (rewards, values)]
    longer = torch.cat([mask, torch.zeros_like(bad, dtype=torch.bool)], dim=1)
    for ours, expected in zip(gae(*padded, longer, gamma, lam), gae(rewards, values, mask, gamma, lam), strict=True):
        assert torch.equal(ours[:, : mask.shape[1]], expected) and not ours[:, mask.shape[1] :].any()


@quick
@given(batches())
def test_at_gamma_and_lambda_1_returns_are_what_is_still_to_come(batch):
    rewards, values, mask = batch
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    expected = rewards.masked_fill(~mask, 0).double().flip(1).cumsum(1).flip(1).masked_fill(~mask, 0)
    size = 1e-5 * max(1.0, rewards.abs().max().item(), values.abs().max().item())
    torch.testing.assert_close(returns.double(), expected, atol=10 * size, rtol=0)


# Whitening ------------------------------------------------------------------------------------------------------------


@quick
@given(batches(), st.booleans())
def test_whitened_values_have_variance_1_and_the_mean_that_was_asked_for(batch, shift):
    values, _, mask = batch
    valid = values[mask].double()
    whitened = whiten(values, mask, shift_mean=shift)
    assert not whitened[~mask].any()
    variance = valid.var(unbiased=False).item()
    ours = whitened[mask].double()
    mean = 0.0 if shift else valid.mean().item()
    size = 1e-5 * max(1.0, valid.abs().max().item() / math.sqrt(variance + 1e-8))
    assert ours.mean().item() == pytest.approx(mean, abs=size * max(1.0, abs(mean)))
    assert ours.var(unbiased=False).item() == pytest.approx(variance / (variance + 1e-8), abs=1e-3)


@quick
@given(batches(), st.floats(0.5, 20), st.floats(-5, 5))
def test_whitening_undoes_scale_and_shift(batch, factor, shift):
    values, _, mask = batch
    values = values / values.abs().max()
    if values[mask].var(unbiased=False) < 1e-2:
        return  # the 1e-8 that is added to the variance is then not small
    torch.testing.assert_close(whiten(factor * values + shift, mask), whiten(values, mask), atol=2e-4, rtol=0)


@quick
@given(batches(), st.data())
def test_whitening_over_ranks_is_whitening_of_all(batch, data):
    values, _, mask = batch
    cut = data.draw(st.integers(0, len(mask)))
    parts = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
    totals = []
    for call in range(2):  # each rank asks twice; a later call depends on the sum of the earlier one
        asked = [_asked(part, totals, call) for part in parts]
        totals.append(asked[0] + asked[1])
    ours = torch.cat([whiten(*part, reduce=_answering(totals)) for part in parts])
    torch.testing.assert_close(ours, whiten(values, mask), atol=1e-4, rtol=1e-4)


def _answering(totals):
    answers = iter(totals)
    return lambda tensor: next(answers)


def _asked(part, totals, call):
    """What a rank wants summed in this call, when the sums of the calls before are known."""
    seen = []

    def reduce(tensor):
        seen.append(tensor)
        return totals[len(seen) - 1] if len(seen) <= len(totals) else tensor

    whiten(*part, reduce=reduce)
    return seen[call]


# Estimators of the KL -------------------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(2, 40), st.sampled_from([0.01, 1.0, 4.0]))
def test_the_mean_of_k1_and_k3_over_the_policy_is_the_kl(seed, vocabulary, spread):
    logits, reference = normal(seed, vocabulary, scale=spread), normal(seed + 1, vocabulary, scale=spread)
    p, q = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum().item()
    for estimator in (kl_k1, kl_k3):
        assert (p.exp() * estimator(p, q)).sum().item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert exact_kl(logits, reference).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@quick
@given(seeds, st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 10.0]))
def test_k2_and_k3_are_never_negative_and_0_where_nothing_moved(seed, spread):
    p = normal(seed, 50).log_softmax(-1)
    q = p + normal(seed + 1, 50, scale=spread)
    assert (kl_k2(p, q) >= 0).all() and (kl_k3(p, q) >= 0).all()
    assert not kl_k1(p, p).any() and not kl_k2(p, p).any() and not kl_k3(p, p).any()
    assert torch.equal(kl_k1(p, q), -kl_k1(q, p)) and torch.equal(kl_k2(p, q), kl_k2(q, p))
    if spread <= 1e-2:  # where the policies are near, the second order is all there is
        torch.testing.assert_close(kl_k3(p, q), kl_k2(p, q), rtol=0.05, atol=1e-12)


# Padding of prompts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(gpt2_folder, llama_folder, marian_folder, t5_folder):
    folders = {"gpt2": gpt2_folder, "llama": llama_folder, "marian": marian_folder, "t5": t5_folder}
    return {name: ActorCritic(as_policy(load_policy(folder).model)).eval() for name, folder in folders.items()}


@settings(quick, max_examples=12)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 5), seeds)
@pytest.mark.parametrize("name", ["gpt2", "llama", "marian", "t5"])
def test_more_left_padding_changes_no_log_probability(policies, name, lengths, more, new, seed):
    generator = torch.Generator().manual_seed(seed)
    columns, rows = max(lengths), len(lengths)
    tokens = torch.randint(3, 30, (rows, columns), generator=generator)
    mask = masks(lengths, columns).flip(1)
    responses = Responses(
        torch.randint(3, 30, (rows, new), generator=generator), torch.ones(rows, new, dtype=torch.bool)
    )
    noise = torch.randint(0, 30, (rows, more), generator=generator)  # whatever stands in padding
    padded = Prompts(torch.cat([noise, tokens], dim=1), torch.cat([noise < 0, mask], dim=1))
    with torch.no_grad():
        plain = policies[name].evaluate(Prompts(tokens, mask), responses)
        ours = policies[name].evaluate(padded, responses)
    for part in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(ours, part), getattr(plain, part), atol=2e-5, rtol=0)


# The order of the data ------------------------------------------------------------------------------------------------

sizes = st.integers(0, 60)
few = st.integers(1, 5)


@quick
@given(sizes, few, few, st.booleans(), seeds, st.integers(0, 5))
def test_ranks_partition_what_one_rank_would_see(size, batch, world, shuffle, seed, epoch):
    def rows(batch, rank=0, world=1):
        sampler = EpochSampler(size, batch, seed, shuffle, rank, world)
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert drawn == list(sampler) and len(sampler) == len(drawn)
        return drawn

    whole = rows(batch * world)
    shares = [rows(batch, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == sorted(whole)
    assert len(set(whole)) == len(whole) == (size - size % (batch * world) if shuffle else size)
    for start in range(0, len(whole) - len(whole) % (batch * world), batch * world):  # batch by batch
        step = start // world
        together = [row for share in shares for row in share[step : step + batch]]
        assert together == whole[start : start + batch * world]


@quick
@given(st.lists(st.integers(1, 30), max_size=50), few, few, seeds, st.integers(0, 5))
def test_batches_by_length_are_partitioned_by_ranks(lengths, batch, world, seed, epoch):
    def drawn(batch, rank=0, world=1):
        sampler = LengthSampler(lengths, batch, seed=seed, rank=rank, world_size=world)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert batches == list(sampler) and len(batches) == len(sampler)
        return batches

    whole = drawn(batch * world)
    shares = [drawn(batch, rank, world) for rank in range(world)]
    assert len(whole) == len(lengths) // (batch * world)
    for rows, *parts in zip(whole, *shares, strict=True):
        assert sorted(rows) == sorted(row for part in parts for row in part)
    every = [row for rows in whole for row in rows]
    assert len(set(every)) == len(every)


# Drawing tokens -------------------------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(1, 700), st.sampled_from([0.1, 1.0, 5.0]), st.integers(1, 200))
def test_stratified_uniforms_draw_each_token_as_often_as_it_is_likely(seed, vocabulary, spread, draws):
    """The inverse of the distribution function: equidistant uniforms hit a token of mass p within one of draws * p."""
    logits = normal(seed, 1, vocabulary, scale=spread)
    uniforms = (torch.arange(draws) + 0.5) / draws
    counts = draw(logits.expand(draws, -1), uniforms).bincount(minlength=vocabulary)
    expected = draws * logits[0].double().softmax(-1)
    assert len(counts) == vocabulary
    assert (counts - expected).abs().max() <= 1 + 1e-3 * draws


@quick
@given(seeds, st.integers(1, 700), st.floats(0, 1, exclude_max=True, width=32), st.floats(0, 0.99))
def test_the_drawn_token_is_where_the_running_sum_passes_the_uniform(seed, vocabulary, uniform, empty):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(1, vocabulary, generator=generator)
    weights[torch.rand(1, vocabulary, generator=generator) < empty] = 0
    weights[0, seed % vocabulary] = 1.0  # not all can be 0
    token = search(weights, torch.tensor([uniform])).item()
    assert weights[0, token] > 0
    running = weights[0].double().cumsum(0) / weights.double().sum()
    before = running[token - 1].item() if token else 0.0
    assert before - 1e-6 <= uniform <= running[token].item() + 1e-6


@quick
@given(seeds, st.integers(-1, 1000), st.integers(1, 9), st.integers(1, 9), st.integers(0, 50))
def test_uniforms_are_those_of_the_row_wherever_it_is_drawn(seed, step, rows, length, first):
    whole = counter_uniforms(seed, step, torch.arange(first + rows), length + 2)
    part = counter_uniforms(seed, step, torch.arange(first, first + rows), length)
    assert torch.equal(part, whole[first:, :length])
    assert ((whole >= 0) & (whole < 1)).all()
    other = counter_uniforms(seed, step + 1, torch.arange(first + rows), length + 2)
    assert not torch.equal(other, whole)
