"""HumanEval with completers that need no model, and with a tiny one."""

import gzip
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from trials import FORK, SMALL, found

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import humaneval
from elastic_lightning.evaluation.humaneval import (
    HumanEvalOptions,
    Problem,
    evaluate_humaneval,
    pass_at_k,
    read_problems,
    summarize,
    truncate,
)
from elastic_lightning.evaluation.sandbox import Limits

PUBLISHED = Path(__file__).parents[2].parent / "shared/data/humaneval/HumanEval.jsonl.gz"
TEST = "def check(candidate):\n    assert candidate(2) == 3\n"


class Written:
    """Completions that are known beforehand, by prompt; several of one prompt in turn."""

    def __init__(self, completions):
        self.completions = {prompt: itertools.cycle(texts) for prompt, texts in completions.items()}
        self.batches = []

    def complete(self, prompts):
        self.batches.append(len(prompts))
        return [next(self.completions[prompt]) for prompt in prompts]


def problem(number):
    prompt = f'\ndef add_one_{number}(x):\n    """The next number."""\n'
    return Problem(f"Test/{number}", prompt, f"add_one_{number}", "    return x + 1\n", TEST)


@pytest.fixture
def write(tmp_path):
    """Writes problems as the published file is; returns options to evaluate them."""

    def write(written, **options):
        path = tmp_path / "problems.jsonl.gz"
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in written)
        path.write_bytes(gzip.compress(lines.encode()))
        return HumanEvalOptions(str(path), **{"allow_code_execution": True, "limits": SMALL, "workers": 2, **options})

    return write


def test_pass_at_k_by_hand():
    """n completions, c of them right: 1 - C(n-c, k) / C(n, k)."""
    table = {
        (1, 0, 1): 0,
        (1, 1, 1): 1,
        (5, 2, 1): 2 / 5,
        (5, 2, 2): 1 - 3 / 10,
        (5, 2, 4): 1,
        (10, 1, 10): 1,
        (200, 1, 100): 1 / 2,
        (200, 3, 1): 3 / 200,
    }
    for (n, c, k), expected in table.items():
        assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_counts_every_choice():
    for n, k in itertools.product(range(1, 8), range(1, 8)):
        for c in range(n + 1) if k <= n else ():
            choices = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


def test_pass_at_k_is_exact_with_many_samples():
    for n, c, k in [(200, 2, 10), (200, 150, 10), (1000, 17, 100), (10_000, 1, 1)]:
        exact = (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)
        assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)
    for wrong in [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0)]:
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(*wrong)


def test_truncate():
    assert truncate("\n    return 1\n") == "\n    return 1\n"
    assert truncate("\n    if x:\n        print(x)\n    return 1\n\nprint(f(1))\nclass A: pass") == (
        "\n    if x:\n        print(x)\n    return 1\n"
    )
    for stop in ("class A:", "def g():", "# note", "@cache", "print(1)", "if __name__"):
        assert truncate(f"\n    return 1\n{stop}\n    pass") == "\n    return 1"


def test_summary():
    records = [{"task_id": t, "passed": p} for t, p in zip("a" * 10 + "b" * 10, [1, 1] + [0] * 18, strict=True)]
    summary = summarize(records)
    assert summary == {"problems": 2, "samples": 10, "passed": 2, "pass@1": pytest.approx(0.1), "pass@10": 0.5}


class Interrupted(Written):
    """Fails in its second batch."""

    def complete(self, prompts):
        if self.batches:
            raise ConnectionError("gone")
        return super().complete(prompts)


def test_what_an_interruption_leaves_can_be_read(write, tmp_path, fences):
    problems = [problem(number) for number in range(3)]
    right = {each.prompt.strip(): ["\n    return x + 1"] for each in problems}
    path, options = tmp_path / "records.jsonl", write(problems, batch_size=2)
    with pytest.raises(ConnectionError):
        evaluate_humaneval(Interrupted(right), options, path)
    left = [json.loads(line) for line in (tmp_path / "records.jsonl.writing").read_text().splitlines()]
    assert [(row["task_id"], row["passed"]) for row in left] == [("Test/0", True), ("Test/1", True)]
    assert not path.exists()
    whole = evaluate_humaneval(Written(right), options, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole["records"]
    assert not (tmp_path / "records.jsonl.writing").exists()


def test_records(write, fences):
    problems = [problem(number) for number in range(3)]
    right, wrong = "\n    return x + 1\n\ndef another(): pass", "\n    return x"
    completions = {problems[0].prompt: [right, wrong], problems[1].prompt: [wrong], problems[2].prompt: [right]}
    writer = Written({prompt.strip(): texts for prompt, texts in completions.items()})
    result = evaluate_humaneval(writer, write(problems, samples=2, temperature=0.5, batch_size=4))
    assert writer.batches == [4, 2]
    assert [(row["task_id"], row["sample"], row["passed"], row["reason"]) for row in result["records"]] == [
        ("Test/0", 0, True, "passed"),
        ("Test/0", 1, False, "AssertionError"),
        ("Test/1", 0, False, "AssertionError"),
        ("Test/1", 1, False, "AssertionError"),
        ("Test/2", 0, True, "passed"),
        ("Test/2", 1, True, "passed"),
    ]
    assert result["records"][0]["completion"] == "\n    return x + 1\n"
    assert result["summary"]["pass@1"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert result["summary"]["options"]["limits"]["cpu_seconds"] == 1
    json.dumps(result)


# Each the body of a function that should return x + 1.
HOSTILE = {
    "loops": "while True: pass",
    "forks": "import os\n    while True: os.fork()",
    "forks and goes on": (
        "import os\n    while True:\n        try: os.fork()\n        except OSError: pass"
    ),
    "eats memory": "return len(bytearray(2**40)) and x + 1",
    "writes outside": "open({outside!r}, 'w'); return x + 1",
    "opens a socket": "import socket; socket.socket(); return x + 1",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); return x + 1",
    "kills all": "import os; os.kill(-1, 9); return x + 1",
    "exits": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "prints a gigabyte": "import sys\n    while True: print('passed' * 2**20)",
    "answers a gigabyte": "return 'x' * 10**9",
}  # fmt: skip


def test_hostile_programs_cost_one_sample_each(write, tmp_path, fences, nothing_left):
    """Between programs that pass, run at the same time."""
    found(FORK, [0, 11])  # before the fork bombs: the limit binds
    names = list(HOSTILE)
    problems = [problem(number) for number in range(2 * len(names))]
    outside = tmp_path / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    bodies = ["return x + 1" if i % 2 else HOSTILE[names[i // 2]] for i in range(len(problems))]
    texts = ["\n    " + body.replace("{outside!r}", repr(str(outside / "file"))) for body in bodies]
    writer = Written({each.prompt.strip(): [text] for each, text in zip(problems, texts, strict=True)})
    result = evaluate_humaneval(writer, write(problems, workers=4))
    assert [row["passed"] for row in result["records"]] == [bool(i % 2) for i in range(len(problems))]
    assert result["summary"]["passed"] == len(names)
    assert list(outside.iterdir()) == []


@pytest.mark.slow
def test_canonical_solutions_pass_and_empty_ones_fail(fences, nothing_left):
    if not PUBLISHED.exists():
        pytest.skip(f"no copy of HumanEval at {PUBLISHED}")
    problems = read_problems(PUBLISHED)
    assert len(problems) == 164
    writer = Written({each.prompt.strip(): ["\n" + each.canonical_solution, ""] for each in problems})
    options = HumanEvalOptions(
        str(PUBLISHED), samples=2, temperature=1.0, limits=Limits(wall_seconds=60), allow_code_execution=True
    )
    result = evaluate_humaneval(writer, options)
    wrong = [row for row in result["records"] if row["passed"] != (row["sample"] == 0)]
    assert wrong == []
    assert result["summary"]["pass@1"] == 0.5


def test_nothing_runs_unless_allowed(write, monkeypatch):
    monkeypatch.setattr(humaneval, "run_program", None)
    with pytest.raises(UserError, match="--allow-code-execution"):
        evaluate_humaneval(Written({}), write([problem(0)], allow_code_execution=False))


def test_missing_fences_stop_it_before_work(write, monkeypatch, without_namespaces):
    with pytest.raises(UserError, match="no namespaces here"):
        evaluate_humaneval("no/such/model", write([problem(0)]))


def test_files_and_options_that_do_not_fit(tmp_path, write):
    with pytest.raises(UserError, match="cannot read HumanEval's problems"):
        read_problems(tmp_path / "nowhere")
    for name, text in {"empty": "", "other": '{"question": 1}\n', "broken": '{"task_id": '}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="problems"):
            read_problems(tmp_path / name)
    with pytest.raises(UserError, match="greedy"):
        write([], samples=2)
    with pytest.raises(UserError, match="samples and batch_size"):
        write([], samples=0)


def test_with_a_model(write, gpt2_folder, fences):
    problems = [problem(number) for number in range(3)]
    options = write(problems, max_new_tokens=8, samples=2, temperature=1.0, problems=2)
    first, again = evaluate_humaneval(gpt2_folder, options), evaluate_humaneval(gpt2_folder, options)
    assert first == again
    texts = [row["completion"] for row in first["records"]]
    assert len(texts) == 4 and len(set(texts)) == 4  # each sample is a draw of its own
    assert first["summary"]["passed"] == 0 and first["records"][0]["reason"].startswith("SyntaxError")
    with pytest.raises(UserError, match="context is 64: lower max_new_tokens"):
        evaluate_humaneval(gpt2_folder, write(problems, max_new_tokens=80))
