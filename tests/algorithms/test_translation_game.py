"""The translation game on random models of the toy languages, against plain transformers."""

import pytest
import torch
from lightning import Trainer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from elastic_lightning import ElasticReset
from elastic_lightning.algorithms import PPOConfig, TranslationGame
from elastic_lightning.data import (
    ToyEnglishAcceptance,
    ToyMeaning,
    ToyTranslationDataModule,
    ToyTranslationGameDataModule,
)
from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource, PairedTexts, Sampling, load_policy

SIZE = {"model_type": "marian", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
SIZE |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
SIZE |= {"max_position_embeddings": 48, "dropout": 0.1}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a random sender and a random receiver."""
    words = str(tmp_path_factory.mktemp("words"))
    ToyTranslationDataModule().train_tokenizer(0).save_pretrained(words)
    folders = []
    for seed, name in enumerate(("sender", "receiver")):
        torch.manual_seed(seed)
        loaded = load_policy(architecture=SIZE, tokenizer=words)
        folders.append(str(tmp_path_factory.mktemp(name)))
        loaded.model.save_pretrained(folders[-1])
        loaded.tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def game(models):
    def build(receiver=None, **options) -> TranslationGame:
        ppo = PPOConfig(
            **{"epochs": 1, "mini_batches": 1, "learning_rate": 1e-3, "adam_eps": 1e-4} | options.pop("ppo", {})
        )
        defaults = {"receiver_learning_rate": 1e-3, "sampling": Sampling(max_new_tokens=8), "seed": 0}
        return TranslationGame(
            ModelSource(models[0]), receiver or ModelSource(models[1]), ppo, **{**defaults, **options}
        )

    return build


def world(models, batches=2, supervised=False, **options):
    pairs = {
        "fr_en": ToyTranslationDataModule(train_pairs=64, source="fr", target="en", batch_size=4, eval_pairs=8),
        "en_de": ToyTranslationDataModule(train_pairs=64, source="en", target="de", batch_size=4, eval_pairs=8),
    }
    options = {"batch_size": 8, "eval_batch_size": 8, "eval_pairs": 16, "max_prompt_tokens": 40} | options
    return ToyTranslationGameDataModule(
        train_pairs=8 * batches + 4, max_target_tokens=40, **options, **(pairs if supervised else {})
    )


def fit(module, data, root, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": 1, "limit_val_batches": 0}
    trainer = Trainer(default_root_dir=root, use_distributed_sampler=False, **defaults | options)
    trainer.fit(module, datamodule=data)
    return trainer


def first_batch(module, data):
    """A training batch, outside a Trainer."""
    data.trainer = type("T", (), {"lightning_module": module, "global_rank": 0, "world_size": 1})()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return batch[0] if isinstance(batch, tuple) and not isinstance(batch, PairedTexts) else batch


@torch.no_grad()
@pytest.mark.parametrize("normalise", [True, False])
def test_the_reward_is_the_receivers_likelihood(models, game, normalise):
    module = game(normalise_reward=normalise)
    batch = first_batch(module, world(models))
    rollout = module.sample(batch.source, step=0)
    texts, scores = module.score_batch(batch, rollout.responses)
    plain, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(models[1]).eval(), module.receiver.tokenizer
    for row, english in enumerate(texts.responses):
        source = torch.tensor([[*tokenizer(english)["input_ids"], tokenizer.eos_token_id]])
        german = batch.target.tokens[row][batch.target.mask[row]]
        inputs = torch.cat([torch.tensor([plain.config.decoder_start_token_id]), german[:-1]])[None]
        logits = plain(input_ids=source, decoder_input_ids=inputs).logits[0]
        expected = -cross_entropy(logits, german, reduction="mean" if normalise else "sum")
        assert scores.total[row].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_both_learn_and_micro_batches_are_one_batch(models, game, tmp_path, micro):
    found = []
    for size in (None, micro):
        module = game(ppo={"micro_batch_size": size})
        start = [parameter.detach().clone() for parameter in module.receiver.parameters()]
        metrics = fit(module, world(models, batches=1), tmp_path).callback_metrics
        assert metrics["train/first_ratio_deviation"] < 1e-5
        found.append(
            [parameter.detach().clone() for parameter in (*module.actor.parameters(), *module.receiver.parameters())]
        )
        assert any(not torch.equal(a, b) for a, b in zip(start, module.receiver.parameters(), strict=True))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, one, atol=1e-6, rtol=1e-5)


def test_the_receivers_gradient_is_cross_entropy_on_what_was_sampled(models, game, tmp_path):
    module = game(ppo={"max_grad_norm": None})
    seen = {}

    def keep(optimizer):
        seen["gradients"] = {
            n: p.grad.clone() for n, p in module.receiver.lm.model.named_parameters() if p.requires_grad
        }

    lesson = module.lesson
    module.lesson = lambda batch, texts: seen.setdefault("pairs", lesson(batch, texts))
    module.on_before_optimizer_step = keep
    metrics = fit(module, world(models, batches=1), tmp_path).callback_metrics
    plain = AutoModelForSeq2SeqLM.from_pretrained(models[1]).eval()
    total, tokens = 0.0, int(seen["pairs"].target.mask.sum())
    for row in range(8):
        source = seen["pairs"].source.tokens[row][seen["pairs"].source.mask[row]]
        german = seen["pairs"].target.tokens[row][seen["pairs"].target.mask[row]]
        inputs = torch.cat([torch.tensor([plain.config.decoder_start_token_id]), german[:-1]])[None]
        logits = plain(input_ids=source[None], decoder_input_ids=inputs).logits[0]
        total = total + cross_entropy(logits, german, reduction="sum") / tokens
    total.backward()
    assert metrics["train/receiver_loss"] == pytest.approx(total.item(), abs=1e-5)
    for name, gradient in seen["gradients"].items():
        torch.testing.assert_close(gradient, dict(plain.named_parameters())[name].grad, atol=1e-5, rtol=1e-4)


def moved(module, start):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, start[name])}


@pytest.mark.parametrize(
    ("options", "learners"),
    [
        ({}, {"actor.lm", "receiver.lm"}),
        ({"freeze_sender": True}, {"receiver.lm"}),
        ({"receiver_learning_rate": None}, {"actor.lm"}),
    ],
)
def test_who_learns(models, game, tmp_path, options, learners):
    module = game(**options)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(module, world(models), tmp_path)
    assert {".".join(name.split(".")[:2]) for name in moved(module, start)} - {"actor.value_head"} == learners
    assert set(module.shadowed_parameters()) == {
        name.replace("actor.lm.", "sender.").replace("receiver.lm.", "receiver.")
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and "value_head" not in name
    }


def test_supervised_pairs_join_every_step(models, game, tmp_path):
    module = game()
    batch = first_batch(module, world(models, supervised=True))
    losses = {}
    for name, folder in zip(("fr_en", "en_de"), models, strict=True):
        plain, pairs = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), batch[name]
        nll = 0.0
        for row in range(4):
            source, target = (
                pairs.source.tokens[row][pairs.source.mask[row]],
                pairs.target.tokens[row][pairs.target.mask[row]],
            )
            inputs = torch.cat([torch.tensor([plain.config.decoder_start_token_id]), target[:-1]])[None]
            nll += cross_entropy(
                plain(input_ids=source[None], decoder_input_ids=inputs).logits[0], target, reduction="sum"
            )
        losses[name] = (nll / pairs.target.mask.sum()).item()
    metrics = fit(game(), world(models, batches=1, supervised=True), tmp_path).callback_metrics
    for name, loss in losses.items():
        assert metrics[f"train/supervised_{name}_loss"] == pytest.approx(loss, abs=1e-4)
    one = fit(game(freeze_sender=True), world(models, batches=1, supervised=True), tmp_path).callback_metrics
    assert "train/supervised_en_de_loss" in one and "train/supervised_fr_en_loss" not in one
    weights = []
    for weight in (0.0, 1.0):
        module = game(supervised_weight=weight)
        fit(module, world(models, batches=1, supervised=True), tmp_path)
        weights.append([parameter.detach().clone() for parameter in module.actor.lm.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("parts", [["sender.*"], ["receiver.*"], None])
def test_elastic_reset_of_one_or_both(models, game, tmp_path, parts):
    module, callback = game(), ElasticReset(every=2, decay=1.0, parameters=parts)  # the average stays at the start
    start = {name: parameter.detach().clone() for name, parameter in module.shadowed_parameters().items()}
    fit(module, world(models), tmp_path, callbacks=[callback])
    back = {name for name, parameter in module.shadowed_parameters().items() if torch.equal(parameter, start[name])}
    names = {name for name in start if parts is None or name.startswith(parts[0][:-1])}
    assert back == (set(start) if parts is None else names)


def test_a_resumed_game_is_the_game(models, game, tmp_path):
    whole, resumed = game(), game()
    fit(whole, world(models), tmp_path, max_epochs=2)
    fit(game(), world(models), tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0, **options)
    trainer.fit(resumed, datamodule=world(models), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, parameter in whole.named_parameters():
        assert torch.equal(dict(resumed.named_parameters())[name], parameter), name


def test_validation_is_what_sacrebleu_says_of_the_samples(models, game, tmp_path):
    from sacrebleu import corpus_bleu

    module, rows = game(metrics=[ToyEnglishAcceptance(), ToyMeaning()]), []
    step = module.validation_step
    module.validation_step = lambda *args: rows.extend(step(*args))
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, **options)
    (values,) = trainer.validate(module, datamodule=world(models), verbose=False)
    assert len(rows) == 16
    for tag, column, reference in (
        ("bleu_message", "message", "human_message"),
        ("bleu_task", "translation", "reference"),
    ):
        said, wanted = [row[column] for row in rows], [row[reference] for row in rows]
        assert values[f"val/{tag}"] == pytest.approx(corpus_bleu(said, [wanted], lowercase=True).score, abs=1e-3)
    assert values["val/kl"] == pytest.approx(0, abs=1e-5)
    assert 0 <= values["val/frequency_divergence"] <= 0.6932
    assert values["val/toy_english"] == 0 <= values["val/toy_meaning"] < 0.2
    assert len({row["reference"] for row in rows}) > 8


def test_what_is_saved_can_be_loaded(models, game, tmp_path):
    module = game()
    module.save_pretrained(tmp_path)
    for name, folder in zip(("sender", "receiver"), models, strict=True):
        saved, plain = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (tmp_path / name, folder))
        assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), plain.parameters(), strict=True))


def test_wrong_games(game, tmp_path):
    with pytest.raises(UserError, match="receiver_learning_rate"):
        game(receiver_learning_rate=0.0)
    with pytest.raises(UserError, match="supervised_weight"):
        game(supervised_weight=-1.0)
