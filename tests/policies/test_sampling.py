import math
import random

import pytest
import torch
from policy_cases import ROWS, left_padded, make_actor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from elastic_lightning.errors import UserError
from elastic_lightning.policies import ActorCritic, CausalLM, Sampling, counter_uniforms, draw, sample
from elastic_lightning.policies.sampling import truncate, withhold_end

BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


# draw: inverse CDF


def scan(logits, uniform):
    """Inverse CDF by a python loop in exact arithmetic on doubles."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    target, total = uniform * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        total += weight
        if target < total:
            return token
    raise AssertionError("the uniform was not below 1")


def test_draw_equals_a_python_scan():
    torch.manual_seed(0)
    logits, uniforms = 3 * torch.randn(5000, 20), torch.rand(5000)
    expected = torch.tensor([scan(row, u) for row, u in zip(logits.tolist(), uniforms.tolist(), strict=True)])
    # float32 may fall on the other side of a boundary that lies within its rounding of the uniform.
    assert (draw(logits, uniforms) != expected).sum() <= 2


def test_draw_by_hand():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.05, 0.15, 0.29, 0.31, BELOW_ONE])
    assert draw(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    logits[:, 2] = -torch.inf
    doubles = torch.full((6,), 1 - 2.0**-53, dtype=torch.float64)  # 1 in float32
    assert draw(logits, doubles).tolist() == [1] * 6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 80.0])
@pytest.mark.parametrize("vocabulary", [3, 1000, 50_000])
def test_draw_never_takes_a_token_without_probability(vocabulary, scale):
    torch.manual_seed(vocabulary)
    logits = scale * torch.randn(40, vocabulary)
    dead = torch.rand(40, vocabulary) < 0.5
    dead[::2, 0], dead[::2, -1], dead[:, vocabulary // 2] = True, True, False
    logits = logits.masked_fill(dead, -torch.inf)
    for uniform in (0.0, 2.0**-24, 0.5, BELOW_ONE, *torch.rand(4).tolist()):
        drawn = draw(logits, torch.full((40,), uniform))
        assert ((drawn >= 0) & (drawn < vocabulary)).all()
        assert not dead.gather(1, drawn[:, None]).any()
    first_living = (~dead).int().argmax(dim=1)
    if scale < 80:  # there the first may underflow to probability 0
        assert torch.equal(draw(logits, torch.zeros(40)), first_living)


def test_draw_with_one_living_token_and_with_shifted_logits():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = torch.tensor([-1000.0, 0.0, 1000.0])
    for uniform in (0.0, 0.5, BELOW_ONE):
        assert draw(logits, torch.full((3,), uniform)).tolist() == [2, 2, 2]
    torch.manual_seed(1)
    logits, uniforms = torch.randn(200, 9), torch.rand(200)
    assert torch.equal(draw(logits, uniforms), draw(logits + 64, uniforms))


# counter_uniforms: splitmix64 in coordinates

MASK = (1 << 64) - 1


def splitmix64(state):
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_splitmix64_of_the_test_is_the_published_one():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the reference generator seeded with 0
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4  # and its second


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (42, 7), (2**40 + 3, 10**9), (-1, 2**31 - 1), (5, -1)])
def test_counter_uniforms_are_splitmix64(seed, step):
    rows = torch.tensor([0, 1, 5, 10**6])
    expected = []
    for row in rows.tolist():
        state = splitmix64(splitmix64(splitmix64(seed & MASK) ^ (step & MASK)) ^ row)
        expected.append([(splitmix64(state ^ position) >> 40) / 2**24 for position in range(4)])
    assert counter_uniforms(seed, step, rows, 4).tolist() == expected


def test_counter_uniforms_do_not_depend_on_how_rows_are_sliced():
    whole = counter_uniforms(1, 2, torch.arange(8), 6)
    halves = [counter_uniforms(1, 2, torch.arange(start, start + 4), 6) for start in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))
    assert torch.equal(whole[:, :3], counter_uniforms(1, 2, torch.arange(8), 3))


def test_counter_uniforms_differ_in_every_coordinate():
    base = counter_uniforms(1, 2, torch.arange(64), 32)
    assert base.unique().numel() > 2040  # of 2048 numbers of 24 bits
    for other in (counter_uniforms(2, 2, torch.arange(64), 32), counter_uniforms(1, 3, torch.arange(64), 32)):
        assert (base == other).float().mean() < 0.01
    assert (counter_uniforms(1, 2, torch.arange(64) + 64, 32) == base).float().mean() < 0.01
    assert (counter_uniforms(2, 1, torch.arange(64), 32) == base).float().mean() < 0.01  # seed and step swapped


def test_counter_uniforms_are_uniform_and_uncorrelated():
    numbers = counter_uniforms(0, 0, torch.arange(1000), 100)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.bincount((numbers.flatten() * 100).long(), minlength=100).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < chi_square_limit(99)
    ordered = numbers.flatten().double().sort().values
    distance = (ordered - (torch.arange(100_000) + 0.5) / 100_000).abs().max()
    assert distance < 1.95 / math.sqrt(100_000)  # Kolmogorov-Smirnov at 0.1 %
    steps = torch.stack([counter_uniforms(0, step, torch.arange(1000), 100) for step in range(2)])
    seeds = torch.stack([counter_uniforms(seed, 0, torch.arange(1000), 100) for seed in range(2)])
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), steps, seeds):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.012  # about four sigma


# truncate, withhold_end: the same masks as transformers'


@pytest.mark.parametrize("top_k", [1, 3, 19, 20, 500])
def test_top_k_masks_what_transformers_masks(top_k):
    torch.manual_seed(0)
    logits = torch.randn(200, 20)
    kept = logits.clone()
    ours = truncate(logits, Sampling(top_k=top_k))
    assert torch.equal(ours, TopKLogitsWarper(top_k)(None, logits))
    assert torch.equal(logits, kept), "the argument was changed in place"


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.99])
def test_top_p_masks_what_transformers_masks(top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(200, 20)
    ours = truncate(logits, Sampling(top_p=top_p))
    assert torch.equal(ours, TopPLogitsWarper(top_p)(None, logits))
    assert ours.isfinite().any(dim=1).all()


def test_min_new_tokens_masks_what_transformers_masks():
    torch.manual_seed(0)
    logits, prompt = torch.randn(8, 20), 5
    processor = MinNewTokensLengthLogitsProcessor(prompt, 3, [7], device="cpu")
    for position in range(6):
        expected = processor(torch.zeros(8, prompt + position, dtype=torch.long), logits.clone())
        ours = logits.clone()
        withheld = withhold_end(ours, Sampling(min_new_tokens=3), position, 7)
        assert torch.equal(ours, expected)
        assert torch.equal(torch.maximum(ours[:, 7], withheld), logits[:, 7]), "no logit is lost"


def test_truncations_follow_one_another_as_in_transformers():
    torch.manual_seed(0)
    logits, ids = 2 * torch.randn(200, 20), torch.zeros(200, 5, dtype=torch.long)
    expected = MinNewTokensLengthLogitsProcessor(5, 1, [7], device="cpu")(ids, logits.clone())
    expected = TopPLogitsWarper(0.7)(ids, TopKLogitsWarper(6)(ids, expected))
    sampling = Sampling(min_new_tokens=1, top_k=6, top_p=0.7)
    withhold_end(logits, sampling, 0, 7)
    assert torch.equal(truncate(logits, sampling), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"min_new_tokens": 49},
        {"min_new_tokens": -1},
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("top_k", "top_k >= 0")):
        Sampling(**wrong)


# sample


def chi_square_limit(freedom, z=3.72):
    """Upper quantile (0.01 % at z = 3.72) of chi-square by Wilson and Hilferty's cube."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(continuations, exact):
    """The statistic over its limit: above 1 is a rejection. Cells expected fewer than 5 times are put together."""
    counts = {}
    for continuation in map(tuple, continuations):
        counts[continuation] = counts.get(continuation, 0) + 1
    assert counts.keys() <= {key for key, p in exact.items() if p > 0}, "drew what has no probability"
    n = sum(counts.values())
    cells, rest = [], [0, 0.0]
    for key, p in exact.items():
        if n * p >= 5:
            cells.append([counts.get(key, 0), n * p])
        else:
            rest = [rest[0] + counts.get(key, 0), rest[1] + n * p]
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    return statistic / chi_square_limit(len(cells) - 1)


def truncated(probabilities, top_k=0, top_p=1.0, banned=None):
    """The distribution that is drawn from, by sorting a python list."""
    p = [0.0 if token == banned else value for token, value in enumerate(probabilities)]
    p = [value / sum(p) for value in p]
    order = sorted(range(len(p)), key=lambda token: -p[token])[: top_k or None]
    p = [value if token in order else 0.0 for token, value in enumerate(p)]
    p = [value / sum(p) for value in p]
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token]
    total = sum(p[token] for token in kept)
    return [p[token] / total if token in kept else 0.0 for token in range(len(p))]


VOCABULARY, END, PADDING = 6, 4, 5
PROMPT = [2, 0, 3]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "initializer_range": 0.4}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=END, eos_token_id=END, pad_token_id=PADDING, **size)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def next_token(model, tokens, temperature):
    return (model(input_ids=torch.tensor([tokens])).logits[0, -1].double() / temperature).softmax(-1).tolist()


def exact_pairs(model, temperature=1.0, min_new_tokens=0, **truncation):
    """Probability of each continuation of two tokens; one that ends at once is (END, PADDING)."""
    banned = [END if position < min_new_tokens else None for position in range(2)]
    pairs = {}
    first = truncated(next_token(model, PROMPT, temperature), banned=banned[0], **truncation)
    for a in range(VOCABULARY):
        second = truncated(next_token(model, [*PROMPT, a], temperature), banned=banned[1], **truncation)
        for b in range(VOCABULARY):
            if a != END:
                pairs[a, b] = first[a] * second[b]
        if a == END:
            pairs[END, PADDING] = first[END]
    assert math.isclose(sum(pairs.values()), 1)
    return pairs


OPTIONS = [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_new_tokens": 2}, {"min_new_tokens": 1}]
OPTIONS += [{"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_new_tokens": 1}]
DRAWS = 4000


def our_pairs(model, seed=0, **options):
    prompts = left_padded([PROMPT] * DRAWS, extra=2)
    uniforms = counter_uniforms(seed, 0, torch.arange(DRAWS), 2)
    sampling = Sampling(max_new_tokens=2, **options)
    return sample(ActorCritic(CausalLM(model)), prompts, sampling, uniforms, END, PADDING).tokens.tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampling_and_generate_draw_from_the_exact_distribution(small, options):
    exact = exact_pairs(small, **options)
    assert chi_square(our_pairs(small, **options), exact) < 1
    torch.manual_seed(0)
    prompts = left_padded([PROMPT] * DRAWS, extra=2)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    generated = small.generate(
        input_ids=prompts.tokens, attention_mask=prompts.mask.long(), do_sample=True, max_new_tokens=2, **plain
    )
    assert chi_square(generated[:, -2:].tolist(), exact) < 1


def test_the_chi_square_sees_a_wrong_temperature(small):
    assert chi_square(our_pairs(small, temperature=0.7), exact_pairs(small, temperature=0.8)) > 1


def test_truncation_does_not_enter_the_log_probabilities(small):
    exact = exact_pairs(small, temperature=0.7)
    prompts = left_padded([PROMPT] * 50)
    sampling = Sampling(max_new_tokens=2, temperature=0.7, top_k=2, top_p=0.9, min_new_tokens=2)
    rollout = sample(ActorCritic(CausalLM(small)), prompts, sampling, torch.rand(50, 2), END, PADDING)
    for pair, logprobs in zip(rollout.tokens.tolist(), rollout.logprobs.tolist(), strict=True):
        assert sum(logprobs) == pytest.approx(math.log(exact[tuple(pair)]), abs=1e-5)


def test_ended_rows_hold_padding(gpt2_folder):
    actor, n = make_actor(gpt2_folder), 64
    prompts = left_padded([random.Random(i).sample(range(2, 30), 1 + i % 4) for i in range(n)])
    rollout = sample(actor, prompts, Sampling(max_new_tokens=10), torch.rand(n, 10), 1, 0)
    ends = 0
    for tokens, mask, logprobs, values in zip(*(tensor.tolist() for tensor in rollout), strict=True):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert 1 not in tokens[: length - 1]
        assert tokens[length:] == [0] * (len(mask) - length)
        assert not any(logprobs[length:]) and not any(values[length:])
        assert all(logprob < 0 for logprob in logprobs[:length])
        ends += length < len(mask)
        assert length == len(mask) or tokens[length - 1] == 1
    assert ends > 5


def count_calls(actor):
    calls = []
    actor.lm.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return calls


def test_decoding_stops_when_every_row_has_ended(llama_folder):
    actor, prompts = make_actor(llama_folder), left_padded([[5, 9, 20]] * 3)
    greedy, uniforms = Sampling(max_new_tokens=20, top_k=1), torch.zeros(3, 20)
    calls = count_calls(actor)
    tokens = sample(actor, prompts, greedy, uniforms, None, 0).tokens
    assert calls == [3] + [1] * 19, "the last token needs no step"
    first = tokens[0].tolist()
    end = next(token for token in first[2:] if token not in first[:2])
    calls.clear()
    rollout = sample(actor, prompts, greedy, uniforms, end, 0)
    length = first.index(end) + 1
    assert calls == [3] + [1] * (length - 1)
    assert rollout.tokens.shape == (3, length) and rollout.mask.all()
    calls.clear()
    assert sample(actor, prompts, greedy, uniforms, first[0], 0).tokens.shape == (3, 1) and calls == [3]


def test_a_row_ends_where_it_is_stopped(gpt2_folder):
    """Beside the end of text, and as if it had ended there: the draws before are the same."""
    actor, prompts, uniforms = make_actor(gpt2_folder), left_padded(ROWS), torch.rand(4, 12)
    sampling = Sampling(max_new_tokens=12)

    def even(tokens):  # two even tokens in a row
        return (tokens[:, -2:] % 2 == 0).all(dim=1) & torch.tensor(tokens.shape[1] > 1)

    whole = sample(actor, prompts, sampling, uniforms, 1, 0)
    stopped = sample(actor, prompts, sampling, uniforms, 1, 0, stop=even)
    for i in range(4):
        tokens = whole.tokens[i, whole.mask[i]].tolist()
        pairs = [t + 1 for t in range(1, len(tokens)) if tokens[t - 1] % 2 == tokens[t] % 2 == 0]
        assert stopped.tokens[i, stopped.mask[i]].tolist() == tokens[: min(pairs, default=len(tokens))]
    assert stopped.mask.sum() < whole.mask.sum()
    assert sample(actor, prompts, sampling, uniforms, None, 0, stop=even).mask.sum() < 4 * 12


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_greedy_decoding_is_that_of_generate(folder, request):
    actor, prompts = make_actor(request.getfixturevalue(folder)), left_padded(ROWS, extra=1)
    rollout = sample(actor, prompts, Sampling(max_new_tokens=8, top_k=1), torch.rand(4, 8), 1, 0)
    generated = actor.lm.model.generate(
        input_ids=prompts.tokens, attention_mask=prompts.mask.long(), do_sample=False, max_new_tokens=8
    )
    assert torch.equal(rollout.tokens, generated[:, prompts.tokens.shape[1] :])


def test_a_row_draws_the_same_in_any_batch(gpt2_folder):
    actor, prompts = make_actor(gpt2_folder), left_padded(ROWS)
    uniforms = counter_uniforms(0, 5, torch.arange(4), 9)
    whole = sample(actor, prompts, Sampling(max_new_tokens=9), uniforms, 1, 0)
    for i, row in enumerate(ROWS):
        alone = sample(actor, left_padded([row]), Sampling(max_new_tokens=9), uniforms[i : i + 1], 1, 0)
        length = alone.tokens.shape[1]
        assert torch.equal(alone.tokens[0], whole.tokens[i, :length]) and not whole.mask[i, length:].any()
        torch.testing.assert_close(alone.logprobs[0], whole.logprobs[i, :length], atol=1e-5, rtol=0)


def test_sampling_leaves_no_graph_and_no_generator_state_behind(gpt2_folder):
    actor = make_actor(gpt2_folder)
    state = torch.get_rng_state()
    rollout = sample(actor, left_padded(ROWS), Sampling(max_new_tokens=3), torch.full((4, 3), 0.5), 1, 0)
    assert not any(tensor.requires_grad for tensor in rollout)
    assert torch.equal(torch.get_rng_state(), state)
