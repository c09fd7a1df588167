"""Checksums of exported weights, beside them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from elastic_lightning.errors import UserError

SUMS = "SHA256SUMS"  # as sha256sum writes and checks it
CHUNK = 2**22  # bytes hashed at a time


def write_sums(folder: Path, files: list[Path], add: bool = False) -> None:
    """Keep the SHA-256 of files of weights in their folder, in the place of what stands there or, to `add`, beside it.

    Safetensors have no checksum of their own. Writing and checking take about a second for 1.5 GB on a CPU that knows
    SHA-256, three without.
    """
    before = (folder / SUMS).read_text("utf-8").splitlines(keepends=True) if add else []
    names = {file.name for file in files}  # of which a sum may be there, of what they held before
    lines = [line for line in before if line.rstrip().partition("  ")[2] not in names]
    lines += [f"{_sha256(file)}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def check_sums(folder: str | Path) -> None:
    """Raise a `UserError` where weights in a folder are not those that we saved there; where no sums are, nothing is
    known."""
    file = Path(folder) / SUMS
    if not file.is_file():
        return
    lines = file.read_text("utf-8", "replace")
    for digest, name in re.findall(r"^([0-9a-f]{64}) [ *](\S+\.safetensors)$", lines, re.MULTILINE):
        weights = Path(folder) / Path(name).name
        if weights.is_file() and _sha256(weights) != digest:
            raise UserError(
                f"{weights} is damaged: its bytes are not those that were saved (where it was changed on purpose, "
                f"remove {file})"
            )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
