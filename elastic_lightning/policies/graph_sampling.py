"""Sampling with static shapes on CUDA: one captured graph a token in place of a few hundred kernel launches.

A small model decodes a token in less time than Python needs to launch its kernels. A CUDA graph launches them all at
once, but what it captured is fixed: shapes, addresses and numbers. So everything that changes from token to token lies
in buffers that the captured step itself reads and moves on. Weights are read where they are: an optimizer step or a
reset in place is seen by the next replay, and weights that have moved are captured anew.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from elastic_lightning.errors import UserError
from elastic_lightning.policies.actor_critic import ActorCritic
from elastic_lightning.policies.batches import Prompts
from elastic_lightning.policies.capture import autocast_dtype, captured, fit_for_capture
from elastic_lightning.policies.causal import CausalLM
from elastic_lightning.policies.sampling import Rollout, Sampling, choose, finish
from elastic_lightning.policies.special_tokens import Ends, end_ids
from elastic_lightning.policies.static_steps import BUCKET, read_prompts, static_cache, static_steps_agree


class GraphSampler:
    """`sample` for one policy and one set of options, with a captured step for each shape it meets.

    Without CUDA the same static step runs uncaptured, which is how its results are tested on any machine.

    Args:
        policy: whose value head is read.
        sampling: how responses are drawn.
        eos_token_id: ends a response, or several that do; None has no end.
        pad_token_id: stands after the end.
        lm: what decodes; the policy's own model by default. What it is must not change from call to call (an adapter
            switched off): a graph is what was captured.
        textless: ids [N] that are never drawn.

    Raises:
        UserError: a static step of this model is not the step that it takes otherwise, see `static_steps_agree`.
    """

    def __init__(
        self,
        policy: ActorCritic,
        sampling: Sampling,
        eos_token_id: Ends,
        pad_token_id: int,
        lm: CausalLM | None = None,
        textless: Tensor | None = None,
    ) -> None:
        self.policy, self.sampling = policy, sampling
        self.ends, self.pad_token_id, self.textless = end_ids(eos_token_id), pad_token_id, textless
        self.lm = policy.lm if lm is None else lm
        if not static_steps_agree(self.lm):
            raise UserError(
                f"{self.lm.config.model_type} needs more than a mask over a cache of fixed size (ALiBi, as a rule): it "
                "decodes without CUDA graphs"
            )
        self._shapes: dict[tuple, _StaticDecode] = {}

    @staticmethod
    def capacity(prompt_tokens: int, sampling: Sampling) -> int:
        """Columns of the cache for prompts of this length."""
        return -(-(prompt_tokens + sampling.max_new_tokens) // BUCKET) * BUCKET

    def __call__(self, prompts: Prompts, uniforms: Tensor, lengths: Tensor | None = None) -> Rollout:
        """Draw one response a prompt by `uniforms` [B, max_new_tokens] and `lengths` [B], as `sample` does."""
        if lengths is None:
            lengths = torch.full_like(prompts.tokens[:, 0], self.sampling.max_new_tokens)
        with fit_for_capture(prompts.tokens.device):
            return self._sample(prompts, uniforms, lengths)

    def _sample(self, prompts: Prompts, uniforms: Tensor, lengths: Tensor) -> Rollout:
        rows, length = prompts.tokens.shape
        device, capacity = prompts.tokens.device, self.capacity(length, self.sampling)
        key = rows, capacity, autocast_dtype(device), self._addresses()
        if key not in self._shapes:
            self._shapes.clear()  # one at a time: each holds a cache of keys and values
            self._shapes[key] = _StaticDecode(self, rows, capacity, device)
        decode = self._shapes[key]
        decode.start(prompts, uniforms, lengths)
        drawn = decode.run(int(lengths.max()))
        columns = [column[:, :drawn].clone() for column in decode.outputs]
        return finish(self.policy, prompts, *columns, *([None] if self.policy.value_head is None else []))

    def _addresses(self) -> tuple[int, ...]:
        """Where a captured step finds the weights: it would go on reading there when they have been moved away."""
        modules = (self.lm, self.policy.value_head)
        read = (
            tensor for module in modules if module is not None for tensor in (*module.parameters(), *module.buffers())
        )
        return tuple(tensor.data_ptr() for tensor in read)


class _StaticDecode:
    """The buffers of one shape, the step over them, and its graph once it is captured."""

    def __init__(self, sampler: GraphSampler, rows: int, capacity: int, device: torch.device) -> None:
        self.sampler = sampler
        steps = sampler.sampling.max_new_tokens

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.uniforms = buffer(rows, steps, dtype=torch.float32)
        self.lengths = buffer(rows)
        self.hidden = None  # [B, H], of the state that predicts the next token; its width and type are the model's
        self.tokens = buffer(rows)  # drawn last; 0 where the row has ended
        self.alive = buffer(rows, dtype=torch.bool)
        self.position = buffer(1)  # of the token to be drawn, in the response
        self.column = buffer(1)  # where in the cache that token goes
        self.position_ids = buffer(rows, 1)  # of that token
        self.mask = buffer(rows, 1, 1, capacity, dtype=torch.bool)
        # tokens, mask, logprobs, and values where there is a critic
        types = [torch.int64, torch.bool, torch.float32, torch.float32]
        types = types[:3] if sampler.policy.value_head is None else types
        self.outputs = tuple(buffer(rows, steps, dtype=dtype) for dtype in types)
        self.cache = static_cache(sampler.lm, capacity, self.column)
        self.textless = None if sampler.textless is None else sampler.textless.to(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, prompts: Prompts, uniforms: Tensor, lengths: Tensor) -> None:
        """Read the prompts and put every buffer at the first token."""
        lm = self.sampler.lm
        hidden = read_prompts(lm, prompts, self.cache)
        if self.hidden is None:
            self.hidden = hidden.clone()
            if hidden.device.type == "cuda" and self.sampler.sampling.max_new_tokens > 1:
                with torch.cuda.device(hidden.device):
                    self.graph = captured(self._step, lambda: self._place(prompts, uniforms, lengths))
                if self.graph is None:
                    name = lm.config.model_type
                    warnings.warn(f"{name} waits for the GPU within a step: decoding without CUDA graphs", stacklevel=2)
                hidden = read_prompts(lm, prompts, self.cache)  # the trial runs have written into the cache
        self.hidden.copy_(hidden)
        self._place(prompts, uniforms, lengths)

    def run(self, longest: int) -> int:
        """Draw until every row has ended, the last one after `longest` tokens; returns the number of tokens drawn."""
        sampling, ends = self.sampler.sampling, self.sampler.ends
        self._draw()
        for drawn in range(1, longest):
            # Asking a GPU means waiting for it: only where every response can have ended.
            if ends and drawn >= sampling.first_end and not self.alive.any():
                return drawn
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step()
        return longest

    def _step(self) -> None:
        """Read the token drawn last and draw the next. Nothing here may depend on a number that Python knows."""
        self.mask.index_fill_(3, self.column, True)
        self.hidden.copy_(self.sampler.lm.read_token(self.tokens, self.mask, self.position_ids, self.cache))
        self.column += 1
        self.position_ids += 1
        self._draw()

    def _draw(self) -> None:
        """Draw the token at `position` of each row from `hidden` and write it down."""
        sampler = self.sampler
        uniforms = self.uniforms.index_select(1, self.position).squeeze(1)
        choice = choose(
            sampler.policy,
            sampler.lm,
            self.hidden,
            sampler.sampling,
            uniforms,
            self.position,
            sampler.ends,
            self.textless,
        )
        written = (
            torch.where(self.alive, choice.tokens, sampler.pad_token_id),
            self.alive,
            choice.logprobs,
            choice.values,
        )
        for output, column in zip(self.outputs, written, strict=False):  # no values without a critic
            output.index_copy_(1, self.position, column[:, None].to(output.dtype))
        for end in sampler.ends:
            self.alive &= choice.tokens != end
        self.position += 1
        self.alive &= self.position < self.lengths
        self.tokens.copy_(torch.where(self.alive, choice.tokens, 0))

    def _place(self, prompts: Prompts, uniforms: Tensor, lengths: Tensor) -> None:
        length = prompts.tokens.shape[1]
        self.uniforms.copy_(uniforms)
        self.lengths.copy_(lengths)
        self.alive.fill_(True)
        self.position.zero_()
        self.column.fill_(length)
        self.position_ids.copy_(prompts.mask.sum(dim=1, keepdim=True))
        self.mask.zero_()
        self.mask[:, 0, 0, :length] = prompts.mask
