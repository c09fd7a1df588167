"""The translation game's data: no English in training, three texts in evaluation, and pretraining pairs beside it."""

from itertools import islice

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from elastic_lightning.cli import main
from elastic_lightning.data import Corpora, ParallelText, TranslationDataModule, TranslationGameDataModule
from elastic_lightning.data.tokenizers import main as tokenizer_main
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import GameEvaluationBatch, PairedTexts, load_tokenizer


@pytest.fixture
def corpora(aligned):
    """The game's corpora: the training corpus has an English side that must not be read."""
    return Corpora(ParallelText(aligned("train", range(60))), ParallelText(aligned("val", range(60, 70))))


@pytest.fixture
def pretraining(aligned):
    """Makes the modules of the two directions, on rows of their own; both have fewer batches than the game."""

    def make(batch_size=4, **options):
        text = Corpora(ParallelText(aligned("talks", range(100, 120))))
        return {
            f"{source}_{target}": TranslationDataModule(
                text, source=source, target=target, batch_size=batch_size, eval_pairs=2, **options
            )
            for source, target in (("fr", "en"), ("en", "de"))
        }

    return make


def game(corpora, tokenizer, **options):
    return TranslationGameDataModule(corpora, **{"tokenizer": tokenizer, "batch_size": 4, **options})


def texts_of(tokenizer, side):
    rows = [row[keep] for row, keep in zip(*side, strict=True)]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def everything(thing):
    """Every string in nested lists, tuples and dicts, and every text that a row of tokens decodes to."""
    if isinstance(thing, str):
        yield thing
    elif isinstance(thing, dict):
        yield from everything(list(thing.items()))
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from everything(part)


def test_training_carries_no_english(corpora, parallel_bpe, say):
    data = game(corpora, parallel_bpe)
    data.setup("fit")
    loader, tokenizer = data.train_dataloader(), load_tokenizer(parallel_bpe)
    rows = set()
    for batch in loader:
        assert type(batch) is PairedTexts and batch._fields == ("source", "target")
        for french, german in zip(*(texts_of(tokenizer, side) for side in batch), strict=True):
            row = int(french.split()[0].removeprefix("fr"))
            assert (french, german) == (say("fr", row), say("de", row))
            rows.add(row)
    assert rows == set(range(60))
    assert not any("en" in text for text in everything([data.splits["train"], list(loader.dataset)]))
    assert set(data.splits["train"]) == {"fr", "de"}


def test_english_of_the_training_corpus_is_not_even_read(corpora, parallel_bpe, tmp_path):
    (tmp_path / "text" / "train.en").unlink()
    data = game(corpora, parallel_bpe)
    data.setup("fit")
    assert len(data.splits["train"]["fr"]) == 60


def test_held_out_pairs_take_their_english_along(aligned, parallel_bpe, say):
    data = game(Corpora(ParallelText(aligned())), parallel_bpe, eval_pairs=8)
    data.setup("fit")
    assert set(data.splits["train"]) == {"fr", "de"} and len(data.splits["train"]["fr"]) == 44
    measured = {text.replace("en", "fr") for name in ("validation", "test") for text in data.splits[name]["en"]}
    assert len(measured) == 16 and not measured & set(data.splits["train"]["fr"])


def test_evaluation_carries_all_three_texts(corpora, parallel_bpe, say):
    data = game(corpora, parallel_bpe, eval_batch_size=4)
    data.setup("validate")
    batches, tokenizer = list(data.val_dataloader()), load_tokenizer(parallel_bpe)
    assert [len(batch.english) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert type(batch) is GameEvaluationBatch
        assert texts_of(tokenizer, batch.pairs.source) == batch.french
        assert texts_of(tokenizer, batch.pairs.target) == batch.german
        for texts in zip(batch.french, batch.english, batch.german, strict=True):
            row = int(texts[0].split()[0].removeprefix("fr"))
            assert texts == tuple(say(language, row) for language in ("fr", "en", "de"))
    assert sorted(text for batch in batches for text in batch.english) == sorted(say("en", r) for r in range(60, 70))


def test_sender_and_receiver_have_their_own_tokenizers(corpora, parallel_bpe, pretraining, tmp_path, say):
    train_bpe([say("de", row) for row in range(60)], 300).save_pretrained(tmp_path / "receiver")
    sender, receiver = load_tokenizer(parallel_bpe), load_tokenizer(str(tmp_path / "receiver"))
    assert sender(say("de", 7))["input_ids"] != receiver(say("de", 7))["input_ids"]
    data = game(corpora, parallel_bpe, receiver_tokenizer=str(tmp_path / "receiver"), **pretraining())
    data.setup("fit")
    batch, _, _ = next(iter(data.train_dataloader()))
    for french, german in zip(
        texts_of(sender, batch["game"].source), texts_of(receiver, batch["game"].target), strict=True
    ):
        assert french.replace("fr", "de") == german
    assert texts_of(sender, batch["fr_en"].target)[0].startswith("en1")
    assert texts_of(receiver, batch["en_de"].source)[0].startswith("en1")

    class Module(LightningModule):
        tokenizer, receiver_tokenizer = sender, receiver

    attached = game(corpora, None)
    attached.trainer = type("Trainer", (), {"lightning_module": Module(), "global_rank": 0, "world_size": 1})()
    attached.setup("fit")
    assert attached.encoded("train") == data.encoded("train")
    del Module.receiver_tokenizer
    attached.setup("fit")
    assert attached.encoded("train") == shared_tokenizer(corpora, parallel_bpe).encoded("train")


def shared_tokenizer(corpora, folder):
    data = game(corpora, folder)
    data.setup("fit")
    return data


class Recorder(LightningModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer, self.layer, self.batches, self.evaluated = tokenizer, torch.nn.Linear(1, 1), [], []

    def training_step(self, batch, batch_idx):
        self.batches.append((self.current_epoch, batch))
        return self.layer.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch.english

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def fit(data, tokenizer, root, **options):
    module = Recorder(load_tokenizer(tokenizer))
    Trainer(
        accelerator="cpu",
        max_epochs=2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=root,
        **options,
    ).fit(module, datamodule=data)
    return module


def test_pretraining_pairs_go_round_beside_the_game(corpora, parallel_bpe, pretraining, tmp_path, say):
    data = game(corpora, None, **pretraining())
    module = fit(data, parallel_bpe, tmp_path)
    assert [epoch for epoch, _ in module.batches] == [0] * 15 + [1] * 15  # the game's batches decide
    names = [("game", "fr", "de"), ("fr_en", "fr", "en"), ("en_de", "en", "de")]
    for epoch in (0, 1):
        batches = [batch for e, batch in module.batches if e == epoch]
        for name, source, target in names:
            rows = []
            for batch in batches:
                assert type(batch[name]) is PairedTexts
                for texts in zip(*(texts_of(module.tokenizer, side) for side in batch[name]), strict=True):
                    row = int(texts[0].split()[0].removeprefix(source))
                    assert texts == (say(source, row), say(target, row))
                    rows.append(row)
            if name == "game":
                assert sorted(rows) == list(range(60))
            else:  # 16 pairs in batches of 4: one round in four batches, and the second is in another order
                rounds = [rows[start : start + 16] for start in range(0, 48, 16)]
                assert all(len(set(one)) == 16 and min(one) >= 100 for one in rounds)
                assert len({tuple(one) for one in rounds}) == 3
    assert module.batches[0][1]["fr_en"].source.tokens.tolist() != module.batches[15][1]["fr_en"].source.tokens.tolist()
    assert len(module.evaluated) == 2 * 10


def test_one_direction_alone_can_stand_beside_the_game(corpora, parallel_bpe, pretraining, tmp_path):
    data = game(corpora, None, fr_en=pretraining()["fr_en"])
    module = fit(data, parallel_bpe, tmp_path, limit_train_batches=3)
    assert [set(batch) for _, batch in module.batches] == [{"game", "fr_en"}] * 6


def test_the_game_alone_is_a_plain_loader(corpora, parallel_bpe, tmp_path):
    module = fit(game(corpora, None), parallel_bpe, tmp_path)
    assert len(module.batches) == 30 and all(type(batch) is PairedTexts for _, batch in module.batches)


def test_what_is_beside_the_game_depends_on_the_epoch_alone(corpora, parallel_bpe, pretraining):
    def batches(epoch, module_options=None):
        data = game(corpora, parallel_bpe, **pretraining())
        data.setup("fit")
        loader = data.train_dataloader()
        assert isinstance(loader, CombinedLoader)
        for part in loader.flattened:
            part.batch_sampler.set_epoch(epoch)
        return [batch["fr_en"].source.tokens.tolist() for batch, _, _ in islice(loader, 15)]

    assert batches(1) == batches(1) != batches(0)


def test_directions_are_checked(corpora, pretraining):
    modules = pretraining()
    with pytest.raises(UserError, match="fr_en is from en to de"):
        game(corpora, None, fr_en=modules["en_de"])
    lower = Corpora(corpora.train, corpora.validation, lower_case=True)
    with pytest.raises(UserError, match="both be lower-cased"):
        game(lower, None, fr_en=modules["fr_en"])


def test_a_tokenizer_outside_a_trainer(corpora):
    with pytest.raises(UserError, match="needs a `tokenizer`"):
        game(corpora, None).setup("fit")


def test_training_texts_are_those_of_all_corpora(corpora, pretraining, say):
    data = game(corpora, None, **pretraining())
    texts = data.training_texts()
    assert set(texts) > {say(language, row) for language in ("fr", "de") for row in range(60)}
    assert not set(texts) & {say("en", row) for row in range(70)}  # the game's English is in no tokenizer either
    assert len(set(texts) & {say("en", row) for row in range(100, 120)}) == 16


def test_the_tokenizer_command_reads_all_corpora_at_once(aligned, tmp_path, say, capsys):
    (tmp_path / "talks.tsv").write_text("".join(f"TALK {say('en', row)}\tCAUSER {row}\n" for row in range(40)))
    arguments = [
        "--data=TranslationGameDataModule",
        f"--data.corpora.train.path={aligned('train', range(60))}",
        f"--data.corpora.validation.path={aligned('val', range(60, 70))}",
        "--data.corpora.lower_case=true",
        "--data.fr_en=TranslationDataModule",
        f"--data.fr_en.corpora.train.path={tmp_path}/talks.tsv",
        "--data.fr_en.corpora.train.columns=[en, fr]",
        "--data.fr_en.corpora.lower_case=true",
        "--data.fr_en.eval_pairs=5",
        "--vocabulary=310",
        f"--output={tmp_path}/bpe",
    ]
    assert tokenizer_main(arguments) == 0
    assert "310 tokens" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    assert len(tokenizer) == 310 and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert {"talk", "Ġen", "Ġde", "causer"} <= set(tokenizer.get_vocab())  # of every corpus, and lower-cased
    assert tokenizer.decode(tokenizer("Un Chat : « Œuf »  !")["input_ids"]) == "un chat : « œuf »  !"


def test_the_tokenizer_command_on_one_direction(aligned, tmp_path):
    arguments = ["--data=TranslationDataModule", f"--data.corpora.train.path={aligned()}", "--data.eval_pairs=5"]
    assert tokenizer_main([*arguments, "--vocabulary=300", f"--output={tmp_path}/bpe"]) == 0
    assert {"Ġen", "Ġfr"} <= set(load_tokenizer(str(tmp_path / "bpe")).get_vocab())


def test_the_command_line_says_what_is_wrong(aligned, tmp_path, capsys):
    command = ["tokenizer", "--data=TranslationDataModule", f"--output={tmp_path}/bpe"]
    assert main([*command, f"--data.corpora.train.path={tmp_path}/nothing"]) == 1
    assert "nothing.fr or nothing.en" in capsys.readouterr().err
    assert main([*command, f"--data.corpora.train.path={aligned()}", "--data.batch_sise=3"]) == 2
    assert "batch_sise" in capsys.readouterr().err


def test_real_game(shared_data, tmp_path):
    """Multi30k: 29,000 French-German pairs; its English in validation and test."""
    folder = shared_data / "multi30k"
    splits = {
        name: ParallelText(str(folder / stem))
        for name, stem in (("train", "train"), ("validation", "val"), ("test", "test_2016_flickr"))
    }
    data = TranslationGameDataModule(Corpora(**splits, lower_case=True), limit_pairs=200)
    loaded = data.load()
    assert {name: len(split["fr"]) for name, split in loaded.items()} == {
        "train": 29_000,
        "validation": 1014,
        "test": 1000,
    }
    assert set(loaded["train"]) == {"fr", "de"}
    texts = loaded["train"]["fr"][:2000] + loaded["train"]["de"][:2000]
    train_bpe(texts, 2000, lower_case=True).save_pretrained(tmp_path)
    data.tokenizer_path = str(tmp_path)
    data.setup("fit")
    assert len(data.splits["validation"]["en"]) == 1000
    tokenizer = load_tokenizer(str(tmp_path))
    for batch in islice(data.val_dataloader(), 3):
        assert texts_of(tokenizer, batch.pairs.source) == batch.french
        assert texts_of(tokenizer, batch.pairs.target) == batch.german
