"""TRL's PPOTrainer, one batch at a turn. Runs in the peer's environment, so nothing of ours is imported but shapes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from lockstep import Turns
from measure import peak_mib, synchronise
from shapes import Shape, prepare, prompts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class InTurn(TrainerCallback):
    """Waits before each batch and reports after it."""

    def __init__(self, turns: Turns, idle_mib: float) -> None:
        self.turns = turns
        self.optimizer_steps = 0
        self.idle_mib = idle_mib

    def count(self, *args) -> None:
        self.optimizer_steps += 1

    def begin(self) -> None:
        self.turns.wait()
        self.optimizer_steps = 0
        synchronise()
        self.began = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.turns.report(ready=True)
        self.begin()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronise()
        seconds = time.perf_counter() - self.began
        self.turns.report(
            seconds=seconds, optimizer_steps=self.optimizer_steps, peak_mib=peak_mib(), idle_mib=self.idle_mib
        )
        self.begin()


def main() -> None:
    options, idle_mib = json.loads(sys.argv[1]), peak_mib()
    shape = Shape(**options["shape"])
    bf16 = options.get("precision") == "bf16-mixed"
    if bf16:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # the trainer's own Accelerator does not read its arguments
    set_seed(1)
    folder = prepare(shape)
    how = {"attn_implementation": options.get("attention")}
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", **how) for _ in range(2))
    # The peer's value function is a model of its own, of the policy's size.
    value = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1, **how)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    data = Dataset.from_dict({"input_ids": prompts(shape, options["batches"]).tolist()})
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=shape.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=shape.mini_batches,
        num_ppo_epochs=shape.epochs,
        response_length=shape.response,
        local_rollout_forward_batch_size=shape.batch,
        temperature=1.0,
        learning_rate=3e-6,
        total_episodes=options["batches"] * shape.batch,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    turns = InTurn(Turns(), idle_mib)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[turns],
    )
    assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    trainer.optimizer.optimizer.register_step_post_hook(turns.count)
    trainer.train()


if __name__ == "__main__":
    main()
