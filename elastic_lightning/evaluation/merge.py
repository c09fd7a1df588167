"""`elastic-lightning merge FOLDER --output DIR`: an adapter folded into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from elastic_lightning.evaluation.arguments import Parser
from elastic_lightning.outputs import check_writable
from elastic_lightning.policies.merging import merge_adapter
from elastic_lightning.policies.sources import Dtype
from elastic_lightning.terminal import plain


def main(argv: list[str]) -> int:
    """Parse the arguments, merge, say where.

    Raises:
        UserError: there is no adapter in the folder, its base does not load, or the output folder holds files.
    """
    parser = Parser("merge", __doc__)
    parser.add_argument("folder", help="a peft adapter of a language model or a sequence classifier")
    parser.add_argument("--output", required=True, help="a new folder for the whole model")
    parser.add_argument("--base", help="hub id or folder, in place of the base model that the adapter names")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="of the weights; the base model's by default")
    parser.add_argument("--trust_remote_code", action="store_true", help="run python code that comes with the model")
    given = parser.parse_args(argv)
    check_writable(Path(given.output), "the merged model")
    merge_adapter(given.folder, given.output, given.base, given.dtype, given.trust_remote_code)
    print(f"wrote the merged model to {plain(given.output)}")
    return 0
