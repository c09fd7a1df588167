import pytest
import torch
from tokenizers.processors import TemplateProcessing

from elastic_lightning.data.dialogue import QuestionAnswer
from elastic_lightning.data.preferences import Preference, draw_pairs, encode_pairs, preference_batch
from elastic_lightning.data.questions import AnswerPair, Question
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.policies.special_tokens import Frame

ASKED = Question(
    "Why?",
    ["Because it is so."],
    [AnswerPair("Because it is so.", "No.", 3.0), AnswerPair("Because it is so.", "Who knows?", 5.0)],
)
MANY = Question("Which?", ["best"], [AnswerPair("best", f"worse {number}") for number in range(20)])


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["Question: Why?\n\nAnswer: Because it is so. No. Who knows?"] * 5, 320)


@pytest.mark.parametrize("special", [False, True])
def test_texts_margins_and_lengths(bpe, special):
    if special:  # as BERT's tokenizer does: something before and something after
        bpe._tokenizer.post_processor = TemplateProcessing(
            single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
        )
    rows = encode_pairs(bpe, QuestionAnswer(), [ASKED, Question("Empty?")], None, seed=0)
    assert len(rows) == 2
    for row, pair in zip(rows, ASKED.pairs, strict=True):
        for ids, answer, length in (
            (row.chosen, pair.better, row.chosen_length),
            (row.rejected, pair.worse, row.rejected_length),
        ):
            assert bpe.decode(ids, skip_special_tokens=True) == f"Question: Why?\n\nAnswer: {answer}"
            assert length == len(bpe(" " + answer, add_special_tokens=False)["input_ids"])
            assert (ids[0], ids[-1]) == (0, 1) or not special
        assert row.margin == pair.margin


def test_a_batch_is_padded_at_the_end_to_one_length():
    rows = [Preference([5, 6, 7], [5, 8], 2.0, 2, 1), Preference([9], [5, 6, 8, 8], 0.0, 1, 3)]
    batch = preference_batch(rows, pad_token_id=3)
    assert batch.chosen_tokens.tolist() == [[5, 6, 7, 3], [9, 3, 3, 3]]
    assert batch.rejected_tokens.tolist() == [[5, 8, 3, 3], [5, 6, 8, 8]]
    assert batch.chosen_mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch.rejected_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.margin.tolist() == [2.0, 0.0] and batch.margin.dtype == torch.float32
    assert batch.chosen_length.tolist() == [2, 1] and batch.rejected_length.tolist() == [1, 3]
    integers = (batch.chosen_tokens, batch.rejected_tokens, batch.chosen_length, batch.rejected_length)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


def test_a_shortened_text_loses_its_beginning():
    short = Preference([1, 2, 3, 4, 5], [6, 7, 8, 9], 1.0, 4, 1).shortened(3)
    assert short == Preference([3, 4, 5], [7, 8, 9], 1.0, 3, 1) and short.longest() == 3


def test_a_shortened_text_keeps_what_stands_around_it():
    short = Preference([7, 1, 2, 3, 4, 8], [7, 5, 8], 1.0, 4, 1).shortened(4, Frame([7], [8]))
    assert short == Preference([7, 3, 4, 8], [7, 5, 8], 1.0, 4, 1)


def test_pairs_are_drawn_alike_each_time_and_unlike_for_other_seeds():
    drawn = draw_pairs(MANY, 3, seed=1)
    assert drawn == draw_pairs(MANY, 3, seed=1) and len(set(drawn)) == 3
    assert [MANY.pairs.index(pair) for pair in drawn] == sorted(MANY.pairs.index(pair) for pair in drawn)
    assert {tuple(draw_pairs(MANY, 1, seed)) for seed in range(200)} == {(pair,) for pair in MANY.pairs}
    others = [Question(f"Which {number}?", pairs=MANY.pairs) for number in range(50)]
    assert len({tuple(draw_pairs(other, 1, 1)) for other in others}) > 10
    assert draw_pairs(MANY, None, 1) == draw_pairs(MANY, 20, 1) == MANY.pairs
