"""Tokenizers trained on the data itself, for policies that start from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from elastic_lightning.bounded_yaml import bound_command_lines
from elastic_lightning.errors import UserError
from elastic_lightning.outputs import check_absent, check_writable
from elastic_lightning.terminal import plain

PAD, EOS = "<pad>", "<eos>"
FILES = ("tokenizer.json", "tokenizer_config.json")  # of a tokenizer that is saved


def train_bpe(texts: Iterable[str], vocabulary: int, lower_case: bool = False) -> PreTrainedTokenizerBase:
    """Byte-level BPE (as GPT-2's) of `vocabulary` tokens, with a pad and an end-of-text token of their own.

    With `lower_case` it lowers what it reads, then and ever after.
    """
    from tokenizers import ByteLevelBPETokenizer

    if vocabulary < 258:
        raise UserError(f"a byte-level vocabulary has 256 bytes and 2 special tokens at least, got {vocabulary}")
    bpe = ByteLevelBPETokenizer(lowercase=lower_case)
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[PAD, EOS], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def main(argv: list[str]) -> int:
    """``elastic-lightning tokenizer``: train a tokenizer on a data module's texts and save it."""
    from jsonargparse import ArgumentParser

    from elastic_lightning.data.module import TextDataModule

    bound_command_lines()
    parser = ArgumentParser(
        prog="elastic-lightning tokenizer",
        description="Train a tokenizer on a data module's texts.",
        exit_on_error=False,
    )
    parser.add_subclass_arguments(TextDataModule, "data", required=True, help="the data module")
    parser.add_argument("--vocabulary", type=int, default=8192, help="number of tokens")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace a tokenizer that is there")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    check_writable(output, "the tokenizer")
    if (output / "config.json").exists():
        raise UserError(f"{output} holds a model, whose tokenizer would be written over: choose another --output")
    for name in FILES:
        check_absent(output / name, arguments.force)
    tokenizer = parser.instantiate_classes(arguments).data.train_tokenizer(arguments.vocabulary)
    tokenizer.save_pretrained(arguments.output)
    print(f"tokenizer of {len(tokenizer)} tokens in {plain(arguments.output)}")
    return 0
