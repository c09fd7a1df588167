"""One bit that flips in a checkpoint or an exported folder is found, wherever it is."""

import os
import random
import shutil
import subprocess

import pytest
import torch

from elastic_lightning.callbacks.durable import DurableCheckpointIO
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource, load_policy, load_source
from elastic_lightning.policies.checkpoints import check_undamaged, read_checkpoint
from elastic_lightning.policies.saving import save_model
from elastic_lightning.policies.sums import check_sums

CHECKPOINT = {"state_dict": {"a": torch.arange(300.0), "b": torch.ones(7, dtype=torch.bfloat16)}, "epoch": 3}


def flip(path, byte, bit=0):
    """Change one bit of a file, and its time as a disk would not."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def same(one, other):
    weights = one["state_dict"], other["state_dict"]
    return repr(one) == repr(other) and all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


@pytest.mark.parametrize("load", [read_checkpoint, lambda path: DurableCheckpointIO().load_checkpoint(path)])
def test_a_bit_that_flips_anywhere_in_a_checkpoint_is_found_or_changes_nothing(load, tmp_path):
    path, chance = tmp_path / "a.ckpt", random.Random(0)
    torch.save(CHECKPOINT, path)
    whole = path.read_bytes()
    weights = whole.index(CHECKPOINT["state_dict"]["a"].numpy().tobytes())
    places = [weights + 500, *chance.sample(range(len(whole)), 60)]
    refused = 0
    for byte in places:
        path.write_bytes(whole)
        os.utime(path, ns=(byte, byte))
        flip(path, byte, chance.randrange(8))
        try:
            loaded = load(path)
        except (UserError, RuntimeError):  # torch's own, where the file is no zip any more
            refused += 1
        else:
            assert same(loaded, CHECKPOINT), byte
    assert refused > 30
    path.write_bytes(whole)
    flip(path, weights + 500)
    assert torch.load(path)["state_dict"]["a"][125] != 125  # torch says nothing
    with pytest.raises(UserError, match=r"a.ckpt is damaged \(Bad CRC-32 for file 'a/data/0'\)$"):
        load(path)


def test_the_newest_good_checkpoint_is_named(tmp_path):
    for age, name in enumerate(["c", "b", "a"]):  # c is the oldest
        torch.save(CHECKPOINT, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (age, age))
    for name in ("a", "b"):
        flip(tmp_path / f"{name}.ckpt", 1000)
    with pytest.raises(UserError, match=r"a.ckpt is damaged .* good one beside it is .*c.ckpt: give it as --ckpt_path"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CHECKPOINT, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_undamaged(tmp_path / "a.ckpt")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_bit_that_flips_in_an_exported_weight_is_found(adapter, gpt2_folder, tmp_path):
    loaded = load_source(ModelSource(gpt2_folder, lora=LoRA(rank=2) if adapter else None))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "out", "adapter")
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    if shutil.which("sha256sum"):
        assert subprocess.run(check, cwd=tmp_path / "out").returncode == 0
    load_policy(str(tmp_path / "out"))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    flip(file, file.stat().st_size - 30, 6)
    with pytest.raises(UserError, match=rf"{file.name} is damaged.*remove .*SHA256SUMS"):
        load_policy(str(tmp_path / "out"))
    (tmp_path / "out" / "SHA256SUMS").unlink()
    load_policy(str(tmp_path / "out"))  # changed on purpose


def test_sums_of_another_kind_are_no_ones_business(tmp_path):
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\nhello  a.safetensors\n" + b"0" * 64 + b"  ../b.safetensors\n")
    (tmp_path / "a.safetensors").write_bytes(b"a")
    check_sums(tmp_path)
