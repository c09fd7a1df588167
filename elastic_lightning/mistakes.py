"""Errors that other libraries raise for wrong input, as the one line that the command line shows."""

from __future__ import annotations

import errno
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from elastic_lightning.errors import UserError
from elastic_lightning.terminal import plain

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FREE_SPACE = "free some space; a run goes on with --ckpt_path last"
WHOLE = "ELASTIC_LIGHTNING_TRACEBACK"  # set to anything: where an error came from is shown before its line
CALLBACK_FIELDS = (
    " (--trainer.callbacks.FIELD is of the callback that --trainer.callbacks+=NAME adds before it; change those of a "
    "configuration file in the file)"
)
NOT_UTF8 = "the name or text {} is not UTF-8: rename or convert it (or set LC_ALL=C.UTF-8, where it is)"
LONGEST = 480  # letters of another library's message
NO_CLASS = "there is no class {!r}: check its spelling, or give its full import path"
EMPTY = ("Expected a", "Not a valid subclass", "Does not validate", "Problem with given", "a class path", "a dict ")
PARSER = "Does not validate against any of the Union subtypes"  # how jsonargparse begins what a constructor raised


def as_line(error: Exception, argv: list[str]) -> str | None:
    """The line to show; None for what is no mistake of the user's."""
    for cause in _chain(error):  # a parser wraps what a constructor raises
        if isinstance(cause, UserError):
            return str(cause)
        if line := _of_the_machine(cause):
            return line
        if isinstance(cause, UnicodeEncodeError) and cause.reason == "surrogates not allowed":
            return NOT_UTF8.format(plain(cause.object)[:200])
    if type(error).__name__ == "ArgumentError":
        fields = [argument for argument in argv if argument.startswith("--trainer.callbacks.")]
        return condense(str(error)) + (CALLBACK_FIELDS if fields else "")
    if isinstance(error, ValueError) and PARSER in str(error):
        return condense(str(error))
    if type(error).__name__ == "MisconfigurationException":
        return shortened(str(error))
    if isinstance(error, OSError) and error.filename is not None and origin(error.__traceback__) is not None:
        return f"{error.strerror}: {error.filename}"
    if origin(error.__traceback__) in ("lightning", "jsonargparse"):
        return foreign_line(error)
    return None


@contextmanager
def foreign_errors_as_lines(when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within this context, where `when()` says so, what other libraries raise is a `UserError`: before anything is
    trained it is what they say to a setting that is wrong."""
    try:
        yield
    except Exception as error:
        if as_line(error, []) is not None or not origin(error.__traceback__) or not when():
            raise
        raise UserError(foreign_line(error)) from error


def foreign_line(error: Exception) -> str:
    """Another library's error as a line that says how to see where it came from."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{shortened(text)} ({WHOLE}=1 shows where)"


def origin(trace: TracebackType | None) -> str | None:
    """The package whose code raised an error, "" for ours; None where code of the user's took part."""
    ours = f"{Path(__file__).parent}{os.sep}"
    standard = f"{sysconfig.get_paths()['stdlib']}{os.sep}"
    package = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        installed = re.search(r"[/\\](?:site|dist)-packages[/\\](\w+)", file)
        if file.startswith((ours, "<")):
            package = ""
        elif installed or file.startswith(standard):
            package = installed[1] if installed else "python"
        else:
            return None
        trace = trace.tb_next
    return package


def condense(message: str) -> str:
    """One line of a parser's message: the innermost problem, without the alternatives it tried and the whole value."""
    problems = re.findall(
        r"Problem with given class_path '([^']+)':\s*(.*?)(?=\n\s*- |\n\s*Given value|\Z)", message, re.S
    )
    foreign = re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", message)
    choices = re.search(r'Parser key "([^"]+)":\s*Does not validate against any.*Given value: (.*)', message, re.S)
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    if problems:
        path, reason = problems[-1]
        told = PARSER not in reason and not reason.rstrip().endswith(":")
        message = f"{path.rsplit('.', 1)[-1]}: {reason if told else _innermost(message)}"
    elif foreign:
        message = f"{foreign[1]} is not a {foreign[2]}"
    elif choices:
        expected = ", ".join(dict.fromkeys(re.findall(r"- Expected an? (.*?)(?=\n|\Z)", message)))
        message = f"{choices[1]} cannot be {' '.join(choices[2].split())[:100]}: expected {expected[:350]}"
    elif unknown:
        message = NO_CLASS.format(unknown[1])
    elif PARSER in message:
        message = _innermost(message)
    return shortened(message)


def _innermost(message: str) -> str:
    """Of the alternatives that a parser tried for the innermost key, what the first said that says something."""
    key = re.findall(r'Parser key "([^"]+)"', message)
    unknown = re.search(r"Expected a dot import path string: (\S+)", message)
    said = [line for line in re.findall(r"^\s*- (.+)$", message, re.M) if not line.startswith(EMPTY)]
    value, expected = re.search(r"Given value: (.*)", message), re.findall(r"- Expected an? (.+)", message)
    if unknown:
        reason = NO_CLASS.format(unknown[1])
    elif said:
        reason = said[0]
    else:
        reason = f"cannot be {value[1][:100] if value else 'this'}: expected {', '.join(dict.fromkeys(expected))}"
    return f"{key[-1]}: {reason}" if key else reason


def shortened(message: str) -> str:
    """A message on one line, cut where it is too long to be read at a glance."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def _of_the_machine(error: BaseException) -> str | None:
    """The line for a machine that has no more disk or memory."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}; {FREE_SPACE}"
    if type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in str(error) for code in DISK_FULL):
        return f"{error}; {FREE_SPACE}"
    if "torch" not in sys.modules:
        return None
    from elastic_lightning.policies.portions import first_line, out_of_memory

    if not out_of_memory(error):
        return None
    return f"{first_line(error)} (lower ppo.micro_batch_size, data's batch_size or sampling.max_new_tokens)"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what led to it, each once: an error raised again can be the context of its own cause."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and all(cause is not other for other in chain):
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain
