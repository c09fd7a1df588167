"""Seeded iterated learning against a simulation in ten lines."""

import pytest
import torch
from lightning import LightningModule
from torch import nn

from elastic_lightning.callbacks import IteratedLearning
from elastic_lightning.errors import UserError

EVERY, STEPS, LR, STUDENT_LR = 3, 2, 0.1, 0.05


class Speaker(LightningModule):
    """A linear map as policy: what it says to a batch is its output; it is trained towards 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def training_step(self, batch, batch_idx):
        return (self.layer(batch) - 1).square().mean()

    def imitation_targets(self, batch):
        return self.layer(batch).detach()

    def imitation_losses(self, batch, targets):
        yield (self.layer(batch) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def simulate(batches):
    speaker = Speaker()
    earlier = [parameter.detach().clone() for parameter in speaker.parameters()]
    teacher = torch.optim.SGD(speaker.parameters(), lr=LR)
    for number, batch in enumerate(batches, start=1):
        teacher.zero_grad()
        speaker.training_step(batch, 0).backward()
        teacher.step()
        if number % EVERY == 0:
            seen = batches[number - STEPS : number]
            said = [speaker.imitation_targets(one) for one in seen]
            for parameter, old in zip(speaker.parameters(), earlier, strict=True):
                parameter.data.copy_(old)
            student = torch.optim.AdamW(speaker.parameters(), lr=STUDENT_LR, weight_decay=0.0)
            for one, target in zip(seen, said, strict=True):
                student.zero_grad()
                (speaker.layer(one) - target).square().mean().backward()
                student.step()
            earlier = [parameter.detach().clone() for parameter in speaker.parameters()]
    return speaker


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_schedule_is_the_simulation(lab, tmp_path, count):
    module, batches = Speaker(), lab.batches(count)
    callback = IteratedLearning(every=EVERY, steps=STEPS, learning_rate=STUDENT_LR)
    lab.fit(module, tmp_path, [callback], batches)
    assert callback.resets == count // EVERY
    for ours, theirs in zip(module.parameters(), simulate(batches).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_resumed_run_is_the_run(lab, tmp_path):
    batches = lab.batches(4)
    whole = Speaker()
    lab.fit(whole, tmp_path, [IteratedLearning(EVERY, STEPS, STUDENT_LR)], batches, max_epochs=2)
    half, resumed = Speaker(), Speaker()
    lab.fit(half, tmp_path, [IteratedLearning(EVERY, STEPS, STUDENT_LR)], batches).save_checkpoint(
        tmp_path / "half.ckpt"
    )
    trainer = lab.trainer(tmp_path, [IteratedLearning(EVERY, STEPS, STUDENT_LR)], max_epochs=2)
    trainer.fit(resumed, lab.loader(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_policy_imitates(lab, tmp_path):
    module, callback = lab.ppo(), IteratedLearning(every=2, steps=2)
    lab.fit(module, tmp_path, [callback])
    assert callback.resets == 2
    for name, weight in callback.earlier.items():
        assert torch.equal(weight, callback.online[name])


def test_wrong_options(lab, tmp_path):
    with pytest.raises(UserError, match="between 1 and every"):
        IteratedLearning(every=3, steps=4)
    with pytest.raises(UserError, match="learning_rate"):
        IteratedLearning(every=3, steps=1, learning_rate=0.0)
    with pytest.raises(UserError, match="Plain does not"):
        lab.fit(lab.plain(), tmp_path, [IteratedLearning(every=3, steps=1)])


def test_two_fits_are_one_and_another_module_begins(lab, tmp_path):
    batches, callback = lab.batches(4), IteratedLearning(EVERY, STEPS, STUDENT_LR)
    module, other = Speaker(), Speaker()
    for _ in range(2):
        lab.fit(module, tmp_path, [callback], batches)
    assert callback.resets == 2
    for ours, theirs in zip(module.parameters(), simulate(batches * 2).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    lab.fit(other, tmp_path, [callback], batches)
    for ours, theirs in zip(other.parameters(), simulate(batches).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
