"""LightningDataModules."""

from elastic_lightning.data.game import GameDataModule
from elastic_lightning.data.imdb import IMDBDataModule
from elastic_lightning.data.pairs import PairsDataModule
from elastic_lightning.data.parallel import ParallelText
from elastic_lightning.data.reviews import Reviews, ReviewsDataModule
from elastic_lightning.data.sentences import SentencesDataModule
from elastic_lightning.data.stack_exchange import StackExchangeDataModule
from elastic_lightning.data.toy import ToyReviewsDataModule
from elastic_lightning.data.toy_metrics import ToyAcceptance, ToyNLL
from elastic_lightning.data.toy_translation import ToyTranslationDataModule, ToyTranslationGameDataModule
from elastic_lightning.data.toy_translation_metrics import ToyEnglishAcceptance, ToyExactMeaning, ToyMeaning
from elastic_lightning.data.translation import Corpora, TranslationDataModule, TranslationGameDataModule

__all__ = [
    "Corpora",
    "GameDataModule",
    "IMDBDataModule",
    "PairsDataModule",
    "ParallelText",
    "Reviews",
    "ReviewsDataModule",
    "SentencesDataModule",
    "StackExchangeDataModule",
    "ToyAcceptance",
    "ToyEnglishAcceptance",
    "ToyExactMeaning",
    "ToyMeaning",
    "ToyNLL",
    "ToyReviewsDataModule",
    "ToyTranslationDataModule",
    "ToyTranslationGameDataModule",
    "TranslationDataModule",
    "TranslationGameDataModule",
]
