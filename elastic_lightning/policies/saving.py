"""Writing a policy as a folder that any transformers user can load."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.policies.adapters import merge
from elastic_lightning.policies.sums import write_sums

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]")  # where a tokenizer has none of its own: the first that it knows


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, adapter: str = "merged"
) -> None:
    """Save model and tokenizer with `save_pretrained`, so that plain transformers reads padded batches with them.

    Args:
        adapter: for a LoRA model, "merged" writes the base model with the adapter folded in, "adapter" the adapter
            alone.
    """
    if adapter not in ("merged", "adapter"):
        raise UserError(f"adapter must be merged or adapter, got {adapter!r}")
    if adapter == "merged":
        check_mergeable(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if hasattr(model, "merge_and_unload") and adapter == "merged":
        # On a copy: merging and unmerging in place would leave rounding behind in the model being trained.
        model = merge(copy.deepcopy(model))
    tokenizer = for_plain_use(tokenizer, model)
    with _padding_known(model, tokenizer):
        model.save_pretrained(folder)
        if getattr(getattr(model, "active_peft_config", None), "task_type", None) == "SEQ_CLS":
            model.config.save_pretrained(folder)  # the names of its labels: peft keeps none, the base model has others
    tokenizer.save_pretrained(folder)
    write_sums(Path(folder), sorted(Path(folder).glob("*.safetensors")))


def save_value_head(weights: dict[str, Tensor], folder: Path) -> None:
    """Write a value head beside its policy, where there is one."""
    if weights:
        file = folder / "value_head.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, file)
        write_sums(folder, [file], add=True)


def for_plain_use(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> PreTrainedTokenizerBase:
    """A copy that pads as `model` wants it: with a token that has an embedding, at the left where texts go on."""
    tokenizer = copy.deepcopy(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    outside = tokenizer.pad_token_id
    if outside is None or outside >= rows:
        inside = (token for token, index in tokenizer.get_vocab().items() if index < rows)
        tokenizer.pad_token = usable_pad(tokenizer, rows) or next(inside)
        if outside is not None and tokenizer.is_fast:
            _forget(tokenizer, outside)
    tokenizer.padding_side = "left" if _plain(model).can_generate() and not model.config.is_encoder_decoder else "right"
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # or transformers would not write it down
    return tokenizer


def _forget(tokenizer: PreTrainedTokenizerBase, token: int) -> None:
    """Take an added token out of a tokenizer, in place: no text holds a pad token that was added for us."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["added_tokens"] = [added for added in described["added_tokens"] if added["id"] != token]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))


def usable_pad(tokenizer: PreTrainedTokenizerBase, rows: int) -> str | None:
    """A special token to pad with where a tokenizer has none for it, of an id below `rows`; None where it has none."""
    known = tokenizer.get_vocab()
    special = (*PAD_TOKENS, tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token)
    return next((token for token in special if known.get(token, rows) < rows), None)


@contextmanager
def _padding_known(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within this context the config of a classifier names the tokenizer's pad token, without which it reads no batch:
    a decoder's head scores the last token before padding."""
    if _plain(model).can_generate():
        yield
        return
    config, before = model.config, model.config.pad_token_id
    config.pad_token_id = tokenizer.pad_token_id
    try:
        yield
    finally:
        config.pad_token_id = before


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_mergeable(model: nn.Module) -> None:
    """Raise a `UserError` where the base model is quantised: merged into it, the adapter would be rounded away."""
    if any(getattr(module, "is_quantized", False) for module in model.modules()):
        raise UserError(
            "the base model is quantised, and an adapter merged into it would be rounded: save the adapter alone "
            "(adapter: adapter), and merge it into the whole base with `elastic-lightning merge`"
        )
