"""The oracle of the weight callbacks: training written out, with no Lightning in it."""

import torch

DECAY = 0.9


def loop(module, batches, every, update_on="optimizer_step", reset="elastic", steps=1, accumulate=1, rate=0.1):
    """The whole of training, written out. Returns (online, ema, initial) after the last batch."""
    parameters = [*module.net.parameters()]
    optimizer = module.optimizer(parameters, lr=rate)
    initial = [p.detach().clone() for p in parameters]
    ema = [p.detach().clone() for p in parameters]

    def move():
        for average, parameter in zip(ema, parameters, strict=True):
            average.copy_(DECAY * average + (1 - DECAY) * parameter.detach())

    for number, batch in enumerate(batches, start=1):
        for _ in range(steps):
            (module.loss(batch) / accumulate).backward()
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if update_on == "optimizer_step":
                    move()
        if update_on == "batch":
            move()
        if every and number % every == 0:
            for parameter, average, first in zip(parameters, ema, initial, strict=True):
                parameter.data.copy_(first if reset == "initial" else average)
                if reset == "elastic":
                    average.copy_(first)
            optimizer.zero_grad()  # of an accumulation window that is not over
    return [p.detach().clone() for p in parameters], ema, initial


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=0)
