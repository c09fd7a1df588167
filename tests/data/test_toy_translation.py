"""The toy translators' data modules: the same batches as from files, over generated sentences."""

import pytest

from elastic_lightning.data import ToyTranslationDataModule, ToyTranslationGameDataModule
from elastic_lightning.data.tokenizers import main as tokenizer_main
from elastic_lightning.data.toy_languages import english, german
from elastic_lightning.data.toy_reading import parse_english, parse_french, without_gender
from elastic_lightning.policies import GameEvaluationBatch, PairedTexts, TranslationBatch, load_tokenizer

SMALL = {"train_pairs": 300, "eval_pairs": 50, "batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("toy_words"))
    assert tokenizer_main(["--data=ToyTranslationGameDataModule", f"--output={folder}"]) == 0
    return folder


def texts_of(tokenizer, side):
    rows = [row[keep] for row, keep in zip(*side, strict=True)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def pairs(tokenizer, batches):
    return [pair for batch in batches for pair in zip(*(texts_of(tokenizer, side) for side in batch), strict=True)]


def test_one_direction(folder):
    data, tokenizer = ToyTranslationDataModule(tokenizer=folder, **SMALL), load_tokenizer(folder)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert all(type(batch) is PairedTexts for batch in batches)
    assert all(english(parse_french(source)) == target for source, target in pairs(tokenizer, batches))
    batch = next(iter(data.val_dataloader()))
    assert type(batch) is TranslationBatch and texts_of(tokenizer, batch.pairs.target) == batch.references


def test_the_other_direction(folder):
    data = ToyTranslationDataModule(source="en", target="de", tokenizer=folder, **SMALL)
    data.setup("fit")
    tokenizer = load_tokenizer(folder)
    for source, target in pairs(tokenizer, data.train_dataloader()):
        meaning = parse_english(source)
        assert len(target.split()) == len(german(meaning).split())  # genders apart, it says the same


def test_the_game(folder):
    beside = {
        "fr_en": ToyTranslationDataModule(**SMALL),
        "en_de": ToyTranslationDataModule(source="en", target="de", **SMALL),
    }
    data = ToyTranslationGameDataModule(tokenizer=folder, **SMALL, **beside)
    data.setup("fit")
    tokenizer = load_tokenizer(folder)
    assert set(data.splits["train"]) == {"fr", "de"}
    batches = [batch for batch, _, _ in data.train_dataloader()]
    assert all(
        german(parse_french(source)) == target for source, target in pairs(tokenizer, [b["game"] for b in batches])
    )
    assert all(
        english(parse_french(source)) == target for source, target in pairs(tokenizer, [b["fr_en"] for b in batches])
    )
    for batch in data.val_dataloader():
        assert type(batch) is GameEvaluationBatch
        assert texts_of(tokenizer, batch.pairs.source) == batch.french
        for fr, en, de in zip(batch.french, batch.english, batch.german, strict=True):
            meaning = parse_french(fr)
            assert (en, de) == (english(meaning), german(meaning))
            assert parse_english(en) == without_gender(meaning)


@pytest.mark.parametrize("topic", ["home", "outdoor"])
def test_no_english_sentence_is_in_two_splits(topic):
    data = ToyTranslationDataModule(topic=topic, train_pairs=20_000, eval_pairs=1000)
    english_of = {name: split["en"] for name, split in data.load().items()}
    parts = {name: set(texts) for name, texts in english_of.items()}
    assert len(set.union(*parts.values())) == sum(len(part) for part in parts.values())
    assert len(english_of["train"]) > 19_000 and len(english_of["validation"]) > 950


def test_a_game_does_not_train_on_what_it_validates():
    splits = ToyTranslationGameDataModule(train_pairs=3000, eval_pairs=500).load()
    assert not set(splits["train"]["fr"]) & set(splits["validation"]["fr"])


def test_sentences_are_those_of_their_seed():
    one, two = (ToyTranslationDataModule(seed=seed, **SMALL).load() for seed in (1, 2))
    assert one == ToyTranslationDataModule(seed=1, **SMALL).load() and one["train"] != two["train"]


def test_every_word_is_a_token(folder):
    tokenizer = load_tokenizer(folder)
    splits = ToyTranslationGameDataModule(train_pairs=10, eval_pairs=500).load()
    for texts in splits["validation"].values():
        encoded = tokenizer(texts)["input_ids"]
        assert tokenizer.unk_token_id not in {token for ids in encoded for token in ids}
        assert [tokenizer.decode(ids) for ids in encoded] == texts
