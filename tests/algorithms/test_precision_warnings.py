"""What a low precision would lose, or this machine compute slowly, is said; rewards in float32 are float32."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from elastic_lightning.algorithms import AdamWConfig, Execution, LanguageModel, precision
from elastic_lightning.policies import ModelSource
from elastic_lightning.rewards import ClassifierReward


class Watched(ClassifierReward):
    """Keeps what it scored."""

    def forward(self, prompts, responses):
        scores = super().forward(prompts, responses)
        self.seen = list(zip(prompts, responses, scores.tolist(), strict=True))
        return scores


X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse avx2 {}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.fixture
def old_cpu(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"flags": {"avx", "avx2"}})


def supervised(toy, **options):
    return LanguageModel(ModelSource(toy.folder, **options), AdamWConfig(warmup=0)), torch.arange(8)[None]


def ppo(toy, lora=False, **options):
    module = toy.ppo(lora=lora, **options)
    return module, toy.prompts()


@pytest.mark.parametrize(
    "text, missing",
    [
        (X86.format("avx512f"), "avx512_bf16 or amx_bf16 or avx_ne_convert"),
        (X86.format("avx512f avx512_bf16"), ""),
        (X86.format("amx_bf16"), ""),
        (ARM.format("sve"), "bf16"),
        (ARM.format("i8mm bf16"), ""),
        ("processor : 0\nisa : rv64imafdc\n", ""),  # not known
        (None, ""),
    ],
)
def test_what_the_cpu_lacks(tmp_path, monkeypatch, text, missing):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    assert precision.missing_for_bfloat16() == missing


@pytest.mark.parametrize(
    "build, options, trainer, warns",
    [
        (ppo, {}, {"precision": "bf16-mixed"}, True),
        (ppo, {"execution": Execution(rollout_dtype="bfloat16")}, {}, True),
        (ppo, {}, {}, False),
        (supervised, {}, {"precision": "bf16-mixed"}, True),
        (supervised, {"dtype": "bfloat16"}, {}, True),
        (supervised, {}, {}, False),
    ],
)
def test_bfloat16_without_instructions_is_told_once(toy, tmp_path, old_cpu, recwarn, build, options, trainer, warns):
    module, batch = build(toy, **options)
    toy.fit(module, tmp_path, [batch], **trainer)
    told = [str(each.message) for each in recwarn if "instructions for bfloat16" in str(each.message)]
    assert len(told) == warns and all("avx512_bf16" in text for text in told)


@pytest.mark.parametrize(
    "build, options, cast, warns",
    [
        (ppo, {}, "bf16-true", "trainer.precision: bf16-true"),
        (ppo, {"lora": True}, "bf16-true", "trainer.precision: bf16-true"),  # the adapter is cast as well
        (supervised, {}, "bf16-true", "trainer.precision: bf16-true"),
        (supervised, {"dtype": "bfloat16"}, "32-true", "policy.dtype: bfloat16"),
        (ppo, {}, "bf16-mixed", None),
        (ppo, {}, "32-true", None),
    ],
)
def test_weights_that_are_too_coarse_for_their_updates_are_told(toy, tmp_path, recwarn, build, options, cast, warns):
    module, batch = build(toy, **options)
    toy.fit(module, tmp_path, [batch], precision=cast)
    told = [str(each.message) for each in recwarn if "updates below its resolution are lost" in str(each.message)]
    assert len(told) == (warns is not None) and all(warns in text for text in told)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_a_reward_in_float32_is_exact_in_any_precision_of_the_trainer(toy, tmp_path, model):
    torch.manual_seed(0)
    size = {"vocab_size": 30, "pad_token_id": 29, "num_labels": 2, "initializer_range": 1.0}
    if model == "bert":
        config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **size)
        classifier = BertForSequenceClassification(config)
    else:
        classifier = GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **size))
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(toy.folder)
    tokenizer.save_pretrained(tmp_path / "classifier")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    for cast in ("bf16-mixed", "bf16-true"):
        reward = Watched(str(tmp_path / "classifier"), output="logit")
        toy.fit(toy.ppo(reward=reward), tmp_path, precision=cast)
        assert len(reward.seen) == 6
        for prompt, response, score in reward.seen:
            ids = tokenizer(prompt + response, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert score == pytest.approx(plain(input_ids=ids).logits[0, 1].item(), abs=1e-4), cast
