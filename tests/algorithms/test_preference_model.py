"""Reward models of preferences: the loss by hand, what is measured, what is saved, and that they learn."""

import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2ForSequenceClassification

from elastic_lightning.algorithms import AdamWConfig, PreferenceModel
from elastic_lightning.errors import UserError
from elastic_lightning.functional import wilson_interval
from elastic_lightning.policies import LoRA, ModelSource, PreferenceBatch
from elastic_lightning.policies.loading import disable_dropout
from elastic_lightning.rewards import PreferenceReward

BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
GOOD = 3  # the word that people like: the answer that has more of it is the better one


def preferences(rows=8, seed=0, prompt=2, longest=8, padding=0):
    """Prompts of two words and pairs of answers unlike in how often they say w3; the margin is by how much."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    while len(pairs) < rows:
        question = torch.randint(0, 27, (prompt,), generator=generator)
        answers = []
        for length in torch.randint(1, longest + 1, (2,), generator=generator).tolist():
            answer = torch.randint(0, 27, (length,), generator=generator)
            answers.append(answer.where(torch.rand(length, generator=generator) > 0.3, GOOD))
        answers.sort(key=lambda answer: -(answer == GOOD).sum())
        margin = (answers[0] == GOOD).sum() - (answers[1] == GOOD).sum()
        if margin > 1:
            pairs.append((margin, *[torch.cat([question, answer]) for answer in answers]))
    width = prompt + longest + padding
    sides = []
    for side in (1, 2):
        mask = torch.stack([torch.arange(width) < len(pair[side]) for pair in pairs])
        tokens = torch.full((rows, width), 29)
        tokens[mask] = torch.cat([pair[side] for pair in pairs])
        sides.append((tokens, mask, mask.sum(dim=1) - prompt))
    (chosen, chosen_mask, chosen_length), (rejected, rejected_mask, rejected_length) = sides
    margin = torch.stack([pair[0] for pair in pairs]).float()
    return PreferenceBatch(chosen, chosen_mask, rejected, rejected_mask, margin, chosen_length, rejected_length)


@torch.no_grad()
def one_by_one(model, batch):
    """Scores [2, B] of texts alone, so that nothing is padded."""
    sides = (batch.chosen_tokens, batch.chosen_mask), (batch.rejected_tokens, batch.rejected_mask)
    return torch.stack(
        [
            torch.cat([model(input_ids=row[keep][None]).logits[0] for row, keep in zip(*side, strict=True)])
            for side in sides
        ]
    )


def texts(tokens, mask):
    return [" ".join(f"w{token}" for token in row[keep]) for row, keep in zip(tokens, mask, strict=True)]


def evaluating(module):
    module.model.eval()
    return module


@pytest.mark.parametrize("margin_weight", [0.0, 0.5])
@pytest.mark.parametrize("source", ["gpt2", "bert", "folder", "lora"])
def test_the_loss_by_hand(toy, source, margin_weight):
    torch.manual_seed(0)
    sources = {
        "gpt2": ModelSource(architecture=GPT2, tokenizer=toy.folder),
        "bert": ModelSource(architecture=BERT, tokenizer=toy.folder),
        "folder": toy.source(),
        "lora": toy.source(lora=True),
    }
    module = evaluating(PreferenceModel(sources[source], margin_weight))
    batch = preferences(padding=3)
    chosen, rejected = one_by_one(module.model, batch).double().numpy()
    gap = chosen - rejected - margin_weight * batch.margin.numpy()
    assert np.abs(gap).max() > 0.05
    with torch.no_grad():
        loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(np.log1p(np.exp(-gap)).mean(), rel=1e-4)


def test_a_policy_becomes_a_reward_model(toy):
    """All its weights are the policy's but the head, which is new."""
    module = PreferenceModel(toy.source())
    policy = toy.plain_model().transformer.state_dict()
    assert all(torch.equal(policy[name], value) for name, value in module.model.transformer.state_dict().items())
    assert module.model.score.weight.shape == (1, 16) and module.model.config.num_labels == 1


def test_lora_trains_the_adapter_and_the_head(toy, tmp_path):
    module = PreferenceModel(toy.source(lora=True), optimizer=AdamWConfig(learning_rate=1e-2, warmup=0))
    before = {name: parameter.detach().clone() for name, parameter in module.model.named_parameters()}
    toy.trainer(tmp_path).fit(module, toy.loader([preferences(seed=seed) for seed in range(3)]))
    moved = {n for n, parameter in module.model.named_parameters() if not torch.equal(before[n], parameter)}
    assert moved == set(module.shadowed_parameters())
    assert all("lora_" in name or "score.modules_to_save" in name for name in moved)
    assert any("score.modules_to_save" in name for name in moved) and any("lora_B" in name for name in moved)


def fitted(toy, folder, lora=False, **options):
    torch.manual_seed(0)
    source = ModelSource(toy.folder, lora=LoRA(rank=8, alpha=16.0) if lora else None)
    module = PreferenceModel(source, optimizer=AdamWConfig(learning_rate=1e-2, warmup=5))
    disable_dropout(module.model)  # so small a model loses too much by it
    trainer = toy.trainer(folder, max_epochs=2, **options)
    held_out = [preferences(rows=30, seed=100), preferences(rows=7, seed=101)]
    trainer.fit(module, toy.loader([preferences(rows=48, seed=seed) for seed in range(20)]), toy.loader(held_out))
    return evaluating(module), trainer, held_out


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_learns_and_is_saved_with_its_normalisation(toy, tmp_path, lora, read_events):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    module, trainer, held_out = fitted(toy, tmp_path, lora, logger=logger)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert measured["val/accuracy"] > 0.9
    curves = read_events(logger.log_dir)
    assert curves["train/loss"][-1][1] < 0.5 * curves["train/loss"][0][1] and curves["train/accuracy"][-1][1] > 0.9

    chosen, rejected = torch.cat([one_by_one(module.model, batch) for batch in held_out], dim=1)
    right = (chosen > rejected).sum().item()
    assert measured["val/accuracy"] == pytest.approx(right / 37)
    low, high = wilson_interval(right, 37)
    assert (measured["val/accuracy_low"], measured["val/accuracy_high"]) == pytest.approx((low, high))
    assert measured["val/loss"] == pytest.approx(np.log1p(np.exp(rejected.numpy() - chosen.numpy())).mean(), rel=1e-3)
    lengths = [torch.cat([getattr(batch, f"{side}_length") for batch in held_out]) for side in ("chosen", "rejected")]
    correlation = np.corrcoef(torch.cat([chosen, rejected]), torch.cat(lengths))[0, 1]
    assert measured["val/length_correlation"] == pytest.approx(correlation, abs=1e-4)
    assert set(measured) >= {"val/calibration_error", "val/confidence", "val/accuracy_longest", "val/pairs"}

    for adapter in ("merged", "adapter") if lora else ("merged",):
        folder = tmp_path / adapter
        module.save_pretrained(folder, adapter=adapter)
        assert json.loads((folder / "reward_normalization.json").read_text()) == pytest.approx(
            {"mean": chosen.mean().item(), "deviation": chosen.std(correction=0).item()}, rel=1e-4
        )
        reward = PreferenceReward(str(folder))
        answers = [text for batch in held_out for text in texts(batch.chosen_tokens, batch.chosen_mask)]
        scores = reward(answers, [""] * len(answers))
        assert scores.mean().item() == pytest.approx(0, abs=1e-4)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
        raw = PreferenceReward(str(folder), normalise=False)(answers, [""] * len(answers))
        torch.testing.assert_close(raw, chosen, atol=1e-4, rtol=1e-4)


def test_test_logs_the_same(toy, tmp_path):
    module = PreferenceModel(toy.source())
    trainer, batches = toy.trainer(tmp_path), [preferences(seed=3), preferences(rows=3, seed=4)]
    trainer.test(module, toy.loader(batches), verbose=False)
    tested = {name.split("/")[1]: float(value) for name, value in trainer.callback_metrics.items()}
    assert module.normalization is None  # tests set nothing
    trainer.validate(module, toy.loader(batches), verbose=False)
    validated = {name.split("/")[1]: float(value) for name, value in trainer.callback_metrics.items()}
    assert tested == pytest.approx(validated, nan_ok=True) and tested["pairs"] == 11
    assert module.normalization.mean == pytest.approx(validated["chosen_score_mean"])


def test_without_a_validation_nothing_is_normalised(toy, tmp_path):
    module = PreferenceModel(toy.source())
    trainer = toy.trainer(tmp_path, num_sanity_val_steps=1, limit_val_batches=1, check_val_every_n_epoch=5)
    trainer.fit(module, toy.loader([preferences()]), toy.loader([preferences()]))  # a sanity check is none
    module.save_pretrained(tmp_path / "final")
    assert not (tmp_path / "final" / "reward_normalization.json").exists()
    assert PreferenceReward(str(tmp_path / "final")).normalization is None


def test_training_beyond_the_last_validation_is_told(toy, tmp_path, recwarn):
    module = PreferenceModel(toy.source())
    batches = [preferences(seed=seed) for seed in range(3)]
    toy.trainer(tmp_path, val_check_interval=2).fit(module, toy.loader(batches), toy.loader(batches))
    module.save_pretrained(tmp_path / "final")
    assert any("normalisation is of the last validation" in str(warning.message) for warning in recwarn)
    recwarn.clear()
    toy.trainer(tmp_path).validate(module, toy.loader(batches), verbose=False)
    module.save_pretrained(tmp_path / "final")
    assert not any("normalisation" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("validated", [False, True])
def test_checkpoints_keep_the_normalisation(toy, tmp_path, validated):
    module = PreferenceModel(toy.source(lora=True), 0.5, AdamWConfig(betas=(0.5, 0.6)))
    trainer = toy.trainer(tmp_path)
    trainer.fit(module, toy.loader([preferences()]), toy.loader([preferences()]) if validated else None)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name or ".score." in name for name in saved)  # the base lies in its folder
    loaded = PreferenceModel.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert loaded.normalization == module.normalization and (loaded.normalization is not None) == validated
    assert loaded.normalization_is_stale is not validated
    assert (loaded.margin_weight, loaded.optimizer_config) == (0.5, module.optimizer_config)
    batch = preferences(seed=1)
    with torch.no_grad():
        torch.testing.assert_close(evaluating(loaded).scores(batch), evaluating(module).scores(batch))


def test_a_pad_token_without_an_embedding(toy, tmp_path):
    """One that was given to the tokenizer after the language model was trained, as most language models have it."""
    folder = tmp_path / "policy"
    toy.plain_model().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(toy.folder)
    tokenizer.pad_token = "<added>"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    module = evaluating(PreferenceModel(ModelSource(str(folder))))
    assert module.tokenizer.pad_token_id == 30 == module.model.get_input_embeddings().num_embeddings
    batch = preferences(padding=2)
    with torch.no_grad():
        scores = torch.stack(module.scores(batch))
    torch.testing.assert_close(scores, one_by_one(module.model, batch), atol=1e-5, rtol=1e-4)

    module.save_pretrained(tmp_path / "final")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").config.pad_token_id
    assert saved == AutoTokenizer.from_pretrained(tmp_path / "final").pad_token_id == 29  # for padded batches elsewhere
    assert module.model.config.pad_token_id == 30  # training may go on
    answers = texts(batch.chosen_tokens, batch.chosen_mask)
    torch.testing.assert_close(PreferenceReward(str(tmp_path / "final"))(answers, [""] * 8), scores[0])


def test_wrong_models_and_options(toy, tmp_path):
    with pytest.raises(UserError, match="margin_weight must be 0 or more, got -1"):
        PreferenceModel(toy.source(), margin_weight=-1.0)
    adapted = PreferenceModel(toy.source(lora=True))
    adapted.save_pretrained(tmp_path / "adapter", adapter="adapter")
    with pytest.raises(UserError, match="unmerged adapter"):
        PreferenceModel(ModelSource(str(tmp_path / "adapter")))
    GPT2ForSequenceClassification.from_pretrained(toy.folder, num_labels=3).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(toy.folder).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match=r"cannot load the model from .*three"):
        PreferenceModel(ModelSource(str(tmp_path / "three")))


def test_equal_scores_everywhere_cannot_be_normalised(toy, tmp_path):
    module = PreferenceModel(toy.source())
    torch.nn.init.zeros_(module.model.score.weight)
    trainer = toy.trainer(tmp_path)
    trainer.validate(module, toy.loader([preferences()]), verbose=False)
    assert trainer.callback_metrics["val/accuracy"] == 0.5 and module.normalization is None
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(math.log(2))


def test_gradients_of_two_halves_make_the_whole(toy, tmp_path):
    whole, gradients = preferences(rows=8), []
    halves = [PreferenceBatch(*(column[part] for column in whole)) for part in (slice(0, 4), slice(4, 8))]
    for batches in ([whole], halves):
        torch.manual_seed(0)
        module = PreferenceModel(toy.source(), margin_weight=0.5)
        disable_dropout(module.model)
        module.on_before_optimizer_step = lambda _, m=module: gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in m.model.parameters()])
        )
        toy.trainer(tmp_path, accumulate_grad_batches=len(batches)).fit(module, toy.loader(batches))
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_what_is_trained_on_a_base_in_half_precision_is_held_whole(toy, tmp_path):
    """In bfloat16 a step of 2e-5 on a weight of 0.02 is rounded away."""
    source = ModelSource(toy.folder, dtype="bfloat16", lora=LoRA(rank=2, alpha=4.0))
    module = PreferenceModel(source, optimizer=AdamWConfig(learning_rate=2e-5, warmup=0))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and any("score" in name for name in trained)
    assert torch.bfloat16 in {p.dtype for p in module.parameters()}
    before = {name: p.detach().clone() for name, p in trained.items() if "score" in name}
    toy.trainer(tmp_path).fit(module, toy.loader([preferences()]))
    for name, head in before.items():
        assert (trained[name] != head).float().mean() > 0.9
    module.save_pretrained(tmp_path / "final")
    assert all(math.isfinite(score) for score in PreferenceReward(str(tmp_path / "final"))(["w3"], [" w5"]).tolist())
