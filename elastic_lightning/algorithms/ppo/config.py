"""The options of PPO, with the field's defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from elastic_lightning.algorithms.hyperparameters import check_adam
from elastic_lightning.algorithms.ppo.advantages import ESTIMATORS, WITH_CRITIC
from elastic_lightning.algorithms.schedules import Schedule
from elastic_lightning.checks import check_counts
from elastic_lightning.errors import UserError
from elastic_lightning.functional import AdaptiveKL, FixedKL

KLPenalty = Literal["fixed", "adaptive", "none"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class PPOConfig:
    """Options of proximal policy optimization for language models.

    Defaults follow the published code of summarize-from-feedback and TRL's PPO unless stated.

    Attributes:
        epochs: passes over a PPO batch. REINFORCE with a learned baseline is one epoch of one mini-batch.
        mini_batches: optimizer steps an epoch.
        micro_batch_size: rows a forward; a mini-batch's gradient does not depend on it. All rows by default.
        clip: the policy ratio is clipped to 1 +- clip.
        value_clip: values are clipped to within this of their rollout values; null turns it off.
        value_coefficient: weight of the value loss.
        entropy_coefficient: weight of the entropy bonus.
        advantage: how advantages are estimated, see `algorithms.ppo.advantages`: gae and reinforce learn a value
            function; rloo, grpo and dr_grpo compare the responses to one prompt and build none.
        samples_per_prompt: responses to each prompt. A PPO batch is the data's batch times this. The three estimators
            without a value function need two or more.
        gamma: discount.
        lam: lambda of generalised advantage estimation.
        kl_penalty: of the reward against the reference: fixed, adaptive (Ziegler et al. 2019) or none.
        kl_coefficient: weight of the penalty per nat; its starting value when adaptive.
        kl_estimator: of the penalty per token, see `elastic_lightning.functional.kl`.
        kl_target: nats per sequence the adaptive controller aims at.
        kl_horizon: episodes over which the adaptive controller moves.
        whiten_rewards: scale per-token rewards to unit variance.
        whiten_advantages: shift and scale advantages to mean 0 and variance 1 over the whole batch and all ranks; by
            default where a value function is learned.
        reward_clip: scores are clipped to +- this.
        reward_baseline: subtracted from every score, e.g. the initial policy's mean.
        missing_eos_penalty: subtracted from the score of a response that did not end by itself.
        target_kl: stop the update when a mini-batch's policy has moved this far (times 1.5) from the rollout's, in nats
            per token; null never stops.
        max_grad_norm: gradient clipping by global norm; null turns it off. Our choice: the published code has none.
        learning_rate: of the policy.
        value_learning_rate: of the value head (and its trunk); the policy's by default.
        weight_decay: of AdamW.
        adam_betas: of AdamW.
        adam_eps: of AdamW.
        schedule: of the learning rate over PPO batches, after the warm-up; linear and cosine reach 0 where the run
            ends, by trainer.max_epochs or by trainer.max_steps (optimizer steps), and need one of them.
        warmup: PPO batches of linear warm-up.
        max_skipped: PPO batches of a run that may be skipped because a reward, a loss or the gradient is NaN or
            infinite; one more stops the run, and with 0 the first does.
    """

    epochs: int = 4
    mini_batches: int = 4
    micro_batch_size: int | None = None
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    advantage: str = "gae"
    samples_per_prompt: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    kl_penalty: KLPenalty = "fixed"
    kl_coefficient: float = 0.05
    kl_estimator: KLEstimator = "k1"
    kl_target: float = 6.0
    kl_horizon: int = 10_000
    whiten_rewards: bool = False
    whiten_advantages: bool | None = None
    reward_clip: float | None = None
    reward_baseline: float = 0.0
    missing_eos_penalty: float = 0.0
    target_kl: float | None = None
    max_grad_norm: float | None = 1.0
    learning_rate: float = 1e-5
    value_learning_rate: float | None = None
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    schedule: Schedule = "constant"
    warmup: int = 0
    max_skipped: int = 5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise UserError(f"ppo.{name} must be a number, got {value}")
        check_counts(
            "ppo.", vars(self), "epochs", "mini_batches", "micro_batch_size", "samples_per_prompt", "kl_horizon"
        )
        check_counts("ppo.", vars(self), "warmup", "max_skipped", least=0)
        for name in ("value_clip", "reward_clip", "target_kl", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"ppo.{name} must be above 0 (or null), got {value}")
        for name in ("clip", "kl_target"):
            if not getattr(self, name) > 0:
                raise UserError(f"ppo.{name} must be above 0, got {getattr(self, name)}")
        check_adam("ppo", self.learning_rate, self.adam_betas, self.weight_decay, self.adam_eps)
        if self.value_learning_rate is not None and not 0 < self.value_learning_rate < math.inf:
            raise UserError(f"ppo.value_learning_rate must be above 0 (or null), got {self.value_learning_rate}")
        choices = {"kl_penalty": KLPenalty, "kl_estimator": KLEstimator, "schedule": Schedule}
        for name, choice in choices.items():  # the command line knows them; python does not
            if getattr(self, name) not in get_args(choice):
                raise UserError(f"ppo.{name} must be one of {get_args(choice)}, got {getattr(self, name)!r}")
        if self.advantage not in ESTIMATORS:
            raise UserError(f"ppo.advantage must be one of {(*ESTIMATORS,)}, got {self.advantage!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"ppo.{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("kl_coefficient", "value_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"ppo.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("entropy_coefficient", "missing_eos_penalty", "reward_baseline"):  # what is below 0 has a meaning
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"ppo.{name} must be finite, got {getattr(self, name)}")

        if not self.has_critic and self.samples_per_prompt < 2:
            raise UserError(
                f"ppo.advantage: {self.advantage} compares responses to one prompt: set ppo.samples_per_prompt above 1"
            )

    @property
    def whitens_advantages(self) -> bool:
        """`whiten_advantages`, or its default."""
        return self.has_critic if self.whiten_advantages is None else self.whiten_advantages

    @property
    def has_critic(self) -> bool:
        """Whether the advantage estimator learns a value function."""
        return self.advantage in WITH_CRITIC

    def stops_update(self, approx_kl: float) -> bool:
        """Whether a mini-batch's policy has moved too far from the rollout's, in nats per token."""
        return self.target_kl is not None and approx_kl > 1.5 * self.target_kl

    def kl_controller(self) -> FixedKL | AdaptiveKL:
        """The controller that `kl_penalty` names."""
        if self.kl_penalty == "adaptive":
            return AdaptiveKL(self.kl_coefficient, self.kl_target, self.kl_horizon)
        return FixedKL(self.kl_coefficient if self.kl_penalty == "fixed" else 0.0)
