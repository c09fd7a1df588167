"""Text that others wrote, shown so that it cannot steer what shows it; and an output that never is a reason to fail.

Names of folders, samples of a model, messages of libraries and the ends of logs may hold anything: rich's markup,
sequences that move the cursor, write the clipboard or ask the terminal to type an answer, characters that turn the
direction of writing.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

# C0, DEL and C1; line separators and what turns the direction of writing; halves of characters, which no file can hold.
CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
DRAWING = r"\x1b\[[0-9;?]*[A-HJKfhlm]"  # colours, the cursor and erasing: what rich's progress bars are made of
LINE_UP = r"\x1b\[A"  # and all that those of tqdm need, on stderr
SPELLED = {"±": "+-", "…": "..."}  # what our own tables and notes hold that ASCII lacks
GONE = (errno.EPIPE, errno.EIO)  # nobody reads any more: `| head` has ended, or the terminal is closed


def plain(text: object, keep: str = "") -> str:
    r"""The text with every control character spelled out (``\x1b``, ``\n``), but those of `keep`."""
    return re.sub(CONTROL, lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def cell(text: object) -> Text:
    """The same for a table or a line of rich, whatever console prints it: markup in it is text."""
    return Text(plain(text))


def json_line(value: Any) -> str:
    """One line of JSON in which text stays readable, and no character is one that a terminal would act on."""
    line = json.dumps(value, ensure_ascii=False)
    return re.sub(CONTROL, lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"


class PlainConsole(Console):
    """rich's console for texts of others: no markup, emoji codes or control characters, nothing it cannot encode."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        shown = plain(text, keep="\n\t").encode(self.encoding, "spelled").decode(self.encoding)
        return super().render_str(shown, **options)


class Screen(io.TextIOWrapper):
    """A standard stream that takes any text in any encoding, lets pass of control sequences what draws alone, and goes
    on in silence when its reader has gone: hours of training are not to end with a `| head`.

    Args:
        descriptor: of the open file.
        encoding: of what is written.
        at_once: write every piece as it comes.
        drawing: a pattern of the sequences that pass.
    """

    def __init__(self, descriptor: int, encoding: str, at_once: bool, drawing: str = DRAWING) -> None:
        raw = _Lasting(descriptor, "w", closefd=False)
        super().__init__(io.BufferedWriter(raw), encoding=encoding, errors="spelled", line_buffering=raw.isatty())
        self.at_once, self.pattern = at_once, re.compile(f"{drawing}|{CONTROL}")

    def write(self, text: str) -> int:
        safe = self.pattern.sub(lambda found: _unless_drawing(found[0]), text)
        super().write(safe)
        if self.at_once:
            self.flush()
        return len(text)


def use_any_output() -> None:
    """Make stdout and stderr of this process `Screen`s. Streams that are closed become /dev/null: else the next file
    that is opened would get their number, and what is printed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free
    for name, descriptor, drawing in (("stdout", 1, DRAWING), ("stderr", 2, LINE_UP)):
        now = getattr(sys, name)
        if now is getattr(sys, f"__{name}__"):  # else somebody reads what is printed, as notebooks and tests do
            encoding = getattr(now, "encoding", None) or "utf-8"
            at_once = descriptor == 2 or getattr(now, "write_through", False)
            setattr(sys, name, Screen(descriptor, encoding, at_once, drawing))


class _Lasting(io.FileIO):
    failed = False

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE and not self.failed:
                self.failed = True  # said once: what is left in buffers would fail again when python ends
                raise
            return len(data)


def _escape(character: str) -> str:
    return ascii(character)[1:-1]


def _unless_drawing(found: str) -> str:
    return found if len(found) > 1 or found in "\n\r\t\b" else _escape(found)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """For `codecs`: a character that an encoding lacks, in letters that it has."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(
        SPELLED.get(letter) or _escape(letter) for letter in error.object[error.start : error.end]
    ), error.end


codecs.register_error("spelled", _spell)
