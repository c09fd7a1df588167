"""Several weight callbacks on one module, each over a part of its weights: sender and receiver of a game."""

import pytest
import torch
from plain_loop import DECAY

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import ReferenceReset
from elastic_lightning.errors import UserError

LOWER, UPPER = ["*.wte.*", "*.wpe.*"], ["*.h.*", "*.ln_f.*"]


def two():
    return [
        ElasticReset(every=2, decay=DECAY, parameters=LOWER),
        ElasticReset(every=3, decay=DECAY, parameters=UPPER),
    ]


def test_each_moves_its_part_at_its_time(lab, tmp_path):
    lower, upper = two()
    module = lab.ppo()
    start = {name: parameter.detach().clone() for name, parameter in module.shadowed_parameters().items()}
    lab.fit(module, tmp_path, [lower, upper], lab.prompts(3))
    assert set(lower.online) | set(upper.online) == set(start) and not set(lower.online) & set(upper.online)
    assert (lower.resets, upper.resets) == (1, 1)
    for name, average in upper.ema.items():  # reset at the end of the last batch
        assert torch.equal(average, start[name])
    assert any(not torch.equal(average, start[name]) for name, average in lower.ema.items())


def test_a_checkpoint_holds_both(lab, tmp_path):
    batches = lab.prompts(2)
    whole, one = lab.ppo(), two()
    lab.fit(whole, tmp_path, one, batches, max_epochs=2)
    lab.fit(lab.ppo(), tmp_path, two(), batches, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = lab.ppo(), two()
    trainer = lab.trainer(tmp_path, again, max_epochs=2)
    trainer.fit(resumed, lab.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(resumed.named_parameters())[name], parameter)
    for ours, theirs in zip(again, one, strict=True):
        assert all(torch.equal(ours.ema[name], average) for name, average in theirs.ema.items())


def test_theta_0_of_what_no_reference_holds_is_kept(lab, tmp_path):
    module = lab.ppo()
    held = {name: weight for name, weight in module.reference_weights().items() if ".h." not in name}
    module.reference_weights = lambda: held
    callback = ElasticReset(every=4, decay=DECAY)
    start = {name: parameter.detach().clone() for name, parameter in module.shadowed_parameters().items()}
    lab.fit(module, tmp_path, [callback], lab.prompts(2))
    assert all(torch.equal(callback.initial[name], weight) for name, weight in start.items())
    assert all(callback.initial[name].data_ptr() == weight.data_ptr() for name, weight in held.items())
    assert set(callback.state_dict()["initial"]) == set(start) - set(held)
    with pytest.raises(UserError, match=r"none to move for .*\.h\."):
        lab.fit(module, tmp_path, [ReferenceReset(every=1)], lab.prompts(1))


def test_their_telemetry_is_apart(lab, tmp_path, logger, read_events):
    lab.fit(lab.ppo(), tmp_path, two(), lab.prompts(3), logger=logger)
    events = read_events(logger.log_dir)
    assert events["reset[*.wte.*,*.wpe.*]/count"] == [(2, 1.0)]
    assert events["reset[*.h.*,*.ln_f.*]/count"] == [(3, 1.0)]
