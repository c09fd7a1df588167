import warnings

import pytest
import torch

from elastic_lightning.errors import UserError
from elastic_lightning.rewards import FunctionReward, Reward, WeightedReward, score

PROMPTS, RESPONSES = ["a film", "a play", "an act"], [" of note", " in vain", " of god"]


class Fixed(Reward):
    """Returns what it was given, whatever the texts."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, prompts, responses):
        return self.scores


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_scores_are_float32_without_components():
    scores = score(Fixed(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), PROMPTS, RESPONSES)
    assert scores.total.dtype == torch.float32 and scores.total.tolist() == [1, 2, 3] and scores.components == {}
    assert score(Fixed([1, 2, 3]), PROMPTS, RESPONSES).total.tolist() == [1, 2, 3]


def test_no_gradient_is_kept():
    weight = torch.ones(3, requires_grad=True)
    assert not score(FunctionReward(lambda prompts, responses: weight * 2), PROMPTS, RESPONSES).total.requires_grad


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0] * 4, [[1.0]] * 3, 1.0, []], ids=str)
def test_another_number_of_scores_is_refused(wrong):
    with pytest.raises(UserError) as error:
        score(Fixed(torch.tensor(wrong)), PROMPTS, RESPONSES)
    one_line(error, "Fixed", "one score a response", str(tuple(torch.tensor(wrong).shape)), "3 responses")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39], ids=str)
def test_scores_that_are_not_finite_name_the_first_text(bad):
    with pytest.raises(UserError) as error:
        score(Fixed([0.0, bad, bad]), PROMPTS, RESPONSES)
    one_line(error, "Fixed", "2 of 3 texts", "'a play in vain'")
    assert "a film" not in str(error.value)


def test_long_texts_are_shortened_in_the_message():
    with pytest.raises(UserError) as error:
        score(Fixed([float("nan")]), ["start " + "x " * 1000], ["y\n" * 1000 + "end"])
    one_line(error, "'start ", "end'", " ... ")
    assert len(str(error.value)) < 500


def test_an_exception_is_wrapped_and_its_cause_kept():
    def broken(prompts, responses):
        raise KeyError("no such\nthing")

    with pytest.raises(UserError) as error:
        score(FunctionReward(broken), PROMPTS, RESPONSES)
    one_line(error, "FunctionReward", "KeyError", "no such", "'a film of note'")
    assert isinstance(error.value.__cause__, KeyError)


def test_a_message_of_many_lines_becomes_one():
    def broken(prompts, responses):
        raise RuntimeError("first\nsecond\n" + "third " * 1000)

    with pytest.raises(UserError) as error:
        score(FunctionReward(broken), PROMPTS, RESPONSES)
    one_line(error, "RuntimeError: first")
    assert len(str(error.value)) < 1000


def test_an_error_meant_for_the_user_is_passed_on():
    def wrong(prompts, responses):
        raise UserError("give reward.path")

    with pytest.raises(UserError, match=r"^give reward\.path$"):
        score(FunctionReward(wrong), PROMPTS, RESPONSES)


@pytest.mark.parametrize("what", [None, ["good", "bad", "good"], [None, 1.0, 2.0], object()])
def test_what_is_no_number_is_refused(what):
    for reward in (Fixed(what), FunctionReward(lambda prompts, responses: what)):
        with pytest.raises(UserError) as error:
            score(reward, PROMPTS, RESPONSES)
        one_line(error, type(reward).__name__)


def test_a_reward_that_overrides_nothing_says_so():
    with pytest.raises(UserError, match=r"Reward must override forward"):
        score(Reward(), PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("bad", "part"), [([1.0, float("nan"), 0.0], "'a play in vain'"), ([1.0], "one score a response")], ids=str
)
def test_a_bad_component_is_named(bad, part):
    reward = WeightedReward({"fine": Fixed(torch.ones(3)), "rotten": Fixed(torch.tensor(bad))}, {"rotten": 0.0})
    with pytest.raises(UserError) as error:
        score(reward, PROMPTS, RESPONSES)
    one_line(error, "rotten: the reward Fixed", part)


class Moody(Reward):
    """Raises on the first calls, and always on one text."""

    def __init__(self, failures=0, never=None, on_error="stop", retries=0):
        super().__init__()
        self.failures, self.never, self.on_error, self.retries, self.calls = failures, never, on_error, retries, 0

    def forward(self, prompts, responses):
        self.calls += 1
        if self.calls <= self.failures or self.never in responses:
            raise ConnectionError("no answer")
        return torch.tensor([float(len(response)) for response in responses])


@pytest.mark.parametrize(("failures", "retries", "answered"), [(1, 1, True), (2, 2, True), (2, 1, False)])
def test_a_reward_that_raises_is_asked_again(failures, retries, answered):
    reward = Moody(failures, retries=retries)
    if answered:
        scores = score(reward, PROMPTS, RESPONSES)
        assert scores.total.tolist() == [8, 8, 7] and scores.valid is None
    else:
        with pytest.raises(UserError) as error:
            score(reward, PROMPTS, RESPONSES)
        one_line(error, "Moody", "ConnectionError", "no answer")
    assert reward.calls == min(failures, retries) + 1


def test_where_it_raises_on_one_text_the_others_keep_their_scores():
    reward = Moody(never=" in vain", on_error="mask", retries=1)
    with pytest.warns(UserWarning, match="ConnectionError on single responses, which are masked"):
        scores = score(reward, PROMPTS, RESPONSES)
    assert scores.total.tolist() == [8, 0, 7] and scores.valid.tolist() == [True, False, True]
    assert reward.calls == 2 + 1 + 2 + 1


def test_a_masked_part_masks_the_sum():
    reward = WeightedReward({"moody": Moody(never=" of god", on_error="mask"), "fine": FunctionReward(_lengths)})
    with pytest.warns(UserWarning, match="masked"):
        scores = score(reward, PROMPTS, RESPONSES)
    assert scores.valid.tolist() == [True, True, False]
    assert {name: part.tolist() for name, part in scores.components.items()} == {"moody": [8, 8, 0], "fine": [8, 8, 0]}
    assert scores.total.tolist() == [16, 16, 0]


def test_each_part_has_its_own_patience():
    moody, other = Moody(failures=1, retries=1), Moody()
    assert score(WeightedReward({"moody": moody, "other": other}), PROMPTS, RESPONSES).total.tolist() == [16, 16, 14]
    assert (moody.calls, other.calls) == (2, 1)
    with pytest.raises(UserError, match="other: the reward Moody raised ConnectionError"):
        score(WeightedReward({"moody": Moody(failures=1, retries=1), "other": Moody(failures=1)}), PROMPTS, RESPONSES)


def test_a_masked_part_is_no_score_of_a_reward_around_it():
    reward = WeightedReward({"moody": Moody(never=" of god", on_error="mask")})
    with pytest.warns(UserWarning, match="masked"), pytest.raises(RuntimeError, match="no score for a response"):
        reward(PROMPTS, RESPONSES)


def test_no_score_at_all_is_said_once_and_masks_every_response():
    reward = Moody(failures=100, on_error="mask")
    with pytest.warns(UserWarning, match="masked; .* The first: no answer"):
        scores = score(reward, PROMPTS, RESPONSES)
    assert scores.total.tolist() == [0, 0, 0] and not scores.valid.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(reward, PROMPTS, RESPONSES)


def test_masking_hides_no_wrong_numbers():
    reward = Fixed([1.0])
    reward.on_error = "mask"
    with pytest.raises(UserError, match="one score a response"):
        score(reward, PROMPTS, RESPONSES)


def _lengths(prompts, responses):
    return [float(len(response)) for response in responses]
