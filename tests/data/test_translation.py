"""The supervised module over files: what is trained and validated on, and in which batches."""

from collections import Counter

import pytest
import torch

from elastic_lightning.data import Corpora, ParallelText, TranslationDataModule
from elastic_lightning.errors import UserError
from elastic_lightning.policies import PairedTexts, TranslationBatch, load_tokenizer


def module(corpora, tokenizer, **options):
    options = {"source": "fr", "target": "en", "batch_size": 4, "eval_pairs": 8, **options}
    return TranslationDataModule(corpora, tokenizer=tokenizer, **options)


def ready(*arguments, **options):
    data = module(*arguments, **options)
    data.setup("fit")
    return data


def texts_of(data, tokens, mask):
    rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    return [data.source_tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def test_training_pairs_stay_together(aligned, parallel_bpe, say):
    data = ready(Corpora(ParallelText(aligned())), parallel_bpe)
    seen = []
    for batch in data.train_dataloader():
        assert type(batch) is PairedTexts
        sources, targets = texts_of(data, *batch.source), texts_of(data, *batch.target)
        for source, target in zip(sources, targets, strict=True):
            row = int(source.split()[0].removeprefix("fr"))
            assert source == say("fr", row) and target == say("en", row)
            seen.append(row)
    assert len(seen) == len(set(seen)) == 44  # all but two held-out eights, in whole batches


def test_a_batch_is_padded_as_translators_want_it(aligned, parallel_bpe):
    data = ready(Corpora(ParallelText(aligned())), parallel_bpe, batch_size=16)
    eos, pad = load_tokenizer(parallel_bpe).eos_token_id, load_tokenizer(parallel_bpe).pad_token_id
    for batch in data.train_dataloader():
        for tokens, mask in zip(*batch.source, strict=True):
            assert mask.tolist() == sorted(mask.tolist()) and (tokens[~mask] == pad).all()
            assert tokens[-1] == eos and (tokens[mask] == eos).sum() == 1
        for tokens, mask in zip(*batch.target, strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True) and (tokens[~mask] == eos).all()
            assert (tokens[mask] == eos).sum() == 1 and tokens[mask][-1] == eos
    assert batch.target.tokens.dtype == torch.int64 and batch.target.mask.dtype == torch.bool


def test_a_decoder_alone_wants_no_eos_after_its_prompt(aligned, parallel_bpe):
    data = ready(Corpora(ParallelText(aligned())), parallel_bpe, source_eos=False)
    batch = next(iter(data.train_dataloader()))
    assert not (batch.source.tokens == load_tokenizer(parallel_bpe).eos_token_id).any()
    assert (batch.target.tokens == load_tokenizer(parallel_bpe).eos_token_id).any(dim=1).all()


def test_validation_has_references(aligned, parallel_bpe, say):
    data = ready(Corpora(ParallelText(aligned())), parallel_bpe, eval_batch_size=3)
    batches = list(data.val_dataloader())
    assert [len(batch.references) for batch in batches] == [3, 3, 2]
    for batch in batches:
        assert type(batch) is TranslationBatch
        assert texts_of(data, *batch.pairs.target) == batch.references
        for source, reference in zip(texts_of(data, *batch.pairs.source), batch.references, strict=True):
            assert say("en", int(source.split()[0].removeprefix("fr"))) == reference


def test_without_a_corpus_for_it_sentences_are_held_out(aligned, parallel_bpe):
    data = module(Corpora(ParallelText(aligned())), parallel_bpe)
    splits = data.load()
    parts = [set(splits[name]["en"]) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [44, 8, 8] and len(set.union(*parts)) == 60
    assert splits == module(Corpora(ParallelText(aligned())), parallel_bpe).load()
    assert splits != module(Corpora(ParallelText(aligned())), parallel_bpe, seed=1).load()


def test_given_corpora_are_taken_whole_and_in_order(aligned, parallel_bpe, say):
    corpora = Corpora(
        ParallelText(aligned("train", range(60))),
        ParallelText(aligned("val", range(50, 80), suffix=".gz")),
        ParallelText(aligned("test", range(80, 85))),
    )
    data = ready(corpora, parallel_bpe, eval_pairs=20)
    assert data.splits["validation"]["en"] == [say("en", row) for row in range(50, 70)]
    assert data.splits["test"]["fr"] == [say("fr", row) for row in range(80, 85)]
    assert data.splits["train"]["en"] == [say("en", row) for row in range(50)]  # the ten others are validated on


def test_no_test_corpus(aligned, parallel_bpe):
    data = ready(Corpora(ParallelText(aligned()), ParallelText(aligned("val", range(60, 70)))), parallel_bpe)
    with pytest.raises(UserError, match=r"no test corpus: give data's corpora\.test"):
        data.test_dataloader()
    assert len(next(iter(data.predict_dataloader())).references) == 8


def test_short_sentences_are_left_out(aligned, parallel_bpe):
    data = module(Corpora(ParallelText(aligned()), min_words=8), parallel_bpe, eval_pairs=3)
    assert {len(text.split()) for split in data.load().values() for text in split["en"]} == {8, 9, 10, 11, 12}


def test_long_sentences_come_more_often(aligned, parallel_bpe):
    data = ready(Corpora(ParallelText(aligned())), parallel_bpe, batch_size=1, long_weight=3, long_words=10)
    seen = Counter(text for batch in data.train_dataloader() for text in texts_of(data, *batch.target))
    assert seen == {text: 3 if len(text.split()) >= 10 else 1 for text in data.splits["train"]["en"]}


def test_pairs_too_long_for_training_are_left_out_and_cut_in_evaluation(aligned, parallel_bpe):
    data = ready(
        Corpora(ParallelText(aligned())), parallel_bpe, max_prompt_tokens=20, max_target_tokens=16, batch_size=1
    )
    whole = ready(Corpora(ParallelText(aligned())), parallel_bpe, batch_size=1)
    short = [
        row
        for row, (source, target) in enumerate(zip(*whole.encoded("train"), strict=True))
        if len(source) <= 20 and len(target) <= 16
    ]
    assert 0 < len(short) < 44 and data.training_rows() == short
    assert len(list(data.train_dataloader())) == len(short)
    eos = load_tokenizer(parallel_bpe).eos_token_id
    for batch, full in zip(data.val_dataloader(), whole.val_dataloader(), strict=True):
        assert batch.references == full.references
        assert batch.pairs.source.tokens.shape[1] <= 20 and batch.pairs.target.tokens.shape[1] <= 16
        assert (batch.pairs.source.tokens[:, -1] == eos).all()
        assert ((batch.pairs.target.tokens == eos) & batch.pairs.target.mask).any(dim=1).all()


def test_limits_draw_at_random(aligned, parallel_bpe):
    rows = [
        [int(text.split()[0].removeprefix("en")) for text in data.splits["train"]["en"]]
        for data in (
            ready(Corpora(ParallelText(aligned())), parallel_bpe, limit_pairs=12, seed=seed) for seed in (1, 1, 2)
        )
    ]
    assert len(rows[0]) == 12 and rows[0] == rows[1] != rows[2] and rows[0] == sorted(rows[0])


def test_batches_by_tokens(aligned, parallel_bpe):
    data = ready(Corpora(ParallelText(aligned())), parallel_bpe, batch_tokens=120)
    for batch in data.train_dataloader():
        assert max(side.tokens.numel() for side in batch) <= 120


def test_lower_case(tmp_path, parallel_bpe):
    for language in ("fr", "en"):
        (tmp_path / f"train.{language}").write_text("".join(f"Le NUMÉRO {row} {language}\n" for row in range(20)))
    data = ready(Corpora(ParallelText(str(tmp_path / "train")), lower_case=True), parallel_bpe, eval_pairs=4)
    texts = [text for split in data.splits.values() for side in split.values() for text in side]
    assert all(text == text.lower() for text in texts) and any("numéro" in text for text in texts)
    tokenizer = data.train_tokenizer(300)
    assert tokenizer("Le NUMÉRO 3")["input_ids"] == tokenizer("le numéro 3")["input_ids"]
    assert tokenizer.decode(tokenizer("Le NUMÉRO 3")["input_ids"]) == "le numéro 3"


def test_what_is_wrong_is_said_before_work_starts(aligned, parallel_bpe, tmp_path):
    text = ParallelText(aligned())
    with pytest.raises(UserError, match="less than one batch: lower data's batch_size"):
        ready(Corpora(text), parallel_bpe, batch_size=45)
    with pytest.raises(UserError, match="0 training pairs of no more than 1 and 64"):
        ready(Corpora(text), parallel_bpe, max_prompt_tokens=1)
    with pytest.raises(UserError, match="60 different sentences in 'en': too few to hold out 60"):
        ready(Corpora(text), parallel_bpe, eval_pairs=30)
    with pytest.raises(UserError, match="test` and no `validation"):
        Corpora(text, test=text)
    with pytest.raises(UserError, match="both 'fr'"):
        module(Corpora(text), parallel_bpe, target="fr")
    for option in ("batch_size", "batch_tokens", "eval_batch_size", "long_weight", "limit_pairs", "eval_pairs"):
        with pytest.raises(UserError, match=f"{option} must be 1 or more"):
            module(Corpora(text), parallel_bpe, **{option: 0})
    with pytest.raises(UserError, match="needs a `tokenizer`"):
        ready(Corpora(text), None)
    for language in ("fr", "en"):
        (tmp_path / f"blank.{language}").write_text(" \n\n")
    with pytest.raises(UserError, match="no row with text in fr and en"):
        ready(Corpora(ParallelText(str(tmp_path / "blank"))), parallel_bpe)


def test_two_processes_share_the_batches_of_one(aligned, parallel_bpe):
    class Trainer:
        def __init__(self, rank, world_size):
            self.global_rank, self.world_size = rank, world_size

    def rows(rank, world_size, batch_size):
        data = module(Corpora(ParallelText(aligned())), parallel_bpe, batch_size=batch_size, eval_batch_size=batch_size)
        data.trainer = Trainer(rank, world_size)
        data.setup("fit")
        training = [sorted(texts_of(data, *batch.source)) for batch in data.train_dataloader()]
        return training, [reference for batch in data.val_dataloader() for reference in batch.references]

    whole, measured = rows(0, 1, 4)
    (first, one), (second, two) = rows(0, 2, 2), rows(1, 2, 2)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == whole
    assert sorted(one + two) == sorted(measured) and len(set(measured)) == 8


def test_real_pairs(shared_data, tmp_path):
    """Tatoeba's long French pairs, split by their English; Multi30k to validate on."""
    tatoeba = ParallelText(str(shared_data / "tatoeba" / "eng-fra.tsv.gz"), ["en", "fr"])
    data = TranslationDataModule(Corpora(tatoeba, min_words=8), source="fr", target="en")
    splits = data.load()
    english = {name: {text.lower() for text in split["en"]} for name, split in splits.items()}
    assert [len(english[name]) for name in ("validation", "test")] == [1000, 1000]
    assert not any(
        english[a] & english[b] for a, b in (("train", "test"), ("train", "validation"), ("validation", "test"))
    )
    assert 31_000 < len(splits["train"]["en"]) < 34_139 - 2000
    caption = ParallelText(str(shared_data / "multi30k" / "val"))
    splits = TranslationDataModule(Corpora(tatoeba, caption, min_words=8), source="fr", target="en").load()
    assert len(splits["train"]["fr"]) == 34_139 and len(splits["validation"]["en"]) == 1014
