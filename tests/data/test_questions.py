import hashlib
from collections import Counter

import pytest

from elastic_lightning.data.questions import (
    AnswerPair,
    Question,
    Shares,
    collect,
    evaluation_half,
    key_of,
    position,
)
from elastic_lightning.errors import UserError

TEXTS = [f"How do I reverse list number {number}?" for number in range(2000)]


def all_in_one(rows, limit=None):
    questions, left_out = collect([("file", rows)], lambda _: "train", {"train": limit})
    return questions["train"], +left_out


def pair(question, better, worse, **scores):
    return {"qid": 1, "question": question, "response_j": better, "response_k": worse, **scores}


def test_pairs_of_a_question_are_gathered():
    rows = [pair("q", "a", "b"), pair("other", "x", "y"), pair("q", "a", "c"), pair(" q\n", "b", "c")]
    assert all_in_one(rows)[0] == [
        Question("q", ["a", "b"], [AnswerPair("a", "b"), AnswerPair("a", "c"), AnswerPair("b", "c")]),
        Question("other", ["x"], [AnswerPair("x", "y")]),
    ]


def test_margins_are_differences_of_scores():
    rows = [pair("q", "a", "b", score_j=12, score_k=7), pair("q", "a", "c", score_j=12, score_k=-3)]
    assert [found.margin for found in all_in_one(rows)[0][0].pairs] == [5.0, 15.0]


def test_the_best_ranked_answer_stands_against_each_other():
    (question,), left_out = all_in_one([{"question": "q", "answers": ["best ", "second", " ", "third", "best"]}])
    assert question.answers == ["best"]
    assert question.pairs == [AnswerPair("best", "second"), AnswerPair("best", "third")]
    assert left_out == Counter({"with an empty answer": 1})


def test_a_question_with_one_answer_or_none_has_no_pairs():
    rows = [{"question": "one", "answers": ["only"]}, {"question": "none", "answers": []}]
    assert all_in_one(rows)[0] == [Question("one", ["only"]), Question("none")]


def test_what_shows_no_preference_is_left_out_and_counted():
    rows = [pair("q", "a", "a "), pair("q", "b", ""), pair("q", "", "c"), pair("q", "d", "e")]
    (question,), left_out = all_in_one(rows)
    assert question == Question("q", ["a", "b", "d"], [AnswerPair("d", "e")])
    assert left_out == Counter({"with an empty answer": 2, "of two equal answers": 1})


def test_reading_stops_when_there_is_enough():
    read = []

    def rows():
        for number in range(100):
            read.append(number)
            yield pair(f"q{number // 3}", f"a{number}", "b")

    questions, _ = all_in_one(rows(), limit=2)
    assert [len(question.pairs) for question in questions] == [3, 3]  # the last question has all of its rows
    assert len(read) == 7


def test_a_full_split_does_not_stop_the_others():
    rows = [pair(name, "a", "b") for name in ("t1", "t2", "t3", "v1", "x1", "v2", "v3", "t4")]
    split_of = {"t": "train", "v": "validation", "x": None}
    questions, _ = collect([("file", rows)], lambda text: split_of[text[0]], {"train": 2, "validation": 3})
    assert {name: [q.text for q in split] for name, split in questions.items()} == {
        "train": ["t1", "t2"],
        "validation": ["v1", "v2", "v3"],
    }


def test_files_of_both_layouts_are_joined():
    tables = [("pairs", [pair("q", "a", "b")]), ("ranked", [{"question": "Q", "answers": ["a", "b", "c"]}])]
    questions, _ = collect(tables, lambda _: "train", {"train": None})
    assert questions["train"] == [Question("q", ["a"], [AnswerPair("a", "b"), AnswerPair("a", "c")])]


BAD_ROWS = {
    "no question": ({"text": "q", "answers": ["a"]}, r"file has no column 'question', only \['answers', 'text'\]"),
    "misspelt": ({"question": "q", "response_j": "a", "response-k": "b"}, "no column 'response_k', only .*response-k"),
    "no answers": ({"question": "q"}, "no column 'response_j'.* or question, answers"),
    "empty question": ({"question": " \n", "answers": ["a"]}, "row 2 of file has an empty question"),
    "null question": ({"question": None, "answers": ["a"]}, "row 2 of file: question must be text, got None"),
    "null answer": ({"question": "q", "answers": ["a", None]}, "row 2 of file: answers must be a list of texts"),
    "text for answers": ({"question": "q", "answers": "a"}, "answers must be a list of texts"),
    "null response": (pair("q", "a", None), "row 2 of file: response_k must be text"),
    "null score": (pair("q", "a", "b", score_j=1, score_k=None), "score_j and score_k must be numbers, got 1 and None"),
    "nan score": (pair("q", "a", "b", score_j=float("nan"), score_k=1), "must be numbers"),
    "wrong way round": (pair("q", "a", "b", score_j=1, score_k=4), "score_j 1 is below score_k 4"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_clear_line(name):
    row, message = BAD_ROWS[name]
    good = {key: value if isinstance(value, list | int) else "fine" for key, value in row.items()}
    if "answers" in good:
        good["answers"] = ["fine"]
    if "score_j" in good:
        good |= {"score_j": 2, "score_k": 1}
    with pytest.raises(UserError, match=message) as raised:
        all_in_one([good, row])
    assert "\n" not in str(raised.value)


# The split ----------------------------------------------------------------------------------------------------------


def test_a_question_has_one_place_whatever_its_spelling():
    for text in ("what is  a\nList?", "What is a list?", " WHAT IS A LIST? "):
        expected = int(hashlib.sha256(b"what is a list?").hexdigest()[:16], 16) / 16**16
        assert position(text) == pytest.approx(expected, abs=1e-15)
        assert key_of(text) == "what is a list?"


def test_places_never_change():
    """A later version must split an old file alike, or it trains on what an older one held out."""
    parts = {"tuple": "supervised", "set": "reward", "tensor": "rl", "list": "evaluation"}
    assert {kind: Shares().part_of(f"What is a {kind}?") for kind in parts} == parts
    assert evaluation_half("What is a list?") == "test"


def test_every_part_has_its_share():
    shares = Shares(supervised=0.1, reward=0.2, rl=0.3, evaluation=0.4)
    counts = Counter(shares.part_of(text) for text in TEXTS)
    for part, share in vars(shares).items():
        deviation = (share * (1 - share) / len(TEXTS)) ** 0.5
        assert abs(counts[part] / len(TEXTS) - share) < 4 * deviation, part
    held_out = [text for text in TEXTS if shares.part_of(text) == "evaluation"]
    halves = Counter(map(evaluation_half, held_out))
    assert abs(halves["test"] - len(held_out) / 2) < 4 * (len(held_out) / 4) ** 0.5


def test_a_part_without_share_gets_nothing():
    shares = Shares(supervised=0.0, reward=0.5, rl=0.0, evaluation=0.5)
    assert {shares.part_of(text) for text in TEXTS} == {"reward", "evaluation"}


@pytest.mark.parametrize(
    "shares",
    [{"rl": 0.3}, {"evaluation": 0.0, "rl": 0.3}, {"supervised": -0.1, "rl": 0.7}],
)
def test_shares_that_make_no_whole(shares):
    with pytest.raises(UserError, match="data's shares must be 0 or more"):
        Shares(**shares)
