"""Folders of small one-label classifiers, each with weights of its own."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from elastic_lightning.rewards import ScoreNormalization

PROMPTS = ["w3 w4", "w5", "w6 w7 w8 w9", "w10 w11", "w12"]
RESPONSES = [" w12", " w13 w14 w15 w16", "", " w17 w18", " w3 w3 w3"]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def preference_folder(folder, base, seed=0, labels=1, normalization=None, tokenizer=None):
    """A classifier on the language model `base`, all of its weights moved a little by `seed`."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.score.weight.normal_()
    model.save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(base)).save_pretrained(folder)
    if normalization is not None:
        ScoreNormalization(*normalization).write(folder)
    return str(folder)


@torch.no_grad()
def plain_scores(folder, texts=None):
    """Logits [B], one text at a time, so that nothing is padded."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts or TEXTS]
    return torch.cat([model(input_ids=row).logits[:, 0] for row in rows])


def close(ours, expected):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=1e-5)
