"""Accumulated gradients are those of one batch of the same rows, though its parts hold unlike numbers of tokens."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from elastic_lightning.algorithms import (
    AdamWConfig,
    LabelledTexts,
    LanguageModel,
    PreferenceModel,
    RewardModel,
    TranslationModel,
)
from elastic_lightning.policies import ModelSource, PairedTexts, PreferenceBatch, Prompts, Responses

SIZE = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | SIZE
MARIAN = {"model_type": "marian", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
MARIAN |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
MARIAN |= {"max_position_embeddings": 32, "init_std": 0.3}
SHAPES = ((3, 4), (1, 20), (2, 7))  # rows and tokens of three batches; two of them make a step, then the one left over


class Gradients(Callback):
    """What an optimizer step is taken with, as anybody's callback sees it."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.steps.append({name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None})


def tokens_of(rows, length):
    return torch.randint(0, 27, (rows, length), generator=torch.Generator().manual_seed(length))


def everywhere(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


def language_model(folder):
    def total(model, tokens):
        logits = model(input_ids=tokens).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens[:, 1:].numel()

    module = LanguageModel(ModelSource(architecture=GPT2, tokenizer=folder))
    return module, [tokens_of(*shape) for shape in SHAPES], total


def translation_model(folder):
    def total(model, pairs):
        tokens = pairs.target.tokens
        start = torch.full((len(tokens), 1), model.config.decoder_start_token_id)
        logits = model(input_ids=pairs.source.tokens, decoder_input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum"), tokens.numel()

    module = TranslationModel(ModelSource(architecture=MARIAN, tokenizer=folder), label_smoothing=0.0, max_new_tokens=8)
    sides = [tokens_of(*shape) for shape in SHAPES]
    batches = [PairedTexts(Prompts(t, everywhere(t)), Responses(t.flip(1), everywhere(t))) for t in sides]
    return module, batches, total


def reward_model(folder):
    def total(model, batch):
        return F.cross_entropy(model(input_ids=batch.tokens).logits, batch.labels, reduction="sum"), len(batch.labels)

    module = RewardModel(ModelSource(architecture=GPT2, tokenizer=folder))
    sides = [tokens_of(*shape) for shape in SHAPES]
    return module, [LabelledTexts(t, everywhere(t), t[:, 0] % 2) for t in sides], total


def preference_model(folder):
    def total(model, batch):
        better, worse = (model(input_ids=t).logits[:, 0] for t in (batch.chosen_tokens, batch.rejected_tokens))
        return -F.logsigmoid(better - worse).sum(), len(better)

    module = PreferenceModel(ModelSource(architecture=GPT2, tokenizer=folder))
    batches = []
    for rows, length in SHAPES:
        tokens, lengths = tokens_of(rows, length), torch.full((rows,), length)
        both = (tokens, everywhere(tokens), tokens.flip(1), everywhere(tokens))
        batches.append(PreferenceBatch(*both, torch.zeros(rows), lengths, lengths))
    return module, batches, total


@pytest.mark.parametrize("build", [language_model, translation_model, reward_model, preference_model])
def test_accumulated_gradients_are_those_of_one_batch(toy, tmp_path, build):
    torch.manual_seed(0)
    module, batches, total = build(toy.folder)
    module.optimizer_config = AdamWConfig(learning_rate=1e-30)  # the second step is taken with the same weights
    gradients = Gradients()
    toy.trainer(tmp_path, accumulate_grad_batches=2, callbacks=[gradients]).fit(module, toy.loader(batches))
    assert len(gradients.steps) == 2
    for step, window in zip(gradients.steps, (batches[:2], batches[2:]), strict=True):
        module.model.zero_grad()
        sums, counts = zip(*(total(module.model, batch) for batch in window), strict=True)
        (sum(sums) / sum(counts)).backward()
        for name, parameter in module.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(step[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_gradients_that_were_dropped_count_no_more(toy, tmp_path):
    class Dropping(Gradients):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.optimizers[0].zero_grad()

    torch.manual_seed(0)
    module, batches, total = language_model(toy.folder)
    gradients = Dropping()
    toy.trainer(tmp_path, accumulate_grad_batches=2, callbacks=[gradients], max_steps=1).fit(
        module, toy.loader(batches)
    )
    torch.manual_seed(0)
    fresh = language_model(toy.folder)[0].model
    nll, count = total(fresh, batches[1])
    (nll / count).backward()
    for name, parameter in fresh.named_parameters():
        torch.testing.assert_close(gradients.steps[0][name], parameter.grad, atol=1e-6, rtol=1e-4)
