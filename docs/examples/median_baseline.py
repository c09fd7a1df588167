"""An advantage estimator of one's own: the response's total minus the median of the responses to its prompt.

python docs/examples/median_baseline.py
"""

import torch
from torch import Tensor

from elastic_lightning.algorithms import PPOConfig
from elastic_lightning.algorithms.ppo.advantages import ESTIMATORS


def median_baseline(
    rewards: Tensor, values: Tensor | None, mask: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor | None]:
    """Advantages [B, T] from rewards [B, T]; no returns, for no value function is learned.

    Rows of one prompt stand side by side. A response without a valid token was left out, and is no part of the median.
    """
    totals = rewards.masked_fill(~mask, 0).sum(dim=1)
    totals = totals.masked_fill(~mask.any(dim=1), torch.nan).view(-1, config.samples_per_prompt)
    advantages = (totals - totals.nanmedian(dim=1, keepdim=True).values).flatten().nan_to_num(0.0)
    return torch.where(mask, advantages[:, None], 0.0), None


ESTIMATORS["median"] = median_baseline  # from here on `ppo.advantage: median` is an option

if __name__ == "__main__":
    rewards = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 6.0]])
    config = PPOConfig(advantage="median", samples_per_prompt=3)
    print(ESTIMATORS[config.advantage](rewards, None, torch.ones(3, 2, dtype=torch.bool), config)[0].tolist())
