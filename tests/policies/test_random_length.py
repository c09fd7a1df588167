"""Responses of random length, with the end of text on and off, against plain transformers row by row."""

import pytest
import torch
from policy_cases import EVERY_KIND, ROWS, left_padded, make_actor, plain_logprobs, plain_values
from test_sampling import MASK, splitmix64

from elastic_lightning.errors import UserError
from elastic_lightning.policies import GraphSampler, Sampling, counter_uniforms, draw_lengths, sample
from elastic_lightning.policies.sampling import LENGTH_SEED

EOS, PAD = 1, 0
CUT = Sampling(max_new_tokens=9, random_length=(2, 9), eos=False)
CUT_OR_ENDED = Sampling(max_new_tokens=9, random_length=(2, 9))


def roll(actor, sampling, prompts=None, step=0, rows=None, **options):
    prompts = left_padded(ROWS * 4) if prompts is None else prompts
    rows = torch.arange(len(prompts.tokens)) if rows is None else rows
    uniforms = counter_uniforms(3, step, rows, sampling.max_new_tokens)
    lengths = draw_lengths(3, step, rows, sampling)
    return sample(actor, prompts, sampling, uniforms, EOS, PAD, lengths=lengths, **options), lengths, uniforms


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (42, 7), (-1, 10**6), (5, -1)])
def test_lengths_are_splitmix64(seed, step):
    rows, expected = torch.tensor([0, 3, 10**6]), []
    for row in rows.tolist():
        state = splitmix64(splitmix64(splitmix64((seed ^ LENGTH_SEED) & MASK) ^ (step & MASK)) ^ row)
        expected.append(32 + (splitmix64(state) >> 40) * 97 // 2**24)
    assert draw_lengths(seed, step, rows, Sampling(128, random_length=(32, 128))).tolist() == expected


def test_lengths_are_uniform_with_both_ends_and_of_their_own():
    rows = torch.arange(40_000)
    lengths = draw_lengths(1, 2, rows, Sampling(5, random_length=(2, 5)))
    counts = torch.bincount(lengths, minlength=6)
    assert counts[:2].tolist() == [0, 0] and ((counts[2:] - 10_000) ** 2 / 10_000).sum() < 16.3  # chi square, 0.1 %
    first = counter_uniforms(1, 2, rows, 1)[:, 0]
    assert torch.corrcoef(torch.stack([lengths.float(), first]))[0, 1].abs() < 0.02
    assert draw_lengths(1, 2, rows, Sampling(5)) is None


def test_a_row_has_its_length_on_any_rank_at_any_step():
    whole = draw_lengths(1, 2, torch.arange(64), Sampling(128, random_length=(32, 128)))
    parts = [
        draw_lengths(1, 2, torch.arange(s, s + 16), Sampling(128, random_length=(32, 128))) for s in range(0, 64, 16)
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, draw_lengths(1, 3, torch.arange(64), Sampling(128, random_length=(32, 128))))


@EVERY_KIND
def test_processes_that_stop_together_draw_the_same(folder, request):
    """Where processes decide together (`going_on`), each runs as many steps as the longest response of any needs."""
    actor, steps = make_actor(request.getfixturevalue(folder)), []

    def going_on(alive):
        steps.append(len(steps))
        return len(steps) < 7 or bool(alive.any())  # another process has a response of 7 tokens

    alone, lengths, _ = roll(actor, Sampling(max_new_tokens=9, random_length=(2, 9), eos=False), left_padded(ROWS))
    together, _, _ = roll(actor, CUT, left_padded(ROWS), going_on=going_on)
    assert together.tokens.shape[1] == max(7, int(lengths.max())) == len(steps)
    assert torch.equal(together.mask[:, : alone.mask.shape[1]], alone.mask) and together.mask.sum() == lengths.sum()
    torch.testing.assert_close(together.logprobs[together.mask], alone.logprobs[alone.mask])


@pytest.mark.parametrize("lora", [False, True])
@EVERY_KIND
def test_cut_responses_cost_what_the_model_says(folder, lora, request):
    actor, prompts = make_actor(request.getfixturevalue(folder), lora), left_padded(ROWS)
    rollout, lengths, _ = roll(actor, CUT, prompts)
    assert rollout.mask.sum(dim=1).tolist() == lengths.tolist() and len(set(lengths.tolist())) > 1
    assert rollout.tokens.shape[1] == lengths.max() and not (rollout.tokens[rollout.mask] == EOS).any()
    for row, prompt in enumerate(ROWS):
        response = rollout.tokens[row, rollout.mask[row]].tolist()
        ours = rollout.logprobs[row, : len(response)]
        expected = plain_logprobs(actor.lm.model, prompt, response, temperature=1.0).float()
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        values = plain_values(actor, prompt, response)
        torch.testing.assert_close(rollout.values[row, : len(response)], values, atol=1e-4, rtol=1e-4)


def test_the_end_of_text_is_never_drawn_where_it_is_off(gpt2_folder):
    """Though it would be likely: each row draws the likeliest of the others."""
    actor, prompts = make_actor(gpt2_folder), left_padded([[5, 9, 20], [7]])
    with torch.no_grad():
        actor.lm.model.lm_head.weight[EOS] = 20 * actor.lm.start(prompts, 0)[1].mean(dim=0)
    greedy = {"max_new_tokens": 4, "top_k": 1}
    on, off = (
        sample(actor, prompts, Sampling(**greedy, eos=eos), torch.zeros(2, 4), EOS, PAD) for eos in (True, False)
    )
    assert (on.tokens == EOS).any() and off.mask.all() and off.tokens.shape == (2, 4) and not (off.tokens == EOS).any()


def test_with_the_end_of_text_a_row_ends_at_whichever_comes_first(gpt2_folder):
    actor, prompts = make_actor(gpt2_folder), left_padded(ROWS * 16)
    cut, lengths, uniforms = roll(actor, CUT_OR_ENDED, prompts)
    whole = sample(actor, prompts, Sampling(9), uniforms, EOS, PAD)
    expected = torch.minimum(whole.mask.sum(dim=1), lengths)
    assert torch.equal(cut.mask.sum(dim=1), expected)
    assert torch.equal(cut.tokens[cut.mask], whole.tokens[:, : cut.tokens.shape[1]][cut.mask])
    assert (expected < lengths).any() and (expected < whole.mask.sum(dim=1)).any()


def test_decoding_stops_after_the_longest(llama_folder):
    actor, calls = make_actor(llama_folder), []
    actor.lm.backbone.register_forward_pre_hook(lambda *args: calls.append(1))
    rows = torch.tensor([0, 1])
    rollout, lengths, _ = roll(actor, CUT, left_padded(ROWS[:2]), rows=rows)
    assert len(calls) == rollout.tokens.shape[1] == lengths.max() < 9, "choose rows with short responses"


@pytest.mark.parametrize("sampling", [CUT, CUT_OR_ENDED], ids=["cut", "cut or ended"])
@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_static_steps_draw_what_eager_steps_draw(folder, sampling, request):
    actor, prompts = make_actor(request.getfixturevalue(folder)), left_padded(ROWS * 4)
    sampler = GraphSampler(actor, sampling, EOS, PAD)
    for step in range(3):  # the buffers keep nothing of the step before
        eager, lengths, uniforms = roll(actor, sampling, prompts, step)
        static = sampler(prompts, uniforms, lengths)
        assert torch.equal(static.tokens, eager.tokens) and torch.equal(static.mask, eager.mask)
        torch.testing.assert_close(static.logprobs, eager.logprobs, atol=3e-5, rtol=0)
        torch.testing.assert_close(static.values, eager.values, atol=3e-5, rtol=0)


@pytest.mark.parametrize("lengths", [(0, 48), (32, 40), (40, 32), (5, 64)])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(UserError, match="random_length"):
        Sampling(max_new_tokens=48, random_length=lengths)
    with pytest.raises(UserError, match="min_new_tokens"):
        Sampling(max_new_tokens=48, min_new_tokens=9, random_length=(8, 48))
