import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from elastic_lightning.data.dialogue import AsRewardsRead, ChatTemplate, QuestionAnswer
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import Prompts, Responses, decode_texts, pad

QUESTIONS = ["How do I sort a list?", "I get `KeyError: 'x'`:\n\n```\nd['x']\n```\nWhy?", "naïve — 漢字?"]
ANSWERS = ["Use sorted(list).", "1. The key\n2. is not there.", "```\nprint(1)\n```", "(see the docs)", "漢字"]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level():
    return train_bpe([QuestionAnswer().text(q, a) for q in QUESTIONS for a in ANSWERS] * 5, 400)


def sentencepiece_like():
    """A BPE whose words begin with ▁, as Llama's do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    texts = [QuestionAnswer().text(q, a) for q in QUESTIONS for a in ANSWERS]
    tokenizer.train_from_iterator(texts * 5, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")


def chat():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


DIALOGUES = {
    "byte-level BPE": lambda: (byte_level(), QuestionAnswer()),
    "words with ▁": lambda: (sentencepiece_like(), QuestionAnswer()),
    "chat template": lambda: (tokenizer := chat(), ChatTemplate(tokenizer)),
    "chat as rewards read it": lambda: (tokenizer := chat(), AsRewardsRead(ChatTemplate(tokenizer), tokenizer)),
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_a_text_begins_with_its_prompt_in_characters_and_tokens(name):
    tokenizer, dialogue = DIALOGUES[name]()
    for question in QUESTIONS:
        prompt = dialogue.prompt(question)
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for answer in ANSWERS:
            text = dialogue.text(question, answer)
            assert text.startswith(prompt) and text.removeprefix(prompt).strip() == answer
            assert tokenizer(text, add_special_tokens=False)["input_ids"][: len(asked)] == asked


def test_question_and_answer_as_released():
    assert QuestionAnswer().text("Why?", "So.") == "Question: Why?\n\nAnswer: So."


def test_a_conversation_ends_where_eos_will_stand():
    tokenizer = chat()
    system, turn = (
        "<|im_start|>system\nYou help.<|im_end|>\n",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    )
    dialogue = ChatTemplate(tokenizer)
    assert dialogue.prompt("Why?") == system + turn
    assert dialogue.text("Why?", "So.") == f"{system}{turn}So."


def test_a_reward_model_learns_from_what_a_reward_reads():
    tokenizer = chat()
    chatting = ChatTemplate(tokenizer)
    prompt, text = chatting.prompt("Why?"), chatting.text("Why?", "So.")
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answered = [*tokenizer(text, add_special_tokens=False)["input_ids"][len(asked) :], tokenizer.eos_token_id]
    sampled = Prompts(*pad([asked], 0, left=True)), Responses(*pad([answered], 0, left=False))
    texts = decode_texts(tokenizer, *sampled)
    read = AsRewardsRead(chatting, tokenizer)
    assert read.prompt("Why?") == texts.prompts[0] == "system\nYou help.\nuser\nWhy?\nassistant\n"
    assert read.text("Why?", "So.") == texts.prompts[0] + texts.responses[0]


def test_a_reward_model_learns_from_what_a_reward_with_special_tokens_reads():
    tokenizer = chat()
    chatting = ChatTemplate(tokenizer)
    asked = tokenizer(chatting.prompt("Why?"), add_special_tokens=False)["input_ids"]
    answered = tokenizer(" So.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    sampled = Prompts(*pad([asked], 0, left=True)), Responses(*pad([answered], 0, left=False))
    texts = decode_texts(tokenizer, *sampled, special_tokens=True)
    read = AsRewardsRead(chatting, tokenizer, special_tokens=True)
    assert read.prompt("Why?") == texts.prompts[0] == chatting.prompt("Why?")
    assert read.text("Why?", " So.") == texts.prompts[0] + texts.responses[0]
    tokenizer.eos_token = "<|im_start|>"  # Gemma's turns end with a token that is not eos
    assert ChatTemplate(tokenizer).text("Why?", "So.").endswith("So.<|im_end|>")
    assert AsRewardsRead(ChatTemplate(tokenizer), tokenizer, special_tokens=True).text("Why?", "So.").endswith("So.")


def test_no_template():
    with pytest.raises(UserError, match=r"no chat template.*prompt_format: question_answer"):
        ChatTemplate(byte_level())


def test_templates_that_do_not_serve():
    tokenizer = chat()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(UserError, match="fails: no users here"):
        ChatTemplate(tokenizer).prompt("Why?")
    tokenizer.chat_template = "{% if add_generation_prompt %}Go on:{% else %}{{ messages[1]['content'] }}{% endif %}"
    with pytest.raises(UserError, match="do not begin with its generation prompt"):
        ChatTemplate(tokenizer).text("Why?", "So.")
