"""Proximal policy optimization for language models: one batch, from prompts to the log."""

from __future__ import annotations

from elastic_lightning.algorithms.base import PolicyModule
from elastic_lightning.algorithms.ppo.experience import make_experience, shape_scores
from elastic_lightning.algorithms.ppo.rollout import ScoredRollout, of_all_ranks, repeated
from elastic_lightning.algorithms.ppo.update import PolicyObjective, TrainingBatch, update
from elastic_lightning.policies import Prompts
from elastic_lightning.ranks import alike


class PPO(PolicyModule):
    """PPO with a KL penalty against the reference, one optimizer, and the PPO batch as its clock (`ppo_step`).

    A training batch is `Prompts`; every batch is one rollout and `epochs` x `mini_batches` optimizer steps. REINFORCE
    with a learned baseline is this with one epoch and one mini-batch; RLOO and GRPO are this without a value function
    (`ppo.advantage`). Dropout is off for the policy throughout. Options are those of `PolicyModule`.
    """

    def training_step(self, batch: Prompts, batch_idx: int) -> None:
        with self.ppo_batch():  # one that teaches nothing is skipped; the clock and the schedule go on
            # 1. Each prompt `samples_per_prompt` times, side by side. The rows of all ranks make one PPO batch.
            prompts = repeated(batch, self.config.samples_per_prompt)
            first_row = self.check_prompts(prompts)

            # 2. One pass: log-probabilities and values are kept while sampling.
            with self.timed("rollout"):
                decoded = self.rollout(prompts, first_row)

            with self.timed("scoring"):
                # 3. One score a response, from its text.
                _, scores = alike(lambda: self.score(prompts, decoded.responses))
                # 4. How likely the reference finds what was sampled. What leaves frozen layers is the same for policy,
                #    reference and all epochs.
                frozen = self.frozen_hidden(prompts, decoded.responses)
                rollout, deviation = self.recompute(prompts, decoded, frozen)
                reference_logprobs = self.reference_logprobs(prompts, rollout.responses, frozen)
                scored = of_all_ranks(ScoredRollout(prompts, rollout, scores, reference_logprobs, frozen, deviation))

            # 5. The KL penalty at every token, the score at the last one; then the advantage estimator.
            total = shape_scores(scored.scores.total, scored.rollout, self.config, self.drawn_tokens.eos_token_id)
            coefficient = self.kl_controller.coefficient
            experience = make_experience(scored.rollout, total, scored.reference_logprobs, coefficient, self.config)

            # 6. Epochs of mini-batches: loss, backward, clip, step.
            with self.timed("update"):
                training_batch = TrainingBatch(scored.prompts, scored.rollout, experience, scored.frozen_hidden)
                objective = PolicyObjective(self.actor, self.config, self.sampling.temperature)
                losses = update(self, training_batch, objective)

            # 7. Everything at this ppo_step; then the KL controller moves.
            self.log_ppo_batch(scored, experience, losses)
