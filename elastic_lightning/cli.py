"""The command line: LightningCLI's fit, validate, test and predict, and commands of our own beside them."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path

from elastic_lightning.errors import UsageError, UserError
from elastic_lightning.mistakes import WHOLE, as_line
from elastic_lightning.processes import end_with_parent
from elastic_lightning.signals import RAISED_FOR, STOPPING, Interrupted, unwinding
from elastic_lightning.terminal import plain, use_any_output

OWN_COMMANDS = {  # name -> module with main(argv), what it does
    "pipeline": ("elastic_lightning.evaluation.pipeline", "run the stages of a pipeline file in order, then report"),
    "report": ("elastic_lightning.evaluation.report", "table and reward-drift frontier of finished runs"),
    "generate": ("elastic_lightning.evaluation.generate", "sample from a policy folder or checkpoint"),
    "evaluate": ("elastic_lightning.evaluation.evaluate", "perplexity, HumanEval and reward of a finished model"),
    "merge": ("elastic_lightning.evaluation.merge", "fold a LoRA adapter into its base model"),
    "tokenizer": ("elastic_lightning.data.tokenizers", "train a tokenizer on a data module's texts"),
}
LIGHTNING_COMMANDS = {
    "fit": "train a model on data, from a configuration file",
    "validate": "measure on the validation data",
    "test": "measure on the test data, and write test.json",
    "predict": "write responses and rewards as JSONL",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Wrong input gives one line on stderr and status 1 (2 from a parser)."""
    end_with_parent()
    process = argv is None  # which ends with this function
    argv = list(sys.argv[1:] if process else argv)
    if process and os.name == "posix":
        use_any_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from elastic_lightning import __version__

        print(__version__)
        return 0
    try:
        with unwinding(STOPPING if argv[0] in LIGHTNING_COMMANDS else (signal.SIGINT,), process):
            return _run(argv[0], argv[1:])
    except Interrupted as stop:
        return _fail(str(stop), stop.code) if str(stop) else stop.code
    except KeyboardInterrupt:
        return _fail("stopped by SIGINT", 130)
    except Exception as error:
        if RAISED_FOR:  # in an import, which made another exception of it
            return _fail(str(stop := Interrupted(RAISED_FOR[0])), stop.code)
        if isinstance(error, UserError):
            return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        message = as_line(error, argv)
        if message is None:
            raise
        return _fail(message, 2)
    finally:
        RAISED_FOR.clear()


def _run(command: str, argv: list[str]) -> int:
    _check_files(argv)
    if command in OWN_COMMANDS:
        return importlib.import_module(OWN_COMMANDS[command][0]).main(argv)
    if command not in LIGHTNING_COMMANDS:
        raise UserError(
            f"unknown command {command!r}; the commands are {', '.join([*LIGHTNING_COMMANDS, *OWN_COMMANDS])}"
        )
    _prepare()
    from elastic_lightning.lightning_cli import run_lightning

    run_lightning([command, *argv])
    return 0


def _check_files(argv: list[str]) -> None:
    """Read the configuration files once before the parser does, which takes a key given twice for its last value, and
    does not say in which file a mistake is. Files that are missing are left to it."""
    from elastic_lightning.evaluation.stages import read_yaml

    flags = ("--config", "-c")
    values = [after for before, after in itertools.pairwise(argv) if before in flags]
    values += [argument.split("=", 1)[1] for argument in argv if argument.startswith(tuple(f"{f}=" for f in flags))]
    for file in map(Path, values):
        content = read_yaml(file) if file.is_file() else {}
        if content is None:
            raise UserError(f"{file} holds no setting, but comments at most: leave it out, or write some")
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected a mapping such as `model: ...`, not a list or a value")


def _prepare() -> None:
    """Silence what a user of this command line can do nothing about, and set what libraries read as they are imported;
    what the environment says wins."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for large tensors; torch reads it as it starts
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*tensorboardX.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # on purpose: no dropout
    warnings.filterwarnings("ignore", message=".*logging interval.*")


def _fail(message: str, status: int) -> int:
    if WHOLE in os.environ:
        traceback.print_exc()
    line = re.sub(r"\s*\n\s*", " ", message)
    print(f"error: {plain(line)}", file=sys.stderr)
    return status


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in LIGHTNING_COMMANDS.items()]
    lines += [f"  {name:<10} {text}" for name, (_, text) in OWN_COMMANDS.items()]
    return "\n".join(
        [
            "usage: elastic-lightning COMMAND ...",
            "",
            "Reinforcement-learning fine-tuning of language models that keeps the language.",
            "",
            "commands (each with --help):",
            *lines,
            "",
            "start here: elastic-lightning pipeline configs/toy/pipeline.yaml",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
