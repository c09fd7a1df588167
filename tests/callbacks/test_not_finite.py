"""Weights that are not finite take the place of no others: not at a reset, in a checkpoint or in an exported folder."""

import pytest
import torch
from lightning import Callback
from transformers import AutoModelForCausalLM

from elastic_lightning.callbacks import BatchCheckpoint, ElasticReset, SavePretrained
from elastic_lightning.errors import UserError
from elastic_lightning.functional import first_not_finite


class Spoil(Callback):
    """Puts a NaN into what `weights` names, after so many batches."""

    def __init__(self, after, weights):
        self.after, self.weights, self.batches = after, weights, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if self.batches == self.after:
            with torch.no_grad():
                next(iter(self.weights(pl_module).values())).view(-1)[0] = float("nan")


def trained(module):
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_a_spoilt_average_is_not_copied_to_the_policy(lab, tmp_path):
    module, elastic = lab.ppo(), ElasticReset(every=3, decay=0.9)
    spoil = Spoil(2, lambda _: elastic.ema)
    with pytest.raises(UserError, match=r"ElasticReset: the average of .* is not finite after batch 3") as caught:
        lab.trainer(tmp_path, [spoil, elastic]).fit(module, lab.loader(lab.prompts(4)))
    assert "\n" not in str(caught.value)
    assert first_not_finite(trained(module)) is None and elastic.resets == 0


def test_spoilt_weights_push_out_no_checkpoint(lab, tmp_path):
    keeps = BatchCheckpoint(every=1, keep=1)
    trainer = lab.trainer(tmp_path, [Spoil(3, trained), keeps], enable_checkpointing=True, max_epochs=2)
    with pytest.raises(UserError, match="are not finite, and are not saved; what was saved before stays"):
        trainer.fit(lab.plain(), lab.loader(lab.batches(3)))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["batch_000002.ckpt"]


def test_spoilt_weights_replace_no_model(lab, tmp_path):
    (tmp_path / "final").mkdir()
    lab.ppo().save_pretrained(tmp_path / "final")
    trainer = lab.trainer(tmp_path, [Spoil(2, trained), SavePretrained()])
    with pytest.raises(UserError, match="are not finite"):
        trainer.fit(lab.ppo(), lab.loader(lab.prompts(2)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert first_not_finite(dict(model.named_parameters())) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_that_is_not_finite_is_named(bad):
    weights = {
        "a": torch.zeros(3),
        "b": torch.ones(2, 2, dtype=torch.bfloat16),
        "c": torch.zeros(0),
        "d": torch.ones(1),
    }
    assert first_not_finite(weights) is None and first_not_finite({}) is None
    weights["b"][1, 0] = bad
    weights["d"][0] = bad
    assert first_not_finite(weights) == "b"
