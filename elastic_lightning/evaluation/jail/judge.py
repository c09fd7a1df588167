"""The two sides of a trial: the program in its process, and in another the tests, which call it through a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import wire

ENDED = "the program ended early"


def serve(source: str, entry_point: str, calls: int, replies: int) -> None:
    """Run the program, then answer calls to its function until there are no more. All this is at its mercy."""
    try:
        namespace: dict[str, Any] = {"__name__": "program"}
        exec(compile(source, "program", "exec", dont_inherit=True), namespace)
        function = namespace[entry_point]
        wire.send(replies, {"value": None})
    except BaseException as error:
        wire.send(replies, {"error": describe(error)})
        return
    for call in wire.receive(calls):
        try:
            positional, named = wire.decode(call)
            reply = {"value": wire.encode(function(*positional, **named))}
        except BaseException as error:
            reply = {"error": describe(error), "exit": not isinstance(error, Exception)}
        wire.send(replies, reply)


def judge(test: str, entry_point: str, calls: int, replies: int) -> dict[str, Any]:
    """Run `test`, then its `check` on the program's function; the verdict, {"passed": bool, "reason": str}.

    Nothing of the program is in this process but the plain values it returned. One that ended, or did not answer in
    plain values, has failed, though the test expects an exception and catches all.
    """
    answers = wire.receive(replies)
    ends: list[str] = []

    def candidate(*positional: Any, **named: Any) -> Any:
        call = wire.encode((positional, named))
        try:
            wire.send(calls, call)
            return _answer(answers)
        except Exception as error:
            if type(error) is not ProgramError:
                ends.append(ENDED if isinstance(error, OSError) else describe(error))
            raise

    try:
        _answer(answers)  # the program has run to its end and defines the function
        namespace: dict[str, Any] = {"__name__": "test"}
        exec(compile(test, "test", "exec", dont_inherit=True), namespace)
        namespace[entry_point] = candidate
        namespace["check"](candidate)
    except BaseException as error:
        return {"passed": False, "reason": ends[0] if ends else describe(error)}
    return {"passed": not ends, "reason": ends[0] if ends else "passed"}


def describe(error: BaseException) -> str:
    """`NameError: name 'x' is not defined`, in at most 200 characters."""
    if isinstance(error, ProgramError):
        return str(error)[:200]
    try:
        text = " ".join(str(error).split())
    except BaseException:  # the program's own exception, whose text is the program's too
        text = ""
    return f"{type(error).__name__}: {text}"[:200].removesuffix(": ")


class ProgramError(Exception):
    """The program raised an exception."""


class ProgramEnded(ProgramError):
    """The program is no more, or wanted to end."""


def _answer(answers: Iterator[Any]) -> Any:
    try:
        reply = next(answers)
    except StopIteration:
        raise ProgramEnded(ENDED) from None
    if "error" in reply:
        raise (ProgramEnded if reply.get("exit") else ProgramError)(str(reply["error"]))
    return wire.decode(reply["value"])
