"""Models that differ from GPT-2 and Llama in one respect: widths, contexts, tied weights, vocabularies, own code."""

import json

import pytest
import torch
from architectures import CAUSAL, EOS, PAD, REFUSED, SEQ2SEQ, bart, build, llama, t5
from peft import LoraConfig, get_peft_model
from policy_cases import adapter_folder, left_padded, one_line, plain_logits
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GPT2LMHeadModel, WhisperConfig

from elastic_lightning.algorithms import LanguageModel
from elastic_lightning.cli import main
from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    ActorCritic,
    LoRA,
    ModelSource,
    RolloutCopy,
    Sampling,
    Translator,
    as_policy,
    load_policy,
    load_tokenizer,
    sample,
)
from elastic_lightning.policies.auto import AutoLanguageModel
from elastic_lightning.policies.encoding import EncodedPairs, encode_source, encode_target, paired
from elastic_lightning.policies.loading import check_vocabulary
from elastic_lightning.policies.merging import merge_adapter
from elastic_lightning.policies.reading import readable
from elastic_lightning.policies.saving import save_model

SHORT = {"original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}


@pytest.mark.parametrize("name", ["opt, narrow embedding", "llama4_text", "gemma3"])
@torch.no_grad()
def test_a_value_head_has_the_width_of_what_it_reads(name):
    model = build(*CAUSAL[name])
    rows = [[5, 9, 20], [7], [3, 4, 6, 8, 11]]
    actor = ActorCritic(as_policy(model)).eval()
    actor.value_head.weight.normal_()
    prompts = left_padded(rows)
    rollout = sample(actor, prompts, Sampling(max_new_tokens=5), torch.rand(3, 5), None, PAD)
    for i, row in enumerate(rows):
        tokens, text = rollout.tokens[i].tolist(), torch.tensor([row + rollout.tokens[i].tolist()])
        states = model(input_ids=text, output_hidden_states=True)
        expected = plain_logits(model, row, tokens).log_softmax(-1)[range(5), tokens]
        torch.testing.assert_close(rollout.logprobs[i], expected, atol=1e-4, rtol=0)
        if name != "opt, narrow embedding":  # whose last hidden states are not among those that it returns
            values = states.hidden_states[-1][0, len(row) - 1 : -1] @ actor.value_head.weight[0]
            torch.testing.assert_close(rollout.values[i], values, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "fits", "too_long"),
    [
        (CAUSAL["mpt"], (100, 28), (100, 29)),
        (("phi3", llama(rope_parameters=LONGROPE | SHORT, **SHORT)), (10, 6), (10, 7)),
        (SEQ2SEQ["led"], (128, 64), (129, 64)),
        (SEQ2SEQ["led"], (128, 64), (1, 65)),
        (("switch_transformers", t5(num_experts=2, expert_capacity=4)), (500, 4), (1, 5)),
    ],
    ids=["mpt", "longrope", "led source", "led target", "switch"],
)
def test_texts_that_do_not_fit_are_refused_also_by_the_sampler(model, fits, too_long, word_tokenizer):
    lm = as_policy(build(*model))
    lm.check_context(*fits)
    if model[0] == "led":  # a translator reads as much as its encoder can
        tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
        assert Translator(lm, tokenizer).read(["w5 " * 200]).tokens.shape == (1, 128)
    with pytest.raises(UserError, match="context is"):
        lm.check_context(*too_long)
    if model[0] != "switch_transformers":
        prompts, new = left_padded([[5] * too_long[0]]), too_long[1]
        with pytest.raises(UserError, match="context is"):
            sample(ActorCritic(lm), prompts, Sampling(max_new_tokens=new + 1), torch.rand(1, new + 1), None, PAD)


def test_a_probe_leaves_no_trace():
    """Bigbird's encoder would read in full from then on, and draws its blocks with numpy's generator."""
    model = build(*REFUSED["bigbird_pegasus"][:2])
    with pytest.raises(UserError, match="attention_type: original_full"):
        as_policy(model)
    assert model.model.encoder.attention_type == "block_sparse"


@torch.no_grad()
def test_a_rollout_in_bfloat16_adds_its_sinusoids_in_bfloat16():
    model = build(*CAUSAL["xglm"])
    lm = as_policy(model)
    copy = RolloutCopy(lm, torch.bfloat16).lm
    prompts, actor = left_padded([[5, 9, 20], [7]]), ActorCritic(lm)
    ours = sample(actor, prompts, Sampling(max_new_tokens=4, top_k=1), torch.rand(2, 4), None, PAD, copy)
    half = model.to(torch.bfloat16)
    for i, row in enumerate([[5, 9, 20], [7]]):
        expected = plain_logits(half, row, ours.tokens[i].tolist()).float().log_softmax(-1)
        torch.testing.assert_close(ours.logprobs[i], expected[range(4), ours.tokens[i]], atol=0.1, rtol=0)


# Adapters on weights that two layers share


def test_an_adapter_on_tied_embeddings_is_refused(gpt2_folder, tmp_path):
    with pytest.raises(UserError) as error:
        load_policy(gpt2_folder, lora=LoRA(targets=["wte", "c_attn"]))
    one_line(error, "wte", "tied", "lora.targets")
    plain = GPT2LMHeadModel.from_pretrained(gpt2_folder)
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["wte"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")  # somebody else's, who does not merge it
    for use in (
        lambda: load_policy(str(tmp_path / "adapter"), tokenizer=gpt2_folder),
        lambda: merge_adapter(tmp_path / "adapter", tmp_path / "merged"),
    ):
        with pytest.raises(UserError) as error:
            use()
        one_line(error, "wte", "tied")
    assert not (tmp_path / "merged").exists()


@torch.no_grad()
def test_an_adapter_on_an_embedding_of_its_own_is_merged(llama_folder, tmp_path):
    """Llama's embedding is not its output layer."""
    model, folder = adapter_folder(tmp_path, llama_folder, targets=["embed_tokens", "q_proj"])
    as_policy(load_policy(folder).model)
    merge_adapter(folder, tmp_path / "merged")
    tokens = torch.tensor([[3, 4, 5, 20]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_marian_with_two_vocabularies_keeps_its_output_layer(tokenizer_folder, tmp_path):
    base = build(*SEQ2SEQ["marian, two vocabularies"])
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "base")
    loaded = load_policy(str(tmp_path / "base"), lora=LoRA(rank=2))  # untrained: the base model itself
    save_model(loaded.model, loaded.tokenizer, tmp_path / "merged")
    merged, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    pair = [5, 6, 7, EOS], [9, 10, 11]
    torch.testing.assert_close(plain_logits(merged.eval(), *pair), plain_logits(base, *pair), atol=1e-5, rtol=0)


@pytest.fixture
def marian_tokenizer(tmp_path):
    """A function that makes the folder of a tokenizer with a vocabulary a side, of different sizes."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

    def make(ends=("</s>", "<unk>")):
        for side, text, first in (
            ("source", "the cat sat on the mat", ["</s>", "<unk>"]),
            ("target", "un chien est la", ends),
        ):
            prefix = str(tmp_path / side)
            options = {"vocab_size": 40, "hard_vocab_limit": False, "bos_id": -1, "minloglevel": 2}
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text]), model_prefix=prefix, **options)
            (tmp_path / f"{side}.model").rename(tmp_path / f"{side}.spm")
            pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / f"{side}.spm"))
            known = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
            words = list(dict.fromkeys([*first, *known, "<pad>"]))
            file = "vocab.json" if side == "source" else "target_vocab.json"
            (tmp_path / file).write_text(json.dumps({word: index for index, word in enumerate(words)}))
        settings = {"tokenizer_class": "MarianTokenizer", "separate_vocabs": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return load_tokenizer(str(tmp_path))

    return make


def test_prompts_are_decoded_by_the_vocabulary_they_are_of(marian_tokenizer):
    tokenizer = marian_tokenizer()
    pairs = EncodedPairs(*(side(tokenizer, texts) for side, texts in SIDES))
    lm = as_policy(build("marian", bart(decoder_start_token_id=3, pad_token_id=3, eos_token_id=0)))
    prompts, responses = paired(pairs, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert lm.decode(tokenizer, prompts, responses) == (["the cat", "a mat sat"], ["un chien", "un"], [True, True])


SIDES = (
    (lambda tokenizer, texts: encode_source(tokenizer, texts, eos=True), ["the cat", "a mat sat"]),
    (encode_target, ["un chien", "un"]),
)


def test_vocabularies_that_end_otherwise_are_refused(marian_tokenizer):
    tokenizer = marian_tokenizer(ends=("<unk>", "</s>"))
    with pytest.raises(UserError) as error:
        check_vocabulary(tokenizer, build("marian", bart(decoder_start_token_id=PAD)), "a folder")
    one_line(error, "a folder", "</s>", "0 and 1")


# What cannot be loaded


@pytest.mark.parametrize(
    "message",
    [
        "MarianTokenizer requires the SentencePiece library but it was not found in your environment. Check",
        "Unrecognized configuration class <class 'MarianConfig'> to build an AutoTokenizer.\nModel type should be",
        "`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.",
    ],
)
def test_a_tokenizer_without_sentencepiece_says_what_to_install(message, monkeypatch):
    monkeypatch.setattr("elastic_lightning.policies.reading.is_sentencepiece_available", lambda: False)
    with pytest.raises(UserError) as error, readable("tokenizer", "./opus-mt-fr-en"):
        raise ImportError(message)
    one_line(error, "./opus-mt-fr-en")


def test_models_that_write_no_text_are_refused_by_type():
    with pytest.raises(UserError) as error:
        AutoLanguageModel.from_config(WhisperConfig(is_encoder_decoder=True))
    one_line(error, "whisper", "AutoModelForSeq2SeqLM")


@pytest.fixture
def own_code(tmp_path, llama_folder):
    """The folder of a model whose classes are its own; importing them leaves a mark."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path)
    mark = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (tmp_path / "configuration_own.py").write_text(
        f"from transformers import LlamaConfig\n{mark}class OwnConfig(LlamaConfig):\n    model_type = 'own_model'\n"
    )
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_model", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_code_of_a_model_runs_where_it_is_trusted(own_code, llama_folder, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(own_code / "modules"))
    with pytest.raises(UserError) as error:
        load_policy(str(own_code))
    one_line(error, str(own_code), "trust_remote_code", "--trust_remote_code")
    written = []
    for folder, flags in ((llama_folder, []), (own_code, ["--trust_remote_code"])):
        options = [f"--model={folder}", "--prompt=w5 w6", "--top_k=1", "--max_new_tokens=6", *flags]
        assert not (own_code / "ran").exists()
        assert main(["generate", *options]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and (own_code / "ran").exists()


def test_a_checkpoint_cannot_allow_code(own_code, tmp_path):
    from elastic_lightning.evaluation.generate import load

    policy = {"path": str(own_code), "trust_remote_code": True, "lora": None}
    torch.save({"hyper_parameters": {"policy": policy}, "state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="--trust_remote_code"):
        load(str(tmp_path / "x.ckpt"))
    assert not (own_code / "ran").exists()


@pytest.mark.parametrize("model_type", ["gemma2", "bert", "mamba"])
def test_the_first_stage_refuses_what_a_later_one_would(model_type, tokenizer_folder):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    architecture = {"model_type": model_type, "num_key_value_heads": 2, "is_decoder": True, **size}
    with pytest.raises(UserError, match="not supported"):
        LanguageModel(ModelSource(architecture=architecture, tokenizer=tokenizer_folder))
