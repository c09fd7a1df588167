"""An encoder-decoder's perplexity of human text: what a human wrote after the prompt, as plain transformers has it."""

import math

import pytest
import torch
from lightning import Trainer
from transformers import AutoModelForSeq2SeqLM

from elastic_lightning.algorithms import PPO
from elastic_lightning.data.questions import Question
from elastic_lightning.data.reviews import Reviews, ReviewsDataModule
from elastic_lightning.data.stack_exchange import StackExchangeDataModule
from elastic_lightning.policies import ModelSource, Sampling
from elastic_lightning.rewards import FunctionReward

EOS, BLOCK = 1, 4  # tokens of what follows a prompt that count
TEXTS = ["w3 w4 w5 w6", "w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18", "w19 w20 w21"]


class Texts(ReviewsDataModule):
    def load(self):
        reviews = Reviews(TEXTS, [0] * len(TEXTS))
        return {"train": reviews, "validation": reviews, "test": reviews}


def halves():
    """Ids of the first half of each text's words, and of the others."""
    for text in TEXTS:
        ids = [int(word[1:]) for word in text.split()]
        yield ids[: len(ids) // 2], ids[len(ids) // 2 :]


def nll_by_hand(model, pairs):
    """Summed over tokens, and their number; one pair at a time, nothing is padded."""
    total, count = 0.0, 0
    for source, target in pairs:
        labels = torch.tensor([[*target, EOS][:BLOCK]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([[*source, EOS]]), labels=labels).loss
        total, count = total + loss.item() * labels.numel(), count + labels.numel()
    return total, count


def validated(folder, data, tmp_path):
    reward = FunctionReward(lambda prompts, responses: [0.0] * len(prompts))
    module = PPO(ModelSource(folder), reward, sampling=Sampling(max_new_tokens=3))
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, **options)
    trainer.validate(module, datamodule=data, verbose=False)
    return trainer.callback_metrics["val/perplexity"].item()


@pytest.mark.parametrize("model", ["t5_folder", "marian_folder", "bart_folder"])
def test_reviews(model, request, tmp_path):
    folder = request.getfixturevalue(model)
    total, count = nll_by_hand(AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), halves())
    data = Texts(batch_size=2, eval_batch_size=2, block_size=BLOCK, max_prompt_tokens=16)
    assert validated(folder, data, tmp_path) == pytest.approx(math.exp(total / count), rel=1e-4)


def test_questions(t5_folder, tmp_path):
    data = StackExchangeDataModule(path="nowhere", batch_size=1, eval_batch_size=2, block_size=BLOCK, per_question=1)
    questions = [Question("w3 w4", ["w5 w6", "w7"]), Question("w8", ["w9 w10 w11 w12 w13 w14"])]
    data.splits = dict.fromkeys(("train", "validation", "test"), questions)
    unknown = 2  # "Question:" and "Answer:" are no words of this tokenizer
    pairs = [([unknown, 3, 4, unknown], [5, 6]), ([unknown, 8, unknown], [9, 10, 11, 12, 13, 14])]
    total, count = nll_by_hand(AutoModelForSeq2SeqLM.from_pretrained(t5_folder).eval(), pairs)
    assert validated(t5_folder, data, tmp_path) == pytest.approx(math.exp(total / count), rel=1e-4)
