"""A tiny policy to train."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from elastic_lightning.algorithms import PPO, PPOConfig
from elastic_lightning.policies import ModelSource, Prompts, Sampling
from elastic_lightning.rewards import FunctionReward


def share_of_w3(prompts, responses):
    return [words.count("w3") / max(len(words), 1) for words in map(str.split, responses)]


@pytest.fixture
def tiny_ppo(gpt2_folder, tmp_path):
    """A module with these options, and what fits it on batches of six prompts of four tokens."""

    def make(batches=2, **options):
        config = PPOConfig(**{"epochs": 2, "mini_batches": 2, "kl_penalty": "none", "learning_rate": 1e-3} | options)
        source = ModelSource(gpt2_folder)
        module = PPO(source, FunctionReward(share_of_w3), config, Sampling(max_new_tokens=6), seed=0)

        def fit(module, callbacks=()):
            generator = torch.Generator().manual_seed(0)
            tokens = [torch.randint(3, 30, (6, 4), generator=generator) for _ in range(batches)]
            data = [Prompts(each, torch.ones_like(each, dtype=torch.bool)) for each in tokens]
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            quiet |= {"enable_model_summary": False, "default_root_dir": tmp_path, "max_epochs": 1}
            trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet)
            trainer.fit(module, DataLoader(data, batch_size=None))
            return trainer

        return module, fit

    return make
