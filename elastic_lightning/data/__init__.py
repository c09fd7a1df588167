"""LightningDataModules."""

from elastic_lightning.data.imdb import IMDBDataModule
from elastic_lightning.data.reviews import Reviews, ReviewsDataModule
from elastic_lightning.data.toy import ToyReviewsDataModule
from elastic_lightning.data.toy_metrics import ToyAcceptance, ToyNLL

__all__ = ["IMDBDataModule", "Reviews", "ReviewsDataModule", "ToyAcceptance", "ToyNLL", "ToyReviewsDataModule"]
