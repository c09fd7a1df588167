"""Sequence-to-sequence training: losses against torch's padded ones, decoding against loops, and that it learns."""

import math
import random

import pytest
import sacrebleu
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from elastic_lightning.algorithms import AdamWConfig, TranslationModel
from elastic_lightning.errors import UserError
from elastic_lightning.policies import LoRA, ModelSource, PairedTexts, Prompts, Responses, TranslationBatch

EOS, PAD, UNK = 28, 29, 27  # of the toy tokenizer
BART_LIKE = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 24,
}
MARIAN = {"model_type": "marian", "scale_embedding": True, "init_std": 0.3} | BART_LIKE
BART = {"model_type": "bart", "init_std": 0.3} | BART_LIKE
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
ARCHITECTURES = pytest.mark.parametrize("architecture", [MARIAN, BART, T5], ids=["marian", "bart", "t5"])


def build(toy, architecture=MARIAN, seed=0, **options):
    """A module from random weights, each of them away from its start."""
    torch.manual_seed(seed)
    module = TranslationModel(ModelSource(architecture=architecture, tokenizer=toy.folder), **options)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:  # Marian's positions are a function of theirs, and no checkpoint keeps them
                parameter += 0.05 * torch.randn_like(parameter)
        if hasattr(module.model, "final_logits_bias"):
            module.model.final_logits_bias.normal_()
        module.model.get_input_embeddings().weight[PAD] = 0  # as Marian's padding is
    return module


def pairs_of(sources, targets, extra=0):
    """Sources padded on the left to the longest and `extra` more; targets with eos, padded at the end."""
    length = max(map(len, sources)) + extra
    tokens = torch.tensor([[PAD] * (length - len(row)) + row for row in sources])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in sources])
    rows = [torch.tensor([*row, EOS]) for row in targets]
    target_mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    target = Responses(pad_sequence(rows, batch_first=True, padding_value=PAD), target_mask)
    return PairedTexts(Prompts(tokens, mask), target)


def sequences(rows=7, seed=0, longest=6, words=27):
    luck = random.Random(seed)
    return [[luck.randrange(words) for _ in range(luck.randint(1, longest))] for _ in range(rows)]


def text(row):
    return " ".join(f"w{token}" for token in row)


def reversal(rows, seed, longest=5, words=8, batch=False):
    """Sequences and their reversals; as a `TranslationBatch` for validation."""
    sources = sequences(rows, seed, longest, words)
    pairs = pairs_of(sources, [row[::-1] for row in sources])
    return TranslationBatch(pairs, [text(row[::-1]) for row in sources]) if batch else pairs


@ARCHITECTURES
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_the_padded_one(toy, architecture, smoothing):
    module = build(toy, architecture, label_smoothing=smoothing)
    assert module.model.training  # supervised training keeps its dropout
    model = module.model.eval()
    sources, targets = sequences(seed=1), sequences(seed=2)
    loss = module.training_step(pairs_of(sources, targets, extra=3), 0)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in module.shadowed_parameters().items()}

    model.zero_grad()
    inputs = pad_sequence([torch.tensor(row) for row in sources], batch_first=True, padding_value=PAD)
    labels = pad_sequence([torch.tensor([*row, EOS]) for row in targets], batch_first=True, padding_value=-100)
    output = model(input_ids=inputs, attention_mask=(inputs != PAD).long(), labels=labels)
    if smoothing == 0:
        torch.testing.assert_close(loss, output.loss)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, ignore_index=-100)
    padded = criterion(output.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, padded)
    padded.backward()
    for name, parameter in module.shadowed_parameters().items():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_no_logit_is_made_at_padding(toy):
    module, pairs = build(toy), pairs_of(sequences(seed=1), sequences(seed=2))
    seen = []
    module.model.lm_head.register_forward_hook(lambda head, args, output: seen.append(output.shape))
    assert module._logits(pairs).shape == (pairs.target.mask.sum(), 30)
    assert seen == [(pairs.target.mask.sum(), 30)] and not pairs.target.mask.all()
    source = torch.tensor([[3, 4]])
    assert module.model(input_ids=source, decoder_input_ids=source).logits.shape == (1, 2, 30), "the hook was left"


def greedy(model, source, new_tokens):
    """Greedy decoding of one row by whole forwards."""
    row = [PAD]
    while len(row) <= new_tokens and row[-1] != EOS:
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([row])).logits
        row.append(logits[0, -1].argmax().item())
    return row[1:]


def beam(model, source, new_tokens, size):
    """Beam search over one row: keep the `size` best prefixes, and the best end by log-likelihood a token."""
    prefixes, ended = [(0.0, [PAD])], []
    for length in range(1, new_tokens + 1):
        grown = []
        for score, row in prefixes:
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([row])).logits[0, -1]
            grown += [(score + s, [*row, t]) for t, s in enumerate(torch.log_softmax(logits, -1).tolist())]
        grown = sorted(grown, reverse=True)[: 2 * size]
        best = grown[:size] if length == new_tokens else [g for g in grown[:size] if g[1][-1] == EOS]
        ended += [(score / length, row) for score, row in best]
        prefixes = [g for g in grown if g[1][-1] != EOS][:size]
    return max(ended)[1][1:]


@torch.no_grad()
def test_validation_is_that_of_loops(toy, tmp_path):
    module = build(toy, MARIAN | {"tie_word_embeddings": False}, max_new_tokens=8, beam_size=3)
    model = module.model.eval()
    with torch.no_grad():
        model.final_logits_bias[0, EOS] += 2.5  # that some translations end
    sources, targets = sequences(9, seed=1), sequences(9, seed=2)
    found = {1: [greedy(model, source, 8) for source in sources], 3: [beam(model, source, 8, 3) for source in sources]}
    assert found[1] != found[3] and {EOS in row for row in found[1]} == {True, False}
    found = {size: [text(token for token in row if token < UNK) for row in rows] for size, rows in found.items()}
    references = [f"{translation} w{row}" for row, translation in enumerate(found[1])]  # near, and not the targets
    batches = [
        TranslationBatch(pairs_of(sources[rows], targets[rows], extra=2), references[rows])
        for rows in (slice(0, 6), slice(6, 9))
    ]
    trainer = toy.trainer(tmp_path)
    trainer.test(module, toy.loader(batches), verbose=False)
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert set(values) == {"test/perplexity", "test/bleu_greedy", "test/bleu_beam"}

    nll = []
    for source, target in zip(sources, targets, strict=True):
        before, after = torch.tensor([[PAD, *target]]), [*target, EOS]
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([source]), decoder_input_ids=before).logits[0], -1)
        nll += [-logprobs[place, token].item() for place, token in enumerate(after)]
    assert values["test/perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)

    for size, name in ((1, "greedy"), (3, "beam")):
        assert module.translate(batches[0].pairs.source, size) == found[size][:6]
        truth = sacrebleu.corpus_bleu(found[size], [references], lowercase=True).score
        assert values[f"test/bleu_{name}"] == pytest.approx(truth, abs=1e-4) and 10 < truth < 95


@pytest.mark.parametrize("asked", [False, True])
def test_beam_search_waits_for_the_test(toy, tmp_path, asked, read_events):
    module = build(toy, max_new_tokens=4, beam_size=2, validate_with_beam=asked)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = toy.trainer(tmp_path, logger=logger)
    batch = reversal(4, 0, batch=True)
    trainer.fit(module, toy.loader([batch.pairs]), toy.loader([batch]))
    curves = read_events(logger.log_dir)
    assert {"train/loss", "val/perplexity", "val/bleu_greedy"} <= set(curves)
    assert ("val/bleu_beam" in curves) == asked
    trainer.test(module, toy.loader([batch]), verbose=False)
    assert {"test/perplexity", "test/bleu_greedy", "test/bleu_beam"} <= set(trainer.callback_metrics)
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("events*"))
    assert b"case:lc|eff:no|tok:13a|smooth:exp" in written


def test_a_translation_model_learns_to_reverse_and_is_saved(toy, tmp_path):
    torch.manual_seed(0)
    architecture = MARIAN | {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.1}
    module = TranslationModel(
        ModelSource(architecture=architecture, tokenizer=toy.folder),
        AdamWConfig(learning_rate=5e-3, warmup=20),
        max_new_tokens=8,
    )
    held_out = [reversal(40, 1000, batch=True), reversal(7, 1001, batch=True)]
    before = toy.trainer(tmp_path).validate(module, toy.loader(held_out), verbose=False)[0]
    trainer = toy.trainer(tmp_path)
    trainer.fit(module, toy.loader([reversal(64, seed) for seed in range(400)]), toy.loader(held_out))
    values = trainer.callback_metrics
    assert before["val/bleu_greedy"] < 10 and before["val/perplexity"] > 20
    assert values["val/bleu_greedy"] > 80 and values["val/perplexity"] < 1.3

    module.save_pretrained(tmp_path / "final")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    inputs = {"input_ids": torch.tensor([[3, 1, 4, 1]]), "decoder_input_ids": torch.tensor([[PAD, 1, 4, 1, 3]])}
    torch.testing.assert_close(model(**inputs).logits, module.model.eval()(**inputs).logits)
    read = tokenizer(["w3 w1 w4 w2"], return_tensors="pt")["input_ids"]
    assert tokenizer.batch_decode(model.generate(read, max_new_tokens=8), skip_special_tokens=True) == ["w2 w4 w1 w3"]


@ARCHITECTURES
def test_an_architecture_takes_its_special_tokens_from_the_tokenizer(toy, architecture):
    model = TranslationModel(ModelSource(architecture=architecture, tokenizer=toy.folder)).model
    config = model.config
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (PAD, PAD, EOS)
    assert getattr(config, "forced_eos_token_id", None) is None and config.vocab_size == 30
    shared = {module.weight.data_ptr() for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    shared |= {stack.get_input_embeddings().weight.data_ptr() for stack in (model.get_encoder(), model.get_decoder())}
    assert len(shared) == 1


def test_lora_trains_the_adapter_alone_and_saves_it_merged(toy, tmp_path):
    build(toy).save_pretrained(tmp_path / "base")
    module = TranslationModel(
        ModelSource(str(tmp_path / "base"), lora=LoRA(rank=2, targets=["q_proj", "v_proj"])),
        AdamWConfig(learning_rate=1e-2, warmup=0),
        max_new_tokens=8,
    )
    assert all("lora_" in name for name in module.shadowed_parameters())
    pairs = reversal(16, 0)
    toy.trainer(tmp_path).fit(module, toy.loader([pairs] * 3))
    module.save_pretrained(tmp_path / "merged")
    merged, base = (
        TranslationModel(ModelSource(str(tmp_path / name)), max_new_tokens=8) for name in ("merged", "base")
    )
    with torch.no_grad():
        ours, theirs, start = (m.eval()._logits(pairs) for m in (module, merged, base))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - start).abs().max() > 1e-2
    assert module.translate(pairs.source, 2) == merged.translate(pairs.source, 2) != base.translate(pairs.source, 2)


def test_checkpoints_load_with_weights_only(toy, tmp_path):
    module = build(toy, optimizer=AdamWConfig(betas=(0.5, 0.6)), label_smoothing=0.2, max_new_tokens=9)
    trainer = toy.trainer(tmp_path)
    trainer.fit(module, toy.loader([reversal(8, 0)]))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = TranslationModel.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert (loaded.optimizer_config, loaded.label_smoothing, loaded.max_new_tokens) == (module.optimizer_config, 0.2, 9)
    ours = dict(loaded.model.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in module.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"beam_size": 0}, "beam_size must be 1 or more, got 0"),
    ],
)
def test_bad_options_are_refused(toy, options, part):
    with pytest.raises(UserError, match=part):
        build(toy, **options)


def test_models_that_cannot_translate_are_refused(toy, tmp_path):
    with pytest.raises(UserError, match="no encoder-decoder"):
        TranslationModel(ModelSource(toy.folder))  # GPT-2
    with pytest.raises(UserError, match="no encoder-decoder"):
        TranslationModel(ModelSource(architecture={"model_type": "gpt2"}, tokenizer=toy.folder))
    module = build(toy, T5)
    for config in (module.model.config, module.model.generation_config):
        config.decoder_start_token_id = None
    module.save_pretrained(tmp_path / "no_start")
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        TranslationModel(ModelSource(str(tmp_path / "no_start")))


@pytest.mark.parametrize("name", ["max_prompt_tokens", "max_target_tokens", "max_new_tokens"])
def test_texts_beyond_the_context_are_refused(toy, tmp_path, name):
    from lightning import LightningDataModule

    class Data(LightningDataModule):
        def train_dataloader(self):
            return toy.loader([reversal(4, 0)])

    longest = dict.fromkeys(("max_prompt_tokens", "max_target_tokens", "max_new_tokens"), 24) | {name: 25}
    module, data = build(toy, max_new_tokens=longest.pop("max_new_tokens")), Data()
    vars(data).update(longest)
    with pytest.raises(UserError, match=f"{name} 25 is longer than the model's context 24"):
        toy.trainer(tmp_path).fit(module, datamodule=data)
