"""HumanEval: how many of 164 python functions a model completes so that their tests pass.

Chen et al. 2021, https://arxiv.org/abs/2107.03374.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elastic_lightning.checks import check_counts, check_seed
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.completion import PolicyCompleter
from elastic_lightning.evaluation.sandbox import Limits, Outcome, check_sandbox, run_program
from elastic_lightning.policies import Sampling
from elastic_lightning.terminal import PlainConsole, json_line

STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif")
KS = (1, 10, 100)


@dataclass(frozen=True)
class Problem:
    """One line of the published file; `prompt` is a function's signature and docstring, `test` defines ``check``."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


@dataclass(frozen=True)
class HumanEvalOptions:
    """How completions are drawn and run.

    Attributes:
        path: the published file, ``HumanEval.jsonl.gz`` or unpacked.
        samples: completions a problem.
        temperature: of sampling; 0 is greedy, one completion a problem.
        top_p: keep the smallest set of tokens whose probabilities reach p.
        max_new_tokens: longest completion.
        seed: of sampling.
        batch_size: completions drawn at once.
        problems: only the first so many.
        workers: programs run at once; one for each core by default.
        limits: what each program may use.
        allow_code_execution: run what the model writes.
        accept_missing_fences: also where the kernel does not grant the whole sandbox.
    """

    path: str
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 1
    batch_size: int = 32
    problems: int | None = None
    workers: int | None = None
    limits: Limits = field(default_factory=Limits)
    allow_code_execution: bool = False
    accept_missing_fences: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise UserError(f"samples and batch_size must be 1 or more, got {self.samples} and {self.batch_size}")
        check_counts("humaneval.", vars(self), "samples", "batch_size", "max_new_tokens", "problems", "workers")
        check_seed("humaneval.seed", self.seed)
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"humaneval.temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"humaneval.top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and self.samples > 1:
            raise UserError("temperature 0 is greedy, and draws the same completion each time: set samples to 1")

    @property
    def sampling(self) -> Sampling:
        """How a completion's tokens are drawn."""
        if self.temperature == 0:
            return Sampling(self.max_new_tokens, top_k=1)
        return Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)


class Completer(Protocol):
    """What writes the programs."""

    def complete(self, prompts: list[str]) -> list[str]:
        """The text after each prompt, a fresh draw at each call."""


def evaluate_humaneval(
    policy: str | Completer, options: HumanEvalOptions, records_path: Path | None = None
) -> dict[str, Any]:
    """Complete every prompt, run every completion's test, and count.

    Prompts are given without white space at their ends, as models' tokens usually begin with it. A completion
    ends before the first of `STOPS`. A program passes as `run_program` says; of libraries it has python's own alone.

    Args:
        policy: a `save_pretrained` folder, a hub id, a checkpoint, or an object with `complete`.
        options: how completions are drawn and run.
        records_path: where records are written, one line of JSON each; while it goes on as ``<name>.writing``, so that
            what an interruption leaves can be read.

    Returns:
        ``{"summary": {...}, "records": [...]}``: the counts, ``pass@k`` for the k of `KS` that `samples` allows, and
        the options; and a record of `task_id`, `sample`, `completion`, `passed` and `reason` for each completion.

    Raises:
        UserError: running programs is not allowed, this machine cannot fence them in, or the file cannot be read.
    """
    check_allowed(options)
    problems = read_problems(options.path)[: options.problems]
    tasks = [(problem, sample) for problem in problems for sample in range(options.samples)]
    prompts = [problem.prompt.strip() for problem, _ in tasks]
    completer = policy
    if isinstance(policy, str):
        completer = PolicyCompleter.load(policy, options.sampling, options.seed, STOPS)
    if isinstance(completer, PolicyCompleter):
        completer.check(prompts)
    records, passed = [], 0
    workers = options.workers or len(os.sched_getaffinity(0))
    with _progress() as progress, ThreadPoolExecutor(workers) as pool, _lines(records_path) as write:
        bar = progress.add_task("", total=len(tasks), passed=0)
        for start in range(0, len(tasks), options.batch_size):
            batch = slice(start, start + options.batch_size)
            for record in _write_and_run(completer, tasks[batch], prompts[batch], options, pool):
                write(record)
                records.append(record)
                passed += record["passed"]
                progress.update(bar, advance=1, passed=passed)
    return {"summary": {**summarize(records), "options": asdict(options)}, "records": records}


def check_allowed(options: HumanEvalOptions) -> None:
    """Raise a `UserError` where running what a model wrote is not allowed, or this machine cannot fence it in."""
    if not options.allow_code_execution:
        raise UserError(
            "HumanEval runs programs that the model wrote: allow it with allow_code_execution (--allow-code-execution)"
        )
    check_sandbox(options.limits, options.accept_missing_fences)


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a JSONL file, packed with gzip or not.

    Raises:
        UserError: no such file, or not of this layout.
    """
    if not Path(path).is_file():  # a device may have no end
        raise UserError(f"cannot read HumanEval's problems from {path}: there is no such file")
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
        problems = [Problem(**json.loads(line)) for line in text.splitlines() if line.strip()]
        for problem in problems:
            compile(_test_source(problem), problem.task_id, "exec", dont_inherit=True)
    except (OSError, EOFError, ValueError, TypeError, SyntaxError, RecursionError, zlib.error) as error:
        raise UserError(f"cannot read HumanEval's problems from {path}: {error}") from error
    if not problems:
        raise UserError(f"no problems in {path}")
    return problems


def truncate(completion: str) -> str:
    """The text before the first stop string: further definitions and statements are not part of the function."""
    return completion[: min((at for at in map(completion.find, STOPS) if at >= 0), default=len(completion))]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n completions, drawn without replacement, hold one of the c that passed.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al., as a product of numbers in [0, 1].
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the mean of `pass_at_k` over problems, of records with as many samples for each problem."""
    passed: dict[str, list[bool]] = {}
    for record in records:
        passed.setdefault(record["task_id"], []).append(record["passed"])
    samples = len(records) // len(passed)
    means = {
        f"pass@{k}": sum(pass_at_k(samples, sum(each), k) for each in passed.values()) / len(passed)
        for k in KS
        if k <= samples
    }
    return {"problems": len(passed), "samples": samples, "passed": sum(map(sum, passed.values())), **means}


def _write_and_run(
    completer: Completer,
    tasks: list[tuple[Problem, int]],
    prompts: list[str],
    options: HumanEvalOptions,
    pool: ThreadPoolExecutor,
) -> Iterator[dict[str, Any]]:
    """Records of one batch of (problem, number of the sample): completed together, then run one by one."""
    completions = [truncate(text) for text in completer.complete(prompts)]
    outcomes = pool.map(lambda task, text: _test(task[0], text, options), tasks, completions)
    for (problem, sample), completion, outcome in zip(tasks, completions, outcomes, strict=True):
        yield {"task_id": problem.task_id, "sample": sample, "completion": completion, **outcome._asdict()}


def _test(problem: Problem, completion: str, options: HumanEvalOptions) -> Outcome:
    source = problem.prompt.strip() + completion
    limits, accept = options.limits, options.accept_missing_fences
    return run_program(source, _test_source(problem), problem.entry_point, limits, accept)


def _test_source(problem: Problem) -> str:
    """The published test, after the prompt: some tests use helper functions that the prompt defines."""
    return f"{problem.prompt}\n{problem.test}"


def _progress() -> Progress:
    passed = TextColumn("{task.fields[passed]} passed")
    columns = TextColumn("HumanEval"), BarColumn(), MofNCompleteColumn(), passed, TimeRemainingColumn()
    return Progress(*columns, console=PlainConsole())


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[Any], None]]:
    """A function that writes one line of JSON to ``<name>.writing``, which gets its name at the end."""
    if path is None:
        yield lambda record: None
        return
    unfinished = path.with_name(f"{path.name}.writing")
    with unfinished.open("w", encoding="utf-8", buffering=1) as file:
        yield lambda record: file.write(json_line(record))
    os.replace(unfinished, path)
