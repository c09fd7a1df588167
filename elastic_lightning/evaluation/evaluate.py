"""`elastic-lightning evaluate`: what training cost a model beside its reward, in one file `evaluation.json`.

Three parts, each where its file is given: perplexity of held-out texts, HumanEval, and the reward of answers to
held-out questions. `elastic-lightning report` shows the file beside the training curves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.bounded_yaml import bound_command_lines
from elastic_lightning.checks import check_counts, check_seed, check_text
from elastic_lightning.data.questions import Shares
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.completion import PolicyCompleter
from elastic_lightning.evaluation.generate import generate, load
from elastic_lightning.evaluation.held_out import QUESTION, read_documents, read_prompts
from elastic_lightning.evaluation.humaneval import (
    STOPS,
    HumanEvalOptions,
    check_allowed,
    evaluate_humaneval,
    read_problems,
)
from elastic_lightning.evaluation.perplexity import Document, check_windows, sliding_perplexity, tokens_to_score
from elastic_lightning.evaluation.tax import FILE, describe
from elastic_lightning.locks import locked
from elastic_lightning.outputs import check_absent, check_writable, write_whole
from elastic_lightning.policies import ActorCritic, CausalLM, Sampling
from elastic_lightning.rewards import Reward, reads_special_tokens, score
from elastic_lightning.terminal import PlainConsole

RECORDS = "humaneval.jsonl"


@dataclass(frozen=True)
class TextOptions:
    """Perplexity of held-out texts.

    Attributes:
        path: a table (JSONL, CSV, both also gzipped, or Parquet) or plain text.
        column: of the table; without it, `question` with `answers` or `response_j`: the answer is scored.
        length: tokens in a window.
        stride: tokens that a window is further on than the one before.
        packed: measure as a run's validation does, in blocks of `length` tokens (data's block_size): texts end to end
            with an end of text after each, which is scored too. By default each text is read by itself.
        limit: only the first so many rows.
        shares: of a file of questions that `StackExchangeDataModule` shares out among stages: read those alone that it
            holds out for a test.
        batch_size: windows a forward.
    """

    path: str
    column: str = "text"
    length: int = 1024
    stride: int = 512
    packed: bool = False
    limit: int | None = None
    shares: Shares | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_windows(self.length, self.stride)
        check_counts("texts.", vars(self), "length", "limit", "batch_size")


@dataclass(frozen=True)
class QuestionOptions:
    """Reward of answers to held-out questions.

    Attributes:
        path: a table (JSONL, CSV, both also gzipped, or Parquet).
        column: of the table.
        template: of a prompt; {} stands for the column's text.
        limit: only the first so many rows.
        shares: as in `TextOptions`.
        max_prompt_tokens: longer prompts are left out, and counted.
        sampling: how answers are drawn.
        seed: of sampling.
        batch_size: answers drawn at once.
    """

    path: str
    column: str = "question"
    template: str = QUESTION
    limit: int | None = None
    shares: Shares | None = None
    max_prompt_tokens: int | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=128))
    seed: int = 1
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_counts("questions.", vars(self), "limit", "max_prompt_tokens", "batch_size")
        check_seed("questions.seed", self.seed)
        check_text("questions.template", self.template)


def evaluate(
    model: str,
    output: str | Path | None = None,
    texts: TextOptions | None = None,
    humaneval: HumanEvalOptions | None = None,
    questions: QuestionOptions | None = None,
    reward: Reward | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a model; each part is written to `evaluation.json` as soon as it is there.

    Parts that an earlier call measured for the same model stay in the file until they are measured anew.

    Args:
        model: a `save_pretrained` folder, a hub id or a checkpoint of a PPO run.
        output: the folder of `evaluation.json`; the model's own by default.
        texts: what perplexity is measured on.
        humaneval: how programs are written and run.
        questions: what is asked; needs `reward`.
        reward: scores the answers.
        force: replace a file of another model, or of somebody else.
        trust_remote_code: run the python code that comes with the model; off unless asked.

    Returns:
        What the file holds: `model`, and of `perplexity`, `humaneval` and `reward` those that were measured.

    Raises:
        UserError: an option or a file is wrong, or a file would be written over (before anything is measured), or a
            part failed.
    """
    folder = _folder(model, output)
    check_writable(folder, FILE)
    _earlier(folder, model, humaneval is not None, force)
    if not any((texts, humaneval, questions)):
        raise UserError("evaluate: nothing to measure: give texts.path, humaneval.path or questions.path")
    if (questions is None) != (reward is None):
        raise UserError("evaluate: questions and a reward go together: give questions.path and --reward")
    prompts = (
        None
        if questions is None
        else read_prompts(questions.path, questions.column, questions.template, questions.limit, questions.shares)
    )
    if humaneval is not None:
        check_allowed(humaneval)
        read_problems(humaneval.path)
    policy, tokenizer = load(model, trust_remote_code)
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if texts is not None:
        block = texts.length if texts.packed else None
        documents = read_documents(texts.path, tokenizer, texts.column, texts.limit, texts.shares, block)
        parts["perplexity"] = lambda: measure_perplexity(policy, documents, texts)
    if questions is not None:
        reward.to(next(policy.parameters()).device)
        reward.bind(policy.lm)
        fitting = _fitting(policy, tokenizer, prompts, questions)
        parts["reward"] = lambda: (
            measure_reward(policy, tokenizer, fitting, reward, questions) | {"left_out": len(prompts) - len(fitting)}
        )
    if humaneval is not None:
        parts["humaneval"] = lambda: measure_humaneval(policy, tokenizer, humaneval, folder)
    with locked(folder, "elastic-lightning evaluate"):
        results = _earlier(folder, model, humaneval is not None, force)
        for name, measure in parts.items():
            results[name] = measure()
            write_whole(folder / FILE, json.dumps(results, indent=2) + "\n")
    return results


def measure_perplexity(policy: ActorCritic, documents: list[Document], options: TextOptions) -> dict[str, Any]:
    """Sliding-window perplexity of the documents."""
    if not isinstance(policy.lm, CausalLM):
        raise UserError("evaluate: perplexity of texts is that of a causal language model, not of an encoder-decoder")
    with _progress("perplexity {task.fields[value]:.4g}") as progress:
        task = progress.add_task("", total=tokens_to_score(documents), value=float("nan"))
        measured = sliding_perplexity(
            policy.lm,
            documents,
            options.length,
            options.stride,
            options.batch_size,
            lambda tokens, perplexity: progress.update(task, advance=tokens, value=perplexity),
        )
    return measured._asdict() | {"options": asdict(options)}


def measure_reward(
    policy: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward: Reward,
    options: QuestionOptions,
) -> dict[str, Any]:
    """Mean reward of one answer a prompt with its standard error, the means of its parts, and the answers' length.

    An answer on which the reward raised, and masks it, is in no mean: `without_reward` counts them.
    """
    rewards: list[float] = []
    parts: dict[str, list[float]] = {}
    lengths: list[int] = []
    complete: list[bool] = []
    special = reads_special_tokens(reward)
    with _progress("reward {task.fields[value]:.4g}") as progress:
        task = progress.add_task("", total=len(prompts), value=float("nan"))
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            rows = {"first_row": start, "special_tokens": special}
            answers = generate(policy, tokenizer, batch, options.sampling, options.seed, 1, options.batch_size, **rows)
            asked, responses = ([row[name] for row in answers] for name in ("prompt", "response"))
            marked = zip(*(row["marked"] for row in answers), strict=True) if special else None
            scores = score(reward, asked, responses, marked and tuple(map(list, marked)))
            valid = torch.ones(len(batch), dtype=torch.bool) if scores.valid is None else scores.valid.cpu()
            rewards += scores.total.cpu()[valid].tolist()
            for name, part in scores.components.items():
                parts.setdefault(name, []).extend(part.cpu()[valid].tolist())
            lengths += [answer["tokens"] for answer in answers]
            complete += [answer["complete"] for answer in answers]
            progress.update(task, advance=len(batch), value=_mean(rewards))
    if not rewards:
        raise UserError(f"evaluate: the reward raised on all {len(prompts)} answers")
    return {
        "mean": _mean(rewards),
        "standard_error": _standard_error(rewards),
        "samples": len(rewards),
        "without_reward": len(prompts) - len(rewards),
        "length": _mean(lengths),
        "complete": _mean(complete),
        "components": {name: _mean(values) for name, values in parts.items()},
        "options": asdict(options),
    }


def measure_humaneval(
    policy: ActorCritic, tokenizer: PreTrainedTokenizerBase, options: HumanEvalOptions, folder: Path
) -> dict[str, Any]:
    """pass@k of HumanEval; the programs and what came of them lie beside the file."""
    completer = PolicyCompleter(policy, tokenizer, options.sampling, options.seed, STOPS)
    folder.mkdir(parents=True, exist_ok=True)
    return evaluate_humaneval(completer, options, folder / RECORDS)["summary"]


def main(argv: list[str]) -> int:
    """Parse the arguments, measure, print and write.

    Raises:
        UserError: see `evaluate`.
    """
    parser = make_parser()
    given = parser.instantiate_classes(parser.parse_args(argv))
    humaneval = given.humaneval and replace(given.humaneval, allow_code_execution=given.allow_code_execution)
    results = evaluate(
        given.model,
        given.output,
        given.texts,
        humaneval,
        given.questions,
        given.reward,
        given.force,
        given.trust_remote_code,
    )
    console = PlainConsole()
    for line in describe(results):
        console.print(line, soft_wrap=True)
    console.print(f"Wrote {_folder(given.model, given.output) / FILE}", soft_wrap=True)
    return 0


def make_parser():
    from jsonargparse import ArgumentParser

    bound_command_lines()
    parser = ArgumentParser(prog="elastic-lightning evaluate", description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_argument("--model", type=str, required=True, help="save_pretrained folder, hub id, or .ckpt file")
    parser.add_argument("--output", type=str | None, help=f"folder of {FILE}; the model's own by default")
    parser.add_argument("--texts", type=TextOptions | None, help="perplexity: held-out texts")
    parser.add_argument("--questions", type=QuestionOptions | None, help="reward: held-out questions")
    parser.add_argument("--reward", type=Reward | None, help="scores the answers, e.g. ClassifierReward")
    parser.add_argument("--humaneval", type=HumanEvalOptions | None, help="pass@k of programs that the model writes")
    parser.add_argument("--trust_remote_code", action="store_true", help="run python code that comes with the model")
    parser.add_argument(
        "--allow-code-execution", action="store_true", help="let HumanEval run what the model wrote, in its sandbox"
    )
    parser.add_argument("--force", action="store_true", help=f"replace {FILE} of another model, or of somebody else")
    return parser


def _folder(model: str, output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    path = Path(model)
    if not path.exists():
        raise UserError(f"evaluate: no such folder: {model}; for a hub id say with --output where {FILE} goes")
    return path if path.is_dir() else path.parent


def _earlier(folder: Path, model: str, humaneval: bool, force: bool) -> dict[str, Any]:
    """What the file holds of this model, or the beginning of a new one; raises where a file of another one is there."""
    file, results = folder / FILE, {"model": model}
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() and not file.is_symlink() else None
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("model"), str) and _same(found["model"], model):
        results |= found | results
    else:
        check_absent(file, force)
    if humaneval and "humaneval" not in results:
        check_absent(folder / RECORDS, force)
    return results


def _same(one: str, other: str) -> bool:
    """Whether two hub ids or paths are of one model."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def _fitting(
    policy: ActorCritic, tokenizer: PreTrainedTokenizerBase, prompts: list[str], options: QuestionOptions
) -> list[str]:
    """The prompts that are short enough; raises where one of them does not fit the model's context."""
    lengths = policy.lm.encode(tokenizer, prompts).mask.sum(dim=1).tolist()
    limit = options.max_prompt_tokens or max(lengths)
    fitting = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= limit]
    if not fitting:
        raise UserError(f"evaluate: no question of at most {limit} tokens in {options.path}: raise max_prompt_tokens")
    policy.lm.check_context(max(length for length in lengths if length <= limit), options.sampling.max_new_tokens)
    return fitting


def _progress(text: str) -> Progress:
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=PlainConsole())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _standard_error(values: list[float]) -> float | None:
    """Of the mean; None (JSON has no NaN) of a single value."""
    return torch.tensor(values, dtype=torch.float64).std().item() / len(values) ** 0.5 if len(values) > 1 else None
