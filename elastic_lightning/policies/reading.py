"""Reading folders and hub ids through libraries: what they raise becomes one line that names what was read."""

from __future__ import annotations

import functools
import pickle
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from transformers.utils import is_sentencepiece_available

from elastic_lightning.errors import UserError
from elastic_lightning.policies.portions import out_of_memory

# What transformers says of a tokenizer that it cannot read without sentencepiece: the second is of models whose config
# alone names it (opus-mt), the third of any other file of a vocabulary.
SENTENCEPIECE_SIGNS = ("requires the SentencePiece library", "to build an AutoTokenizer", "`tiktoken` is required")
REMOTE_CODE = (
    "it comes with Python code of its own, which runs only where trust_remote_code is true (of the policy, classifier "
    "or reward in a config; --trust_remote_code of generate, evaluate and merge): read that code first"
)


@functools.cache
def hub_offline(seconds: float = 5.0) -> bool:
    """Whether the hub cannot be reached; asked once. Then only what was downloaded before can be loaded, at once.

    Without asking, every file of every model would be tried six times with growing pauses, for most of a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds):
            return False
    except urllib.error.HTTPError:
        return False  # it answered
    except OSError:
        return True


@contextmanager
def readable(what: str, path: str) -> Iterator[None]:
    """Within this context whatever is raised is a `UserError` that names a folder or hub id: where files are missing,
    damaged or of another kind, libraries raise exceptions of any kind."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(_not_found(what, path, error)) from error


@contextmanager
def usable(name: str) -> Iterator[None]:
    """Within this context whatever is raised is a `UserError` that says the architecture cannot be used: models fail in
    ways of their own where they do not compute what they are asked to."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{name} is not supported as a policy: {reason_of(error)}") from error


def _not_found(what: str, path: str, error: Exception) -> str:
    folder = Path(path)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        reason = f"no such folder: {path}" if not folder.exists() else reason_of(error)
        return f"cannot load the {what} from {path}: {reason}"
    return (
        f"cannot load the {what} {path!r}: no such folder, and as a hub id it could not be fetched "
        f"({reason_of(error)}); give a local save_pretrained folder, or check the id and the network"
    )


def reason_of(error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):  # it points to a report in the log
        return "its weights have other shapes than its config.json says"
    if isinstance(error, pickle.UnpicklingError):  # whose message advises to load it anyway
        return "its weights are a pickle of more than tensors, which is never loaded, as it can run any code"
    if "trust_remote_code" in str(error):  # it names an argument of transformers
        return REMOTE_CODE
    if not is_sentencepiece_available() and any(sign in str(error) for sign in SENTENCEPIECE_SIGNS):
        return "its vocabulary is a sentencepiece model: pip install 'elastic-lightning[sentencepiece]'"
    line = str(error).strip().split("\n")[0][:200]
    return line if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {line}"
