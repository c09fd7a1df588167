import csv
import gzip
import json

import pytest
import torch
from tokenizer_kinds import KINDS, sentences

from elastic_lightning.data import IMDBDataModule, ToyReviewsDataModule
from elastic_lightning.data.files import read_splits
from elastic_lightning.data.reviews import first_part, first_words, pack
from elastic_lightning.data.tokenizers import main as tokenizer_main
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import load_tokenizer, pad

TEXTS = [f"review number {i} is about a<br /><br />film that lasts {i} hours" for i in range(50)]
ROWS = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]


def write(folder, rows, name):
    folder.mkdir(exist_ok=True)
    if name.endswith(".csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(folder / name)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS, 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "imdb", ROWS, "train.jsonl.gz")
    return write(tmp_path / "imdb", ROWS[:20], "test.jsonl.gz")


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.csv", "train.parquet"])
def test_every_kind_of_file(name, tmp_path):
    data = read_splits(write(tmp_path / "data", ROWS, name))["train"]
    assert list(data["text"]) == TEXTS and list(data["label"]) == [i % 2 for i in range(50)]
    assert list(read_splits(tmp_path / "data" / name)["train"]["text"]) == TEXTS


@pytest.mark.parametrize("kind", [int, float, bool])
def test_labels_of_any_number_type_are_classes(kind, tmp_path, bpe):
    rows = [{"text": row["text"], "label": kind(row["label"])} for row in ROWS]
    options = {"tokenizer": bpe, "task": "reward_model", "batch_size": 4}
    module = IMDBDataModule(path=str(write(tmp_path / "data", rows, "train.jsonl")), **options)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch.labels.dtype == torch.int64
    known = {int(text.split()[2]): label for text, label in zip(*module.splits["train"], strict=True)}
    assert known == {number: number % 2 for number in known} and len(known) > 30


def test_prompts_need_no_labels_and_a_reward_model_does(tmp_path):
    path = str(write(tmp_path / "data", [{"text": text} for text in TEXTS], "train.jsonl"))
    splits = IMDBDataModule(path=path).load()
    read = {text for split in splits.values() for text in split.texts}
    assert read == {text.replace("<br /><br />", " ") for text in TEXTS}
    with pytest.raises(UserError, match="no column 'label'"):
        IMDBDataModule(path=path, task="reward_model").load()


def test_dev_is_validation(tmp_path):
    write(tmp_path / "data", ROWS, "train.jsonl")
    write(tmp_path / "data", ROWS[:3], "dev.jsonl")
    assert IMDBDataModule(path=str(tmp_path / "data")).load()["validation"].labels == [0, 1, 0]


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 1}\n')
    with pytest.raises(UserError, match="'text' holds text that is not UTF-8"):
        IMDBDataModule(path=str(tmp_path)).load()


def test_splits_do_not_overlap_and_have_the_known_shares(folder, bpe):
    data = IMDBDataModule(path=str(folder), tokenizer=bpe, batch_size=4)
    splits = data.load()
    assert [len(splits[name].texts) for name in ("train", "validation", "test")] == [40, 10, 20]
    assert not set(splits["train"].texts) & set(splits["validation"].texts)
    assert all("<br" not in text and "  " not in text for text in splits["train"].texts)
    for text, label in zip(*splits["train"], strict=True):
        assert label == int(text.split()[2]) % 2  # labels stay with their texts
    assert splits == IMDBDataModule(path=str(folder), tokenizer=bpe, batch_size=4).load()


def test_one_file_is_cut_into_three(tmp_path, bpe):
    file = write(tmp_path / "data", ROWS, "reviews.jsonl") / "reviews.jsonl"
    splits = IMDBDataModule(path=str(file), tokenizer=bpe).load()
    assert [len(splits[name].texts) for name in ("train", "validation", "test")] == [36, 9, 5]
    assert len({text for split in splits.values() for text in split.texts}) == 50


def test_prompts_are_left_truncated_left_padded_first_halves(folder, bpe):
    data = IMDBDataModule(path=str(folder), tokenizer=bpe, batch_size=8, max_prompt_tokens=6, block_size=16)
    data.setup("fit")
    tokenizer = load_tokenizer(bpe)
    batch = next(iter(data.train_dataloader()))
    order = list(data.train_dataloader().sampler)[:8]
    for row, index in enumerate(order):
        words = data.splits["train"].texts[index].split(" ")
        expected = tokenizer(" ".join(words[: len(words) // 2]))["input_ids"][-6:]
        assert batch.tokens[row][batch.mask[row]].tolist() == expected
        assert batch.mask[row].tolist() == sorted(batch.mask[row].tolist())  # padding stands on the left
    prompts, human = data.val_dataloader()
    assert next(iter(prompts)).tokens.shape[1] <= 6
    assert next(iter(human)).shape[1] == 16


def test_labelled_texts_lose_their_beginning(folder, bpe):
    data = IMDBDataModule(path=str(folder), tokenizer=bpe, task="reward_model", batch_size=8, max_tokens=5)
    data.setup("fit")
    batch, tokenizer = next(iter(data.train_dataloader())), load_tokenizer(bpe)
    index = next(iter(data.train_dataloader().sampler))
    assert batch.tokens[0][batch.mask[0]].tolist() == tokenizer(data.splits["train"].texts[index])["input_ids"][-5:]
    assert batch.labels[0] == data.splits["train"].labels[index]


def test_packing_is_all_texts_end_to_end(bpe):
    tokenizer = load_tokenizer(bpe)
    stream = [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = pack(tokenizer, TEXTS, 16)
    assert blocks.flatten().tolist() == stream[: len(stream) // 16 * 16]
    with pytest.raises(UserError, match="do not fill one block"):
        pack(tokenizer, TEXTS[:1], 1000)


def test_first_words():
    assert first_words("a b c d e", 0.5) == "a b"
    assert first_words("a", 0.5) == "a"  # a prompt has one word at least


def test_half_of_a_text_whose_words_are_not_written_apart(bpe):
    tokenizer = load_tokenizer(bpe)
    for text in ("这部电影非常好看我很喜欢推荐给大家", "หนังเรื่องนี้ดีมากฉันชอบมันจริงๆแนะนำให้ทุกคนดู อย่าพลาดนะทุกคน"):
        half = first_part(tokenizer, text, 0.5)
        tokens, whole = (len(tokenizer(part)["input_ids"]) for part in (half, text))
        assert text.startswith(half) and "\ufffd" not in half
        assert whole // 2 <= tokens <= whole // 2 + 2  # a character of several bytes is not cut
    assert first_part(tokenizer, TEXTS[0], 0.5) == first_words(TEXTS[0], 0.5)


def test_a_long_text_keeps_what_stands_around_it(tmp_path):
    """As the tokenizer itself cuts at the left, in training and where a reward is asked."""
    tokenizer = KINDS["wordpiece"]()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = sentences(12, seed=3)
    write(tmp_path / "data", [{"text": text, "label": i % 2} for i, text in enumerate(texts)], "train.jsonl")
    sizes = {"batch_size": 2, "eval_batch_size": 12, "max_tokens": 8}
    data = IMDBDataModule(str(tmp_path / "data"), task="reward_model", tokenizer=str(tmp_path / "tokenizer"), **sizes)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    tokenizer.truncation_side = "left"
    expected = tokenizer(data.splits["validation"].texts, truncation=True, max_length=8)["input_ids"]
    assert [row[keep].tolist() for row, keep in zip(*batch[:2], strict=True)] == expected
    assert max(map(len, expected)) == 8 and {row[0] for row in expected} == {tokenizer.cls_token_id}


def test_pad():
    tokens, mask = pad([[1, 2], [], [3]], 9, left=True)
    assert tokens.tolist() == [[1, 2], [9, 9], [9, 3]] and mask.tolist() == [
        [True, True],
        [False, False],
        [False, True],
    ]
    assert pad([[1], [2, 3]], 0, left=False)[0].tolist() == [[1, 0], [2, 3]]


def test_without_trainer_or_tokenizer_it_says_so(folder):
    with pytest.raises(UserError, match="tokenizer"):
        IMDBDataModule(path=str(folder)).setup("fit")


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"prompt_fraction": 1.0}, {"block_size": 0}])
def test_impossible_arguments(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        IMDBDataModule(**arguments)


def test_bpe_round_trip_and_special_tokens(bpe):
    tokenizer = load_tokenizer(bpe)
    assert len(tokenizer) == 300
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "Ünïcode — and 漢字, too"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_command(tmp_path, capsys):
    assert tokenizer_main(["--data=ToyReviewsDataModule", f"--output={tmp_path}"]) == 0
    assert len(load_tokenizer(str(tmp_path))) == 250
    assert "250 tokens" in capsys.readouterr().out


def test_toy_reviews_are_those_of_their_seed(tmp_path):
    tokenizer_main(["--data=ToyReviewsDataModule", f"--output={tmp_path}"])
    one, two = (ToyReviewsDataModule(train_texts=30, seed=seed, tokenizer=str(tmp_path)).load() for seed in (1, 2))
    assert one == ToyReviewsDataModule(train_texts=30, seed=1, tokenizer=str(tmp_path)).load()
    assert one["train"] != two["train"]
    assert not set(one["train"].texts) & set(one["test"].texts)


def test_language_model_batches_are_whole_blocks(folder, bpe):
    data = IMDBDataModule(path=str(folder), tokenizer=bpe, task="language_model", batch_size=4, block_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (4, 8) and batch.dtype == torch.int64
