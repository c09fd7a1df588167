import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elastic_lightning.errors import UserError
from elastic_lightning.policies.encoding import EncodedPairs, encode_source, encode_target, paired, truncated, within

PAD, EOS, UNK, BOS = 0, 1, 2, 3
SOURCE = ["<pad>", "</s>", "<unk>", "<s>", "a", "b", "c"]
TARGET = ["<pad>", "</s>", "<unk>", "<s>", "x", "a", "y"]  # "a" is 4 as a source and 5 as a target


def words(vocabulary, template=None):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def tokenizer(template=None, **special):
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=words(SOURCE, template), **special)


class TwoVocabularies(PreTrainedTokenizerFast):
    """What Marian's tokenizer does: another vocabulary for the target, between these two calls."""

    def _switch_to_target_mode(self):
        self._tokenizer = words(TARGET, "$A </s>")

    def _switch_to_input_mode(self):
        self._tokenizer = words(SOURCE, "$A </s>")


KINDS = {"adds nothing": None, "adds eos": "$A </s>", "adds bos and eos": "<s> $A </s>", "adds two": "$A </s> </s>"}


@pytest.mark.parametrize("kind", KINDS)
def test_eos_ends_a_target_once(kind):
    start = [BOS] if kind == "adds bos and eos" else []
    texts = ["a b", "c", "a </s> b </s>", ""]
    expected = [[4, 5], [6], [4, 5], []]
    made = tokenizer(KINDS[kind])
    assert encode_target(made, texts) == [[*start, *ids, EOS] for ids in expected]
    assert encode_source(made, texts, eos=True) == [[*start, *ids, EOS] for ids in expected]
    assert encode_source(made, texts, eos=False) == [[*start, *ids] for ids in expected]


def test_a_target_has_its_own_vocabulary():
    made = TwoVocabularies(
        tokenizer_object=words(SOURCE, "$A </s>"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    assert encode_target(made, ["x a y"]) == [[4, 5, 6, EOS]]
    assert encode_source(made, ["a b c"], eos=True) == [[4, 5, 6, EOS]]
    assert encode_target(made, ["x b"]) == [[4, UNK, EOS]]


def test_many_texts_keep_their_order():
    texts = ["a " * (1 + number % 7) for number in range(2345)]
    assert [len(ids) - 1 for ids in encode_target(tokenizer(), texts)] == [1 + number % 7 for number in range(2345)]
    assert encode_source(tokenizer(), [], eos=True) == []


def test_a_tokenizer_without_eos():
    with pytest.raises(UserError, match="no eos token"):
        encode_target(tokenizer(eos_token=None), ["a"])


def test_a_batch_by_hand():
    batch = paired(EncodedPairs([[4, 5, EOS], [6, EOS]], [[5, EOS], [4, 4, 6, EOS]]), PAD, EOS)
    assert batch.source.tokens.tolist() == [[4, 5, EOS], [PAD, 6, EOS]]
    assert batch.source.mask.tolist() == [[True, True, True], [False, True, True]]
    assert batch.target.tokens.tolist() == [[5, EOS, EOS, EOS], [4, 4, 6, EOS]]
    assert batch.target.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.source.tokens.dtype == batch.target.tokens.dtype == torch.int64


def test_what_is_too_long():
    pairs = EncodedPairs([[4, EOS], [4, 4, EOS], [EOS]], [[4, 4, EOS], [EOS], [4, EOS]])
    assert pairs.lengths() == [3, 3, 2]
    assert within(pairs, 2, 2) == [2]
    assert within(pairs, 2, 3) == [0, 2]
    assert within(pairs, 3, 3) == [0, 1, 2]
    assert truncated([[4, 5, 6, EOS], [4, EOS], [EOS]], 3) == [[4, 5, EOS], [4, EOS], [EOS]]
    assert truncated([[4, 5, EOS]], 1) == [[EOS]]
