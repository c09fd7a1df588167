"""Language and reward models: losses against Hugging Face's own, schedules by hand, and that they learn."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from elastic_lightning.algorithms import AdamWConfig, LabelledTexts, LanguageModel, RewardModel
from elastic_lightning.algorithms.schedules import schedule_factor
from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def blocks(seed=0, rows=5, length=12):
    return torch.randint(0, 27, (rows, length), generator=torch.Generator().manual_seed(seed))


def labelled(rows=16, seed=0, length=8, padding=0):
    """Label 1 where the first word is one of the first 13."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 27, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    mask = torch.arange(length + padding) < lengths[:, None]
    tokens = torch.nn.functional.pad(tokens, (0, padding)).masked_fill(~mask, 29)
    return LabelledTexts(tokens, mask, (tokens[:, 0] < 13).long())


def test_schedule_factor_by_hand():
    warm = [schedule_factor("constant", step, 4, 10) for step in range(7)]
    assert warm == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert [schedule_factor("constant", step, 0, 10) for step in (0, 10, 99)] == [1.0, 1.0, 1.0]
    assert [schedule_factor("linear", step, 2, 6) for step in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    cosine = [schedule_factor("cosine", step, 0, 4) for step in range(6)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2, 0, 0])
    assert schedule_factor("linear", 5, 5, 5) == 1.0  # no batch left after the warm-up: no division by zero
    assert schedule_factor("cosine", 1000, 0, math.inf) == 1.0


@pytest.mark.parametrize("options", [{"learning_rate": 0.0}, {"schedule": "cosin"}])
def test_bad_options_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"optimizer.{name}"):
        AdamWConfig(**options)


def test_an_encoder_decoder_is_no_language_model(t5_folder):
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder: see TranslationModel"):
        LanguageModel(ModelSource(t5_folder))


def test_the_loss_is_hugging_faces(toy):
    module = LanguageModel(ModelSource(toy.folder))
    assert module.model.training  # supervised training keeps its dropout
    module.model.eval()
    tokens = blocks()
    torch.testing.assert_close(module.training_step(tokens, 0), module.model(tokens, labels=tokens).loss)


def test_perplexity_is_that_of_a_loop(toy, tmp_path):
    module = LanguageModel(ModelSource(toy.folder))
    data = [blocks(seed, rows) for seed, rows in ((0, 5), (1, 2))]  # batches of unlike size weigh by their tokens
    trainer = toy.trainer(tmp_path)
    trainer.validate(module, toy.loader(data), verbose=False)
    nll, model = [], toy.plain_model()
    for row in torch.cat(data):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(row[None]).logits[0], -1)
        nll += [-logprobs[position, token].item() for position, token in enumerate(row[1:].tolist())]
    expected = math.exp(sum(nll) / len(nll))
    assert trainer.callback_metrics["val/perplexity"] == pytest.approx(expected, rel=1e-5)
    trainer.test(module, toy.loader(data), verbose=False)
    assert trainer.callback_metrics["test/perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_language_model_learns_and_is_saved(toy, tmp_path, read_events):
    torch.manual_seed(0)
    config = AdamWConfig(learning_rate=1e-2, warmup=5)
    module = LanguageModel(ModelSource(architecture=GPT2, tokenizer=toy.folder), config)
    text = (torch.arange(12) + torch.arange(8)[:, None]) % 27  # each word is followed by the next
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = toy.trainer(tmp_path, max_epochs=3, logger=logger)
    trainer.fit(module, toy.loader([text] * 20), toy.loader([text]))
    curves = read_events(logger.log_dir)
    assert curves["train/loss"][0][1] > 3 and curves["train/loss"][-1][1] < 1
    perplexities = [value for _, value in curves["val/perplexity"]]
    assert perplexities[-1] < perplexities[0] and perplexities[-1] < 3
    module.save_pretrained(tmp_path / "final")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    module.model.eval()
    torch.testing.assert_close(model(text).logits, module.model(text).logits)


def test_the_rate_follows_the_schedule(toy, tmp_path):
    config = AdamWConfig(learning_rate=1e-2, schedule="linear", warmup=2)
    module = LanguageModel(ModelSource(toy.folder), config)
    rates = []
    module.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer = toy.trainer(tmp_path, max_epochs=2)
    trainer.fit(module, toy.loader([blocks()] * 3))
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])


def test_biases_and_norms_do_not_decay(toy, tmp_path):
    module = LanguageModel(ModelSource(toy.folder), AdamWConfig(weight_decay=0.1))
    trainer = toy.trainer(tmp_path)
    trainer.fit(module, toy.loader([blocks()]))
    decay = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or ".ln_" in name else 0.1), name


def test_blocks_beyond_the_context_are_refused(toy, tmp_path):
    from lightning import LightningDataModule

    class Data(LightningDataModule):
        block_size = 64

        def train_dataloader(self):
            return toy.loader([blocks(length=64)])

    with pytest.raises(UserError, match="block_size 64"):
        toy.trainer(tmp_path).fit(LanguageModel(ModelSource(toy.folder)), datamodule=Data())


@pytest.mark.parametrize("architecture", [GPT2, BERT], ids=["gpt2", "bert"])
def test_padding_changes_no_logit(toy, architecture):
    torch.manual_seed(0)
    module = RewardModel(ModelSource(architecture=architecture | {"initializer_range": 0.5}, tokenizer=toy.folder))
    module.model.eval()
    batch = labelled(rows=6, padding=3)
    with torch.no_grad():
        padded = module._logits(batch)
        alone = torch.cat([module.model(tokens[mask][None]).logits for tokens, mask, _ in zip(*batch, strict=True)])
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_decoder_without_a_pad_token_scores_batches(word_tokenizer, tmp_path):
    """Transformers' classifiers look for the last token that is no padding, and know of none here."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=30)).save_pretrained(tmp_path)
    word_tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
    module = RewardModel(ModelSource(str(tmp_path)))
    module.model.score.weight.normal_()
    batch = labelled(rows=6, padding=3)
    module.save_pretrained(tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    alone = torch.cat([plain(tokens[mask][None]).logits for tokens, mask, _ in zip(*batch, strict=True)])
    torch.testing.assert_close(module.eval()._logits(batch), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", [GPT2, BERT], ids=["gpt2", "bert"])
def test_a_reward_model_learns_and_is_saved(toy, tmp_path, architecture, read_events):
    torch.manual_seed(0)
    config = AdamWConfig(learning_rate=1e-2, warmup=5)
    module = RewardModel(ModelSource(architecture=architecture, tokenizer=toy.folder), ["bad", "good"], config)
    train = [labelled(seed=seed, rows=32) for seed in range(20)]
    held_out = [labelled(seed=100, rows=30), labelled(seed=101, rows=7)]
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = toy.trainer(tmp_path, max_epochs=4, logger=logger)
    trainer.fit(module, toy.loader(train), toy.loader(held_out))
    curves = read_events(logger.log_dir)
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1]
    module.model.eval()
    with torch.no_grad():
        logits = torch.cat([module._logits(batch) for batch in held_out])
    labels = torch.cat([batch.labels for batch in held_out])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert trainer.callback_metrics["val/accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert trainer.callback_metrics["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert accuracy > 0.8

    module.save_pretrained(tmp_path / "final")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final").eval()
    assert saved.config.id2label == {0: "bad", 1: "good"} and saved.config.label2id == {"bad": 0, "good": 1}

    from elastic_lightning.rewards import ClassifierReward

    texts = [" ".join(f"w{token}" for token in row[mask]) for row, mask, _ in zip(*held_out[0], strict=True)]
    scores = ClassifierReward(str(tmp_path / "final"), label="good", batch_size=4)(texts, [""] * len(texts))
    torch.testing.assert_close(scores, logits[:30].softmax(1)[:, 1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", [LanguageModel, RewardModel])
def test_checkpoints_load_with_weights_only(toy, tmp_path, kind):
    source = ModelSource(architecture=GPT2, tokenizer=toy.folder)
    module = kind(source, optimizer=AdamWConfig(betas=(0.5, 0.6)))
    trainer = toy.trainer(tmp_path)
    trainer.fit(module, toy.loader([blocks() if kind is LanguageModel else labelled()]))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert loaded.optimizer_config == module.optimizer_config
    ours = dict(loaded.model.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in module.model.named_parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(toy, tmp_path, precision):
    module = LanguageModel(ModelSource(toy.folder), AdamWConfig(learning_rate=1e-3))
    norms = []
    module.on_before_zero_grad = lambda optimizer: norms.append(
        torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    )
    toy.trainer(tmp_path, precision=precision, gradient_clip_val=0.01).fit(module, toy.loader([blocks()] * 3))
    clipped = [float(norm) for norm in norms if norm > 0]
    assert clipped and max(clipped) == pytest.approx(0.01, rel=0.01)


# A gradient that is not finite


class Poison(Callback):
    """Makes one gradient NaN at the given steps, and keeps the weights and Adam's moments around each step."""

    def __init__(self, *steps):
        self.steps, self.states = steps, []

    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.steps:
            next(module.parameters()).grad[0] = math.nan

    def on_train_batch_end(self, trainer, module, *_):
        weights = [parameter.detach().clone() for parameter in module.parameters()]
        states = trainer.optimizers[0].state.values()
        self.states.append(weights + [value.clone() for state in states for value in state.values()])


def test_a_step_of_a_gradient_that_is_not_finite_is_not_taken(toy, tmp_path):
    module, poison = LanguageModel(ModelSource(toy.folder), AdamWConfig(warmup=0)), Poison(1, 2)
    trainer = toy.trainer(tmp_path, callbacks=[poison])
    line = r"optimizer step 2 is skipped, its gradient is not finite: norm nan, where the loss is [34]\."
    with pytest.warns(UserWarning, match=line) as told:
        trainer.fit(module, toy.loader([blocks(seed) for seed in range(5)]))
    assert sum("is skipped" in str(warning.message) for warning in told) == 2
    first, second, third, fourth, _ = poison.states
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(third, fourth, strict=True))
    assert all(value.isfinite().all() for value in poison.states[-1])
    assert trainer.callback_metrics["fault/gradient"] == 2
    assert not module.batch_skipped


def test_too_many_skipped_steps_stop_the_run(toy, tmp_path):
    module = LanguageModel(ModelSource(toy.folder), AdamWConfig(max_skipped=1))
    with pytest.raises(UserError, match=r"step 3 is skipped.*gradient 2; optimizer.max_skipped is 1"):
        toy.trainer(tmp_path, callbacks=[Poison(1, 2)]).fit(module, toy.loader([blocks()] * 5))
    with pytest.raises(UserError, match="max_skipped"):
        AdamWConfig(max_skipped=-1)


def test_a_resumed_run_gets_no_fresh_allowance(toy, tmp_path):
    module, other = (LanguageModel(ModelSource(toy.folder)) for _ in range(2))
    trainer = toy.trainer(tmp_path, callbacks=[Poison(0)])
    with pytest.warns(UserWarning, match="step 1 is skipped"):
        trainer.fit(module, toy.loader([blocks()]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    toy.trainer(tmp_path).validate(other, toy.loader([blocks()]), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert other.faults.scalars() == {"fault/gradient": 1.0}
