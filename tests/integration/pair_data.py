"""Pairs of random token rows, for a command line that names this class in its configuration."""

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from elastic_lightning.policies import PreferenceBatch


class RandomPairs(LightningDataModule):
    """Texts of 6 to 10 tokens below `vocabulary`, the first two their prompt; four pairs a batch."""

    def __init__(self, vocabulary: int = 20) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def batches(self, number, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(number):
            tokens = torch.randint(0, self.vocabulary, (2, 4, 10), generator=generator)
            lengths = torch.randint(6, 11, (2, 4), generator=generator)
            masks = torch.arange(10) < lengths[..., None]
            yield PreferenceBatch(tokens[0], masks[0], tokens[1], masks[1], torch.ones(4), *(lengths - 2))

    def train_dataloader(self):
        return DataLoader(list(self.batches(3, 0)), batch_size=None)

    def val_dataloader(self):
        return DataLoader(list(self.batches(2, 1)), batch_size=None)

    def test_dataloader(self):
        return DataLoader(list(self.batches(2, 2)), batch_size=None)
