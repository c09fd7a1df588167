"""How deep the values of a JSON file are nested: thousands of levels end the process that `datasets` parses them in."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from elastic_lightning.errors import UserError

DEEPEST = 60  # levels; a few more have no Arrow type
BATCH = 2**22  # bytes read at a time
STRING = re.compile(rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*"?')  # brackets within one do not count
NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_nesting(file: Path) -> None:
    """Raise a `UserError` where a value of a JSON file (perhaps gzipped) is nested more than `DEEPEST` levels.

    A file that is damaged is left to the parser.
    """
    depth = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            while lines := stream.readlines(BATCH):
                brackets = np.frombuffer(STRING.sub(b"", b"".join(lines)).translate(None, NO_BRACKETS), np.uint8)
                steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
                depths = depth + np.cumsum(steps)
                if len(depths) and depths.max() > DEEPEST:
                    raise UserError(f"{file} holds a value that is nested more than {DEEPEST} levels deep: flatten it")
                depth = max(0, int(depths[-1])) if len(depths) else depth
    except (OSError, EOFError, zlib.error):
        return
