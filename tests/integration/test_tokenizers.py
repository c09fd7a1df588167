"""Each kind of tokenizer through fit, validate, generate, evaluate and back into plain transformers, the oracle."""

import json
import math

import pytest
import torch
from lightning import Trainer
from tokenizer_kinds import CAUSAL, ENDS, save_kind, sentences
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from elastic_lightning.algorithms import PPO, PPOConfig
from elastic_lightning.callbacks import SavePretrained
from elastic_lightning.data import IMDBDataModule
from elastic_lightning.evaluation.completion import PolicyCompleter
from elastic_lightning.evaluation.evaluate import TextOptions, evaluate
from elastic_lightning.evaluation.generate import generate, load
from elastic_lightning.policies import ModelSource, PairedTexts, Prompts, Responses, Sampling, pad
from elastic_lightning.rewards import FunctionReward

BLOCK = 24
HUMAN = sentences(20, seed=2)
PROMPTS = ["the film", "it", "bad story about men", "one long film"]


class Recording(PPO):
    """Keeps what it learned from."""

    def log_ppo_batch(self, scored, experience, losses):
        self.__dict__["learned"] = scored
        super().log_ppo_batch(scored, experience, losses)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", enable_checkpointing=False, max_epochs=1, **quiet, **options)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    for split, texts in {"train": sentences(16), "validation": HUMAN, "test": HUMAN}.items():
        rows = [json.dumps({"text": text, "label": index % 2}) for index, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


def trained(kind, reviews, folder, **limits):
    """A policy after two PPO batches, its data, its plain tokenizer, and the folder that was saved."""
    tokenizer = save_kind(kind, folder / "policy")
    torch.manual_seed(0)
    reward = FunctionReward(lambda prompts, responses: [len(response) for response in responses])
    config = PPOConfig(epochs=1, mini_batches=2, learning_rate=1e-3)
    module = Recording(ModelSource(str(folder / "policy")), reward, config, Sampling(max_new_tokens=8), seed=1)
    sizes = {"batch_size": 8, "eval_batch_size": 8, "block_size": BLOCK, "max_prompt_tokens": 6, "eval_prompts": 8}
    data = IMDBDataModule(path=str(reviews), **sizes)
    fit = trainer(limit_val_batches=0, callbacks=[SavePretrained(folder=str(folder / "run"))])
    fit.fit(module, datamodule=data)
    assert fit.callback_metrics["train/first_ratio_deviation"] < 1e-5
    return module, data, tokenizer, folder / "run" / "final"


def follows(tokenizer, texts):
    """Token ids of texts to go on from: what the plain tokenizer makes of them, but for what it puts at their end."""
    return [ids[:-1] if ids[-1] == tokenizer.sep_token_id else ids for ids in tokenizer(texts)["input_ids"]]


def until_end(ids, ends):
    first = next((index for index, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]


def check_rollout(module, tokenizer, ends):
    """Every response of the last PPO batch ends with the first of the ends, and holds no id without text."""
    complete, last = 0, set()
    for tokens, mask in zip(*module.learned.rollout[:2], strict=True):
        written = tokens[mask].tolist()
        assert written == until_end(written, ends) and max(written) < len(tokenizer)
        complete += written[-1] in ends
        last.add(written[-1])
    assert len(ends) == 1 or (last.issuperset(ends) and complete < 8)  # else it could not be told
    assert module.trainer.callback_metrics["train/eos_rate"] == pytest.approx(complete / 8)


def check_written(model, tokenizer, batch, rows, ends):
    """Plain transformers writes greedily, in one padded batch, what `generate` wrote."""
    textless = [token for token in range(model.config.vocab_size) if token >= len(tokenizer)]
    written = model.generate(**batch, max_new_tokens=8, do_sample=False, suppress_tokens=textless)
    begin = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    for row, tokens in zip(rows, written.tolist(), strict=True):
        response = until_end(tokens[begin:], ends)
        assert (row["tokens"], row["complete"]) == (len(response), response[-1] in ends)
        before = [] if model.config.is_encoder_decoder else tokens[:begin]
        text = tokenizer.decode(before + response, skip_special_tokens=True)
        assert (row["prompt"] if before else "") + row["response"] == text


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_policy(kind, reviews, tmp_path):
    module, data, original, final = trained(kind, reviews, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final).eval()
    ends = tokenizer.convert_tokens_to_ids(ENDS[kind])
    check_rollout(module, tokenizer, ends)

    # Prompts, and what is saved.
    batch = next(iter(data.val_dataloader()[0]))
    halves = [" ".join(text.split()[: len(text.split()) // 2]) for text in HUMAN[:8]]
    cut = AutoTokenizer.from_pretrained(tmp_path / "policy", truncation_side="left")
    longest = 6 + (kind == "wordpiece")  # with what is not put after a prompt
    expected = [
        ids[:-1] if kind == "wordpiece" else ids
        for ids in cut(halves, truncation=True, max_length=longest)["input_ids"]
    ]
    assert [row[keep].tolist() for row, keep in zip(*batch, strict=True)] == expected
    assert (tokenizer.pad_token, len(tokenizer)) == (original.pad_token or "</s>", len(original))

    # Perplexity of human text.
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = torch.tensor([token for ids in follows(tokenizer, HUMAN) for token in (*ids, *eos)])
    blocks = stream[: len(stream) // BLOCK * BLOCK].view(-1, BLOCK)
    with torch.no_grad():
        packed = model(input_ids=blocks, labels=blocks).loss.exp().item()
        nll = [(model(input_ids=ids, labels=ids).loss.item(), ids.shape[1] - 1) for ids in one_by_one(tokenizer)]
    alone = math.exp(sum(mean * tokens for mean, tokens in nll) / sum(tokens for _, tokens in nll))
    validated = trainer().validate(module, datamodule=data, verbose=False)[0]["val/perplexity"]
    assert validated == pytest.approx(packed, rel=1e-4)
    path, sizes = str(reviews / "test.jsonl"), {"length": BLOCK, "stride": BLOCK // 2}
    found = [
        evaluate(str(final), tmp_path / "out", TextOptions(path, **sizes, packed=whole))["perplexity"]["perplexity"]
        for whole in (True, False)
    ]
    assert found == [pytest.approx(packed, rel=1e-4), pytest.approx(alone, rel=1e-4)]

    # Text.
    policy, own = load(str(final))
    sampling = Sampling(max_new_tokens=8, top_k=1)
    rows = generate(policy, own, PROMPTS, sampling)
    batch = tokenizer.pad({"input_ids": follows(tokenizer, PROMPTS)}, return_tensors="pt")
    check_written(model, tokenizer, batch, rows, ends)
    assert PolicyCompleter(policy, own, sampling).complete(PROMPTS) == [row["response"] for row in rows]


def one_by_one(tokenizer):
    return [torch.tensor([ids]) for ids in follows(tokenizer, HUMAN)]


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_an_encoder_decoder(kind, reviews, tmp_path):
    module, _, original, final = trained(kind, reviews, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForSeq2SeqLM.from_pretrained(final).eval()
    ends = [tokenizer.eos_token_id]
    check_rollout(module, tokenizer, ends)
    assert (tokenizer.padding_side, tokenizer.pad_token) == (original.padding_side, original.pad_token)

    # What is read, in training and here.
    learned = [row[keep].tolist() for row, keep in zip(*module.learned.prompts, strict=True)]
    assert all(row[-1] == tokenizer.eos_token_id and row.count(row[-1]) == 1 and len(row) <= 6 for row in learned)
    assert module.actor.lm.encode_rows(module.tokenizer, HUMAN) == tokenizer(HUMAN)["input_ids"]

    # Perplexity of human text: the model's own loss, one pair at a time.
    sources, targets = tokenizer(PROMPTS)["input_ids"], tokenizer(HUMAN[: len(PROMPTS)])["input_ids"]
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss * len(target)
            for source, target in zip(sources, targets, strict=True)
        ]
    expected = math.exp(sum(losses) / sum(map(len, targets)))
    padding = tokenizer.pad_token_id
    pairs = PairedTexts(Prompts(*pad(sources, padding, left=True)), Responses(*pad(targets, padding, left=False)))
    loader = DataLoader([pairs], batch_size=None)
    validated = trainer().validate(module, loader, verbose=False)[0]["val/perplexity"]
    assert validated == pytest.approx(expected, rel=1e-4)

    # Text.
    policy, own = load(str(final))
    rows = generate(policy, own, PROMPTS, Sampling(max_new_tokens=8, top_k=1))
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt").data
    batch.pop("token_type_ids", None)
    check_written(model, tokenizer, batch, rows, ends)
