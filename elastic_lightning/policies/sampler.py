"""A policy's sampler: what is drawn is a function of (seed, step, global row, position) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from elastic_lightning.errors import UserError
from elastic_lightning.policies.actor_critic import ActorCritic
from elastic_lightning.policies.batches import Prompts
from elastic_lightning.policies.graph_sampling import GraphSampler
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.sampling import Rollout, Sampling, counter_uniforms, draw_lengths, sample
from elastic_lightning.policies.special_tokens import DrawnTokens


class Sampler:
    """Draws one response a prompt; on CUDA with captured graphs where the architecture allows it.

    Args:
        actor: the policy, whose value head is read.
        sampling: how responses are drawn.
        drawn: what ends a response, what pads it, and what is never drawn.
        seed: of the draws.
        cuda_graphs: whether to capture.

    Attributes:
        going_on: see `sample`: the ranks of a sharded policy stop together.
    """

    def __init__(
        self,
        actor: ActorCritic,
        sampling: Sampling,
        drawn: DrawnTokens,
        seed: int,
        cuda_graphs: bool = True,
    ) -> None:
        self.actor, self.sampling, self.seed, self.cuda_graphs = actor, sampling, seed, cuda_graphs
        self.drawn = drawn
        self.going_on: Callable[[Tensor], bool] = torch.any
        self._graphs: dict[int, GraphSampler | None] = {}

    def __call__(self, prompts: Prompts, step: int, first_row: int = 0, lm: PolicyLM | None = None) -> Rollout:
        """One response a prompt, whose global rows begin with `first_row`.

        Args:
            prompts: B of them.
            step: of the draws: another step draws other numbers.
            first_row: global row of the first prompt.
            lm: what decodes; the policy's own model by default.
        """
        lm, sampling, device = self.actor.lm if lm is None else lm, self.sampling, prompts.tokens.device
        rows = torch.arange(len(prompts.tokens), device=device) + first_row
        uniforms = counter_uniforms(self.seed, step, rows, sampling.max_new_tokens)
        lengths = draw_lengths(self.seed, step, rows, sampling)
        alone = self.going_on is torch.any
        captured = self.captured(lm, prompts.tokens.shape[1], device) if alone else None
        if captured is not None:
            return captured(prompts, uniforms, lengths)
        with weights_cast_once(device.type) if alone else nullcontext():
            how = {"lm": lm, "lengths": lengths, "going_on": self.going_on, **self.drawn._asdict()}
            return sample(self.actor, prompts, sampling, uniforms, **how)

    def captured(self, lm: PolicyLM, prompt_tokens: int, device: torch.device) -> GraphSampler | None:
        """What decodes by captured steps, where that is asked for and this model can."""
        columns = GraphSampler.capacity(prompt_tokens, self.sampling)
        if not self.cuda_graphs or device.type != "cuda" or not lm.takes_static_masks(columns):
            return None
        if id(lm) not in self._graphs:
            try:
                self._graphs[id(lm)] = GraphSampler(self.actor, self.sampling, lm=lm, **self.drawn._asdict())
            except UserError as reason:
                rank_zero_info(str(reason))
                self._graphs[id(lm)] = None
        return self._graphs[id(lm)]

    def clear(self) -> None:
        """Forget captured graphs: they hold the addresses of weights, which may move from here on."""
        self._graphs.clear()


@contextmanager
def weights_cast_once(device_type: str) -> Iterator[None]:
    """Within this context autocast, where it is on, casts each trained weight once: for code that changes none.

    Lightning turns that cache off, as a weight may change between two forward passes. The arithmetic is the same.
    """
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=True):
            yield
    finally:
        torch.clear_autocast_cache()  # only the outermost context would do so
