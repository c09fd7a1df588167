import gzip
import json
from pathlib import Path

import pytest

from elastic_lightning.data.parallel import ParallelText, read_lines, read_parallel
from elastic_lightning.errors import UserError

EN, FR = ["A dog .", "Two men\u2028run .", "", "Eggs"], ["Un chien .", "Deux hommes courent .", "Rien", "Œufs"]
CORPUS = {"fr": FR, "en": EN}


def rows():
    return [{"en": en, "fr": fr, "id": str(number)} for number, (en, fr) in enumerate(zip(EN, FR, strict=True))]


def text_files(folder, suffix=""):
    for language, texts in CORPUS.items():
        raw = ("\n".join(texts) + "\n").encode()
        (folder / f"train.{language}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return ParallelText(str(folder / "train"))


def a_folder_of_text(folder):
    text_files(folder, ".gz")
    return ParallelText(str(folder))


def tsv(folder, name="pairs.tsv"):
    raw = "".join(f"{row['en']}\t{row['fr']}\tlicence {row['id']}\n" for row in rows()).encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return ParallelText(str(folder / name), columns=["en", "fr"])


def jsonl(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return ParallelText(str(folder))


def nested(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps({"id": 0, "translation": row}) + "\n" for row in rows()))
    return ParallelText(str(folder / "train.jsonl"))


def nested_in_a_folder(folder):
    return ParallelText(str(Path(nested(folder).path).parent))


def tsv_with_header(folder, first="fr\ten\tsource\n"):
    raw = "".join(f"{row['fr']}\t{row['en']}\tsource\n" for row in rows())
    (folder / "pairs.tsv").write_text(first + raw, encoding="utf-8")
    return ParallelText(str(folder / "pairs.tsv"), columns=["fr", "en"])


def saved(folder):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(rows())
    DatasetDict({"train": data, "validation": data.select([0])}).save_to_disk(str(folder / "saved"))
    return ParallelText(str(folder / "saved"))


def saved_without_splits(folder):
    from datasets import Dataset

    Dataset.from_list(rows()).save_to_disk(str(folder / "saved"))
    return ParallelText(str(folder / "saved"))


LAYOUTS = {
    "text": text_files,
    "gzipped text": lambda folder: text_files(folder, ".gz"),
    "a folder of text": a_folder_of_text,
    "tsv": tsv,
    "gzipped tsv": lambda folder: tsv(folder, "pairs.tsv.gz"),
    "jsonl": jsonl,
    "one column of translations": nested,
    "one column of translations in a folder": nested_in_a_folder,
    "tsv with a header": tsv_with_header,
    "tsv with a header of roles": lambda folder: tsv_with_header(folder, "Source\tTarget\n"),
    "saved by datasets": saved,
    "saved by datasets without splits": saved_without_splits,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(layout, tmp_path):
    text = LAYOUTS[layout](tmp_path)
    assert read_parallel(text, ("fr", "en")) == CORPUS
    assert read_parallel(text, ("en",)) == {"en": EN}


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets

    data = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows())})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or data)
    assert read_parallel(ParallelText("bentrevett/multi30k"), ("fr", "en")) == CORPUS
    assert asked == ["bentrevett/multi30k"]
    with pytest.raises(UserError, match="no split 'test', only train"):
        read_parallel(ParallelText("bentrevett/multi30k", split="test"), ("fr", "en"))


def test_a_first_sentence_is_no_header(tmp_path):
    (tmp_path / "pairs.tsv").write_text("source\tla source\nen\tfr \n")
    read = read_parallel(ParallelText(str(tmp_path / "pairs.tsv"), ["en", "fr"]), ("en", "fr"))
    assert read == {"en": ["source", "en"], "fr": ["la source", "fr "]}


def test_several_paths_are_joined_in_order(tmp_path):
    text_files(tmp_path)
    tsv(tmp_path)
    text = ParallelText([str(tmp_path / "train"), str(tmp_path / "pairs.tsv")], columns=["en", "fr"])
    assert read_parallel(text, ("fr", "en")) == {"fr": FR * 2, "en": EN * 2}


def test_a_folder_holds_splits(tmp_path):
    text_files(tmp_path)
    for language in CORPUS:
        (tmp_path / f"val.{language}").write_text(f"{language} words\n")
    assert read_parallel(ParallelText(str(tmp_path), split="val"), ("en", "fr")) == {
        "en": ["en words"],
        "fr": ["fr words"],
    }


def test_other_languages_are_not_opened(tmp_path):
    text = text_files(tmp_path)
    (tmp_path / "train.de").write_bytes(b"\xff\xff")
    assert read_parallel(text, ("fr", "en")) == CORPUS


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        ("\ufeffa\nb\u2028c\x85d\x0be\n".encode(), ["a", "b\u2028c\x85d\x0be"]),
        (b"\n\na\n\n", ["", "", "a", ""]),
    ],
)
def test_lines(raw, lines, tmp_path):
    (tmp_path / "text").write_bytes(raw)
    assert read_lines(tmp_path / "text") == lines


def truncated_gzip(folder):
    text = text_files(folder, ".gz")
    path = folder / "train.en.gz"
    path.write_bytes(path.read_bytes()[:-9])
    return text


def not_gzip(folder):
    text = text_files(folder, ".gz")
    (folder / "train.en.gz").write_bytes(b"a\nb\nc\nd\n")
    return text


def damaged_gzip(folder):
    text = text_files(folder, ".gz")
    raw = bytearray((folder / "train.en.gz").read_bytes())
    raw[12] ^= 0xFF
    (folder / "train.en.gz").write_bytes(bytes(raw))
    return text


def changed(name, raw, make=text_files):
    def write(folder):
        text = make(folder)
        (folder / name).write_bytes(raw)
        return text

    return write


def without(name):
    def write(folder):
        text = text_files(folder)
        (folder / name).unlink()
        return text

    return write


# name -> (what is written, what the message says)
MISTAKES = {
    "no such file": (lambda folder: ParallelText(str(folder / "nothing")), "no .*nothing.*nothing.fr or nothing.en"),
    "no such tsv": (lambda folder: ParallelText(str(folder / "a.tsv"), ["en", "fr"]), "cannot read .*a.tsv: No such"),
    "a side is missing": (without("train.fr"), "no .*train.fr or .*train.fr.gz beside train.en"),
    "unequal lines": (changed("train.en", b"a\nb\n"), "train.fr has 4 lines and train.en 2"),
    "few columns": (changed("pairs.tsv", b"a\tb\nc\n", tsv), "pairs.tsv, line 2: 1 column.* where en, fr"),
    "unnamed columns": (lambda folder: ParallelText(tsv(folder).path), "columns.*pairs.tsv.*is None"),
    "other columns": (lambda folder: ParallelText(tsv(folder).path, ["en", "de"]), "fr and en, and is"),
    "cut off": (truncated_gzip, "train.en.gz: its gzip stream is damaged or cut off"),
    "damaged": (damaged_gzip, "train.en.gz: its gzip stream is damaged or cut off"),
    "not gzip": (not_gzip, "train.en.gz: its gzip stream is damaged or cut off"),
    "Latin-1": (changed("train.en", "a\nb\n\xe9t\xe9\n".encode("latin-1")), "train.en, line 3: this is not UTF-8"),
    "Latin-1 after a mark": (changed("train.en", b"\xef\xbb\xbfa\n\xe9\n"), "train.en, line 2: this is not UTF-8"),
    "empty": (changed("train.en", b""), "train.en holds no rows"),
    "empty tsv": (changed("pairs.tsv", b"", tsv), "pairs.tsv holds no rows"),
    "a column is missing": (changed("train.jsonl", b'{"fr": "a"}\n', jsonl), "no column 'en', only"),
    "a cell is empty": (changed("train.jsonl", b'{"fr": "a", "en": null}\n', jsonl), "'en' .* other things than text"),
    "another language in the dicts": (
        changed("train.jsonl", b'{"translation": {"fr": "a", "de": "b"}}\n', jsonl),
        r"row 1 of .* must hold fr, en, got \['de', 'fr'\]",
    ),
    "no such split": (lambda folder: ParallelText(jsonl(folder).path, split="dev"), "no split 'dev', only train"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name, tmp_path):
    make, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as raised:
        read_parallel(make(tmp_path), ("fr", "en"))
    assert "\n" not in str(raised.value)


def test_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("elastic_lightning.policies.reading.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/no-such-data"):
        read_parallel(ParallelText("nobody/no-such-data"), ("fr", "en"))


def test_real_corpora(shared_data):
    """Counts that are known of these files."""
    multi30k = read_parallel(ParallelText(str(shared_data / "multi30k" / "train")), ("fr", "en", "de"))
    assert {len(texts) for texts in multi30k.values()} == {29_000}
    assert multi30k["en"][2] == "A little girl climbing into a wooden playhouse."
    assert multi30k["fr"][2] == "Une petite fille grimpe dans une maisonnette en bois."
    assert multi30k["de"][2] == "Ein kleines Mädchen klettert in ein Spielhaus aus Holz."
    pairs = {"eng-fra": ("fr", 142_787, 34_139), "eng-deu": ("de", 169_813, 46_834)}
    for name, (language, count, long) in pairs.items():
        text = ParallelText(str(shared_data / "tatoeba" / f"{name}.tsv.gz"), ["en", language])
        corpus = read_parallel(text, (language, "en"))
        assert len(corpus["en"]) == len(corpus[language]) == count
        assert sum(len(sentence.split()) >= 8 for sentence in corpus["en"]) == long
        assert not set(corpus["en"]) & set(multi30k["en"])
