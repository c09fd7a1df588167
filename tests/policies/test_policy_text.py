import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from elastic_lightning.policies import (
    Prompts,
    Responses,
    as_policy,
    decode_texts,
    ended,
    load_policy,
    load_tokenizer,
)
from elastic_lightning.policies.text import decode_apart


def batch(rows, side, pad):
    length = max(map(len, rows))
    fill = [[pad] * (length - len(row)) for row in rows]
    real = [[True] * len(row) for row in rows]
    gaps = [[False] * len(row) for row in fill]
    if side == "left":
        pairs = [(f + r, g + m) for f, r, g, m in zip(fill, rows, gaps, real, strict=True)]
    else:
        pairs = [(r + f, m + g) for f, r, g, m in zip(fill, rows, gaps, real, strict=True)]
    return torch.tensor([tokens for tokens, _ in pairs]), torch.tensor([mask for _, mask in pairs])


def decode(tokenizer, prompts, responses):
    pad = tokenizer.pad_token_id
    return decode_texts(tokenizer, Prompts(*batch(prompts, "left", pad)), Responses(*batch(responses, "right", pad)))


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Byte-level BPE in which every byte is a token: characters of several bytes are several tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=258, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")


def test_words_by_hand(tokenizer_folder):
    texts = decode(load_tokenizer(tokenizer_folder), [[5, 6], [7]], [[8, 9, 1], [10, 11]])
    assert texts.prompts == ["w5 w6", "w7"]
    assert texts.responses == [" w8 w9", " w10 w11"]
    assert texts.complete == [True, False]


def test_a_response_of_eos_alone_is_empty(tokenizer_folder):
    texts = decode(load_tokenizer(tokenizer_folder), [[5], [6]], [[1], [7, 1]])
    assert texts.responses == ["", " w7"] and texts.complete == [True, True]


def test_special_tokens_inside_are_left_out(tokenizer_folder):
    texts = decode(load_tokenizer(tokenizer_folder), [[5, 0, 6]], [[0, 7, 1]])
    assert texts.prompts == ["w5 w6"] and texts.responses == [" w7"]


@pytest.mark.parametrize("text", ["café au lait", "naïve 東京 🎬 film", "über", "a  b \n c", " e\u0301t\u0301"])
def test_prompt_and_response_are_the_whole_text_wherever_it_is_cut(byte_tokenizer, text):
    tokens = byte_tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    for cut in range(1, len(tokens)):
        texts = decode(byte_tokenizer, [tokens[:cut]], [[*tokens[cut:], byte_tokenizer.eos_token_id]])
        assert texts.prompts[0] + texts.responses[0] == text
        assert "\ufffd" not in texts.prompts[0] + texts.responses[0]
        assert texts.complete == [True]


def test_a_character_that_is_never_finished_stays_one_mark(byte_tokenizer):
    tokens = byte_tokenizer.encode("é")
    texts = decode(byte_tokenizer, [byte_tokenizer.encode("a") + tokens[:1]], [byte_tokenizer.encode("b")])
    assert texts.prompts[0] + texts.responses[0] == "a\ufffdb"


def test_invalid_bytes_never_lose_text(byte_tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tokens = torch.randint(2, 258, (12,), generator=generator).tolist()
        whole = byte_tokenizer.decode(tokens, skip_special_tokens=True)
        for cut in (3, 6, 9):
            texts = decode(byte_tokenizer, [tokens[:cut]], [tokens[cut:]])
            assert texts.prompts[0] + texts.responses[0] == whole


def test_a_tokenizer_that_joins_words_when_it_decodes():
    """Clean-up such as BERT's removes the space before a mark, so the whole text does not begin with the prompt."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<pad>", "<eos>", "do", "n", "'", "s", "##go", "."]
    plain = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([2, 4, 5]) == "do's" and tokenizer.decode([2, 4]) == "do '"
    for tokens in ([2, 4, 5, 7], [2, 6, 7], [3, 4, 6, 4, 5]):
        whole = tokenizer.decode(tokens)
        for cut in range(1, len(tokens)):
            texts = decode(tokenizer, [tokens[:cut]], [tokens[cut:]])
            assert texts.prompts[0] + texts.responses[0] == whole


def test_a_response_of_its_own_is_decoded_alone(tokenizer_folder, byte_tokenizer):
    tokenizer = load_tokenizer(tokenizer_folder)
    prompts, responses = batch([[5, 6, 1], [7, 1]], "left", 0), batch([[8, 9, 1], [10, 0, 11]], "right", 0)
    texts = decode_apart(tokenizer, Prompts(*prompts), Responses(*responses))
    assert texts == (["w5 w6", "w7"], ["w8 w9", "w10 w11"], [True, False])
    prompts, responses = (batch([byte_tokenizer.encode(text)], "left", 0) for text in ("é", "naïve"))
    assert decode_apart(byte_tokenizer, Prompts(*prompts), Responses(*responses)).responses == ["naïve"]


@pytest.mark.parametrize(
    ("folder", "response", "tokens"),
    [("gpt2_folder", " w6", [[5, 7], [0, 8]]), ("t5_folder", "w6", [[5, 7, 1], [0, 8, 1]])],
)
def test_a_policy_knows_how_it_is_asked_and_what_it_answered(folder, response, tokens, request):
    """A prompt that is continued has no end, one that is answered has."""
    loaded = load_policy(request.getfixturevalue(folder))
    lm = as_policy(loaded.model)
    prompts = lm.encode(loaded.tokenizer, ["w5 w7", "w8"])
    assert prompts.tokens.tolist() == tokens
    assert prompts.mask.tolist() == [[token != 0 for token in row] for row in tokens]
    responses = Responses(torch.tensor([[6, 1], [6, 9]]), torch.ones(2, 2, dtype=torch.bool))
    texts = lm.decode(loaded.tokenizer, prompts, responses)
    assert texts == (["w5 w7", "w8"], [response, f"{response} w9"], [True, False])


def test_ended_reads_valid_tokens_only():
    tokens = torch.tensor([[3, 1, 0], [3, 4, 5], [3, 4, 1], [1, 1, 1]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, False], [True, False, False]])
    assert ended(Responses(tokens, mask), 1).tolist() == [True, False, False, True]
    assert ended(Responses(tokens, mask), None).tolist() == [False] * 4
