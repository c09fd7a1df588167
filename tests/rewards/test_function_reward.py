import sys

import pytest
import torch

from elastic_lightning.errors import UserError
from elastic_lightning.rewards import FunctionReward, score

MODULE = """
LIMIT = 3
def count(prompts, responses):
    return [len(p) * 100 + len(r) for p, r in zip(prompts, responses)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with modules that import, and modules that do not."""
    (tmp_path / "reward_case.py").write_text(MODULE)
    (tmp_path / "reward_without_dependency.py").write_text("import no_such_dependency\n")
    (tmp_path / "reward_misspelt.py").write_text("def f(:\n")
    (tmp_path / "reward_that_raises.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("reward_")]:
        del sys.modules[name]


def test_by_callable():
    reward = FunctionReward(lambda prompts, responses: [len(response) for response in responses])
    scores = score(reward, ["a", "b"], ["xyz", ""]).total
    assert scores.dtype == torch.float32 and scores.tolist() == [3, 0]


def test_by_path_from_the_current_folder(folder):
    assert score(FunctionReward("reward_case.count"), ["ab", "c"], ["xyz", ""]).total.tolist() == [203, 100]


def test_by_path_of_an_installed_function():
    assert FunctionReward("os.path.join").function.__name__ == "join"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("count", "package.module.function"),
        ("", "package.module.function"),
        ("reward_nowhere.count", "reward_nowhere"),
        ("reward_case.missing", "missing"),
        ("reward_case.LIMIT", "not a function"),
        ("reward_without_dependency.f", "no_such_dependency"),
        ("reward_misspelt.f", "invalid syntax"),
        ("reward_that_raises.f", "division by zero"),
        ("..f", "..f"),
    ],
)
def test_what_cannot_be_imported_is_one_line(folder, path, part):
    with pytest.raises(UserError) as error:
        FunctionReward(path)
    assert part in str(error.value) and repr(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scores", [torch.tensor([1, 2]), torch.tensor([True, False]), (1, 2.5), [1e-3, -7]], ids=str)
def test_any_sequence_of_numbers_will_do(scores):
    total = score(FunctionReward(lambda prompts, responses: scores), ["a", "b"], ["c", "d"]).total
    torch.testing.assert_close(total, torch.tensor([float(number) for number in scores]))


@pytest.mark.parametrize(("options", "part"), [({"retries": -1}, "retries"), ({"on_error": "skip"}, "'skip'")])
def test_wrong_options_are_refused(options, part):
    with pytest.raises(UserError, match=part):
        FunctionReward(len, **options)
