"""Checkpoint files that are whole or not there."""

import errno

import pytest
import torch

from elastic_lightning.callbacks.durable import DurableCheckpointIO


@pytest.mark.parametrize("numbers", [1, 10**6])  # fails when the file is flushed, and while torch writes
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, numbers):
    (tmp_path / "a.ckpt.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        DurableCheckpointIO().save_checkpoint({"weights": torch.zeros(numbers)}, tmp_path / "a.ckpt")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_file_before_stays_when_the_next_cannot_be_made(tmp_path):
    path = tmp_path / "a.ckpt"
    DurableCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, TypeError)):  # cannot be pickled
        DurableCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
