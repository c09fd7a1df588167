import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from elastic_lightning.errors import UserError
from elastic_lightning.rewards import ClassifierReward, score

PROMPTS = ["w3 w4", "w5", "w6 w7 w8 w9", "w10 w11"]
RESPONSES = [" w12", " w13 w14 w15 w16", "", " w17 w18"]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


@torch.no_grad()
def plain_logits(folder, texts):
    """One text at a time, so that nothing is padded."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.cat([model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits for text in texts])


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def close(ours, expected):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_probability_and_logit_are_those_of_the_model(classifier_folder):
    logits = plain_logits(classifier_folder, TEXTS)
    assert logits[:, 1].std() > 0.1, "the case should tell texts apart"
    close(ClassifierReward(classifier_folder)(PROMPTS, RESPONSES), logits.softmax(1)[:, 1])
    close(ClassifierReward(classifier_folder, label=0)(PROMPTS, RESPONSES), logits.softmax(1)[:, 0])
    close(ClassifierReward(classifier_folder, output="logit")(PROMPTS, RESPONSES), logits[:, 1])


def test_on_the_response_alone(classifier_folder):
    spoken = [0, 1, 3]
    reward = ClassifierReward(classifier_folder, on="response")
    expected = plain_logits(classifier_folder, [RESPONSES[i] for i in spoken]).softmax(1)[:, 1]
    close(reward([PROMPTS[i] for i in spoken], [RESPONSES[i] for i in spoken]), expected)


def test_one_label_is_a_sigmoid(tmp_path, word_tokenizer):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=1, initializer_range=0.5, **size))
    folder = save(tmp_path, model, word_tokenizer(eos_token="<eos>", pad_token="<pad>"))
    logits = plain_logits(folder, TEXTS)[:, 0]
    close(ClassifierReward(folder, label=0)(PROMPTS, RESPONSES), 1 / (1 + (-logits).exp()))
    close(ClassifierReward(folder, label=0, output="logit")(PROMPTS, RESPONSES), logits)
    with pytest.raises(UserError, match="no label 1"):
        ClassifierReward(folder)


@pytest.mark.parametrize(("label", "column"), [("POSITIVE", 1), ("NEGATIVE", 0), (0, 0), ("1", 1)])
def test_labels_by_name_and_index(classifier_folder, label, column):
    expected = plain_logits(classifier_folder, TEXTS)[:, column]
    close(ClassifierReward(classifier_folder, label=label, output="logit")(PROMPTS, RESPONSES), expected)


@pytest.mark.parametrize("label", ["HAPPY", 2, -1, "2", ""])
def test_unknown_labels_name_those_that_exist(classifier_folder, label):
    with pytest.raises(UserError, match=r"NEGATIVE.*POSITIVE"):
        ClassifierReward(classifier_folder, label=label)


def test_a_name_that_looks_like_a_number_is_a_name(tmp_path, classifier_folder):
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    model.config.id2label, model.config.label2id = {0: "1", 1: "2"}, {"1": 0, "2": 1}
    folder = save(tmp_path, model, AutoTokenizer.from_pretrained(classifier_folder))
    close(ClassifierReward(folder, label="1", output="logit")(PROMPTS, RESPONSES), plain_logits(folder, TEXTS)[:, 0])


def test_long_texts_lose_their_beginning(classifier_folder):
    words = [f"w{3 + i % 27}" for i in range(80)]
    reward = ClassifierReward(classifier_folder)  # the model has 32 positions
    expected = plain_logits(classifier_folder, [" ".join(words[-32:])]).softmax(1)[:, 1]
    close(reward([" ".join(words[:70])], [" " + " ".join(words[70:])]), expected)
    short = ClassifierReward(classifier_folder, max_length=5)
    close(
        short([" ".join(words[:70])], [" " + " ".join(words[70:])]),
        plain_logits(classifier_folder, [" ".join(words[-5:])]).softmax(1)[:, 1],
    )


def test_positions_that_start_after_the_pad_token(tmp_path, word_tokenizer):
    """RoBERTa has as many positions as its config says, less those up to its pad token's: a text must fit the rest."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=14, pad_token_id=1, initializer_range=0.5, **size)
    tokenizer = word_tokenizer(eos_token="<pad>", pad_token="<eos>")  # whose id is 1
    folder = save(tmp_path, RobertaForSequenceClassification(config), tokenizer)
    words = [f"w{3 + i % 27}" for i in range(40)]
    expected = plain_logits(folder, [" ".join(words[-12:]), "w3 w4"]).softmax(1)[:, 1]
    close(ClassifierReward(folder)([" ".join(words), "w3"], ["", " w4"]), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_the_batch_size_does_not_change_scores(classifier_folder, batch_size):
    texts = [" ".join(f"w{3 + (i + j) % 27}" for j in range(1 + 3 * i)) for i in range(7)]
    expected = plain_logits(classifier_folder, texts).softmax(1)[:, 1]
    close(ClassifierReward(classifier_folder, batch_size=batch_size)(texts, [""] * 7), expected)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_empty_texts_have_finite_scores(classifier_folder, batch_size):
    reward = ClassifierReward(classifier_folder, on="response", batch_size=batch_size)
    alone = score(reward, ["w3"], [""]).total
    mixed = score(reward, ["w3", "w4", "w5"], ["", " w6 w7 w8", ""]).total
    close(mixed[[0, 2]], alone.repeat(2))
    close(mixed[1:2], plain_logits(classifier_folder, ["w6 w7 w8"]).softmax(1)[:, 1])


def decoder(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        return GPT2ForSequenceClassification(GPT2Config(vocab_size=30, num_labels=2, eos_token_id=1, **size))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=30, num_labels=2, initializer_range=0.5, **size))


@pytest.mark.parametrize("special", ["none", "eos", "known", "outside"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_classifiers_that_read_their_last_token(tmp_path, word_tokenizer, kind, special):
    """A decoder scores the last token that is not padding: the pad token it looks for must be the tokenizer's."""
    model = decoder(kind)
    pad = {"none": None, "eos": "<eos>", "known": "<pad>", "outside": "<outside>"}[special]
    tokenizer = word_tokenizer(eos_token="<eos>", **({"pad_token": pad} if pad else {}))
    model.config.pad_token_id = {"eos": 1, "known": 0}.get(special)
    folder = save(tmp_path, model, tokenizer)
    # Texts that end in the ids that padding may be replaced by or mistaken for.
    texts = ["w3 w4 w5 w6", "w7", "w8 <eos>", "w9 w10 <unk>", *([] if special != "outside" else ["w3 <pad>"])]
    expected = torch.cat([plain_logits(folder, [text]) for text in texts])
    if special == "eos":  # transformers itself trims the eos it takes for padding: the oracle must not
        model.config.pad_token_id = None
        expected = torch.cat(
            [model.eval()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.detach() for text in texts]
        )
    reward = ClassifierReward(folder, output="logit")
    close(reward(texts, [""] * len(texts)), expected[:, 1])
    assert reward.model.get_input_embeddings().weight.shape[0] == 30
    assert score(reward, ["", "w3"], ["", " w4"]).total.isfinite().all()


def test_an_encoder_with_a_pad_token_outside_its_vocabulary(tmp_path, word_tokenizer, classifier_folder):
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    folder = save(tmp_path, model, word_tokenizer(eos_token="<eos>", pad_token="<outside>"))
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 30
    close(ClassifierReward(folder)(PROMPTS, RESPONSES), plain_logits(classifier_folder, TEXTS).softmax(1)[:, 1])


def test_special_tokens_around_the_text_survive_truncation(tmp_path, classifier_folder, word_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    folder = save(tmp_path, model, tokenizer)
    ids = torch.tensor([[2, 8, 9, 10, 1]])
    expected = model.eval()(input_ids=ids).logits.softmax(1)[:, 1].detach()
    close(ClassifierReward(folder, max_length=5)(["w6 w7"], [" w8 w9 w10"]), expected)


def test_the_classifier_is_frozen_and_without_dropout(classifier_folder):
    reward = ClassifierReward(classifier_folder)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    first = reward(PROMPTS, RESPONSES)
    reward.train()  # a trainer may do so to every module
    assert torch.equal(reward(PROMPTS, RESPONSES), first)


def test_low_precision_gives_float32_scores(classifier_folder):
    reward = ClassifierReward(classifier_folder, dtype="bfloat16")
    scores = reward(PROMPTS, RESPONSES)
    assert next(reward.parameters()).dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(scores, plain_logits(classifier_folder, TEXTS).softmax(1)[:, 1], atol=0.1, rtol=0)


def test_wrong_options(tmp_path, classifier_folder):
    with pytest.raises(UserError, match="no such folder"):
        ClassifierReward(str(tmp_path / "none"))
    with pytest.raises(UserError, match="output"):
        ClassifierReward(classifier_folder, output="odds")
    with pytest.raises(UserError, match="on"):
        ClassifierReward(classifier_folder, on="prompt")
    with pytest.raises(UserError, match="batch_size"):
        ClassifierReward(classifier_folder, batch_size=0)
    for length in (-5, 0):  # no text would be left of any
        with pytest.raises(UserError, match="max_length must be 1 or more"):
            ClassifierReward(classifier_folder, max_length=length)


def test_out_of_memory_halves_the_batch_for_good_and_changes_no_score(classifier_folder):
    texts = [f"w{number} w{number + 1}" for number in range(3, 13)]
    expected = ClassifierReward(classifier_folder)(texts, [""] * 10)
    reward, sizes = ClassifierReward(classifier_folder, batch_size=8), []

    def small(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    reward.model.register_forward_pre_hook(small, with_kwargs=True)
    with pytest.warns(UserWarning, match="2 rows at a time"):
        close(score(reward, texts, [""] * 10).total, expected)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    score(reward, texts, [""] * 10)
    assert sizes[7:] == [2] * 5
