"""Fingerprints of frozen weights, and what a checkpoint of an adapter weighs."""

import hashlib

import pytest
import torch
from lightning import Trainer
from torch import nn

from elastic_lightning.algorithms import AdamWConfig, LanguageModel
from elastic_lightning.algorithms.kept_weights import CHUNK, check_fingerprints, fingerprint, names_without
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource


def test_a_fingerprint_tells_apart_names_types_shapes_and_values():
    weight = torch.arange(6.0).view(2, 3)
    others = [
        {"b": weight},
        {"a": weight.double()},
        {"a": weight.view(3, 2)},
        {"a": weight.flip(0)},
        {"a": -weight},
        {"a": weight + torch.tensor([0, 0, 1e-6])},
        {"a": weight, "b": weight},
        {},
    ]
    prints = [fingerprint({"a": weight}), *map(fingerprint, others)]
    assert len(set(prints)) == len(prints)
    strided = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert fingerprint({"a": strided}) == fingerprint({"a": weight}) == fingerprint({"a": nn.Parameter(weight)})
    assert fingerprint({"a": weight, "b": -weight}) == fingerprint({"b": -weight, "a": weight})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64])
def test_every_type_is_read_bit_by_bit(dtype):
    weight = torch.tensor([0, 1, 1, 0]).to(dtype)
    assert fingerprint({"a": weight}) != fingerprint({"a": weight.roll(1)})


def test_a_change_anywhere_in_a_large_tensor_is_seen():
    weight = torch.zeros(CHUNK + 10, dtype=torch.int8)
    seen = {fingerprint({"a": weight})}
    for place in (0, CHUNK - 1, CHUNK, CHUNK + 9):
        changed = weight.clone()
        changed[place] = 1
        seen.add(fingerprint({"a": changed}))
    assert len(seen) == 5


def test_the_sums_are_those_of_a_loop_over_the_bits():
    weight = torch.tensor([1.5, -2.0, 3.25])
    bits = [int.from_bytes(value.numpy().tobytes(), "little", signed=True) for value in weight]
    plain, ordered = sum(bits), sum((place + 1) * value for place, value in enumerate(bits))
    text = f"a torch.float32 (3,) ['{plain}:{ordered}']\n"
    assert fingerprint({"a": weight}) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_changed_parts_are_named():
    check_fingerprints({"a": "1", "gone": "3"}, {"a": "1", "new": "4"})
    with pytest.raises(UserError, match="weights of b are not"):
        check_fingerprints({"a": "1", "b": "2"}, {"a": "1", "b": "3"})


def test_a_tied_weight_is_left_out_under_both_names():
    layer = nn.Linear(2, 2)
    state = {"in": layer.weight, "out": layer.weight.data, "bias": layer.bias}
    assert names_without(state, {"in": layer.weight}) == {"bias"}


def save(module, path):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(module, torch.utils.data.DataLoader([torch.arange(12).view(2, 6)], batch_size=None))
    trainer.save_checkpoint(path)
    return path


def test_an_adapters_checkpoint_weighs_what_is_trained(tmp_path, tokenizer_folder):
    size = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 256, "n_positions": 64}

    def module(lora):
        torch.manual_seed(0)
        source = ModelSource(architecture=size, tokenizer=tokenizer_folder, lora=LoRA(rank=1) if lora else None)
        return LanguageModel(source, AdamWConfig(1e-2))

    adapter, whole = module(True), module(False)
    small, large = (save(m, tmp_path / f"{name}.ckpt").stat().st_size for name, m in (("a", adapter), ("w", whole)))
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in whole.parameters())
    assert trained * 100 < everything and small * 15 < large
    assert small < 3 * 4 * trained + 60_000  # weights and the two moments of Adam, and what is not tensors

    loaded = LanguageModel.load_from_checkpoint  # builds a base of random weights of its own
    torch.manual_seed(1)
    with pytest.raises(UserError, match="weights of base are not"):
        loaded(tmp_path / "a.ckpt", weights_only=True)
    torch.manual_seed(0)
    again = loaded(tmp_path / "a.ckpt", weights_only=True)
    theirs = dict(adapter.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in again.named_parameters())
