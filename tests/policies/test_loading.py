import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policy_cases import ROWS, SEQ2SEQ, left_padded
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import elastic_lightning.policies.loading as loading
from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    ActorCritic,
    CausalLM,
    LoRA,
    ModelSource,
    Sampling,
    as_policy,
    encode_source,
    encode_target,
    load_policy,
    load_tokenizer,
    make_reference,
    sample,
)
from elastic_lightning.policies.encoding import EncodedPairs, paired
from elastic_lightning.policies.loading import disable_dropout, load_source
from elastic_lightning.policies.saving import save_model
from elastic_lightning.policies.text import decode_apart

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message
    return message


def test_a_folder_gives_its_own_weights_in_eval_mode(gpt2_folder):
    loaded = load_policy(gpt2_folder)
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    assert not loaded.model.training and not loaded.unmerged_adapter
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    for (name, ours), (_, theirs) in zip(loaded.model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert loaded.tokenizer.padding_side == "left"


def test_an_architecture_takes_vocabulary_and_special_tokens_from_the_tokenizer(tokenizer_folder):
    torch.manual_seed(0)
    model, tokenizer, _ = load_policy(architecture=GPT2, tokenizer=tokenizer_folder)
    config = model.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (len(tokenizer), 1, 0)
    assert model.transformer.wte.weight.shape == (30, 16) and config.num_hidden_layers == 1
    torch.manual_seed(0)
    again = load_policy(architecture=GPT2, tokenizer=tokenizer_folder).model
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)
    assert GPT2["model_type"] == "gpt2", "the configuration was changed"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(gpt2_folder, tokenizer_folder, dtype):
    from_folder = load_policy(gpt2_folder, dtype=dtype).model
    from_scratch = load_policy(architecture=GPT2, tokenizer=tokenizer_folder, dtype=dtype).model
    for model in (from_folder, from_scratch):
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention(gpt2_folder, tokenizer_folder, attention):
    architecture = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    for options in ({"path": gpt2_folder}, {"architecture": architecture, "tokenizer": tokenizer_folder}):
        assert load_policy(**options, attention=attention).model.config._attn_implementation == attention
        with pytest.raises(UserError, match="no_such_attention"):
            load_policy(**options, attention="no_such_attention")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "exactly one"),
        ({"path": "a", "architecture": GPT2, "tokenizer": "a"}, "exactly one"),
        ({"architecture": {"n_embd": 4}, "tokenizer": "a"}, "model_type"),
        ({"architecture": GPT2}, "tokenizer"),
    ],
)
def test_sources_that_contradict_themselves(options, part):
    with pytest.raises(UserError) as error:
        load_policy(**options)
    one_line(error, part)


def test_unknown_architectures_and_wrong_sizes(tokenizer_folder):
    for wrong in ({"model_type": "no_such_type"}, {**GPT2, "n_head": 3}):
        with pytest.raises(UserError) as error:
            load_policy(architecture=wrong, tokenizer=tokenizer_folder)
        one_line(error, "cannot build the architecture", wrong["model_type"])


def test_a_missing_folder_is_named(tmp_path, tokenizer_folder):
    for options in ({"path": str(tmp_path / "none")}, {"path": str(tmp_path / "none"), "tokenizer": tokenizer_folder}):
        with pytest.raises(UserError) as error:
            load_policy(**options)
        one_line(error, "no such folder", str(tmp_path / "none"))


def test_a_folder_without_a_model(tmp_path, tokenizer_folder):
    with pytest.raises(UserError) as error:
        load_policy(tokenizer_folder)
    one_line(error, tokenizer_folder)
    with pytest.raises(UserError) as error:
        load_policy(str(tmp_path))
    one_line(error, str(tmp_path))


def test_a_damaged_weights_file_is_one_line(tmp_path, gpt2_folder):
    load = load_policy(gpt2_folder)
    save_model(load.model, load.tokenizer, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        load_policy(str(tmp_path))
    one_line(error, str(tmp_path))


def test_a_hub_id_offline_is_one_line(tokenizer_folder):
    """In a process of its own: huggingface_hub reads the variable when it is imported."""
    script = """
import os; os.environ["HF_HUB_OFFLINE"] = "1"
from elastic_lightning.errors import UserError
from elastic_lightning.policies import load_policy
for options in ({}, {"tokenizer": TOKENIZER}):
    try:
        load_policy("nobody/no-such-model", **options)
    except UserError as error:
        print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script.replace("TOKENIZER", repr(tokenizer_folder))],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert [line.split(" 'nobody/no-such-model'")[0] for line in lines] == [
        "cannot load the tokenizer",
        "cannot load the model",
    ]
    assert all("give a local save_pretrained folder" in line for line in lines)


# Pad tokens


def test_a_tokenizer_with_a_pad_token_keeps_it(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 30)


@pytest.mark.parametrize("pad", [{}, {"pad_token": "<eos>"}], ids=["none", "eos"])
def test_a_tokenizer_without_a_pad_token_of_its_own_gets_one(tmp_path, word_tokenizer, pad, gpt2_folder):
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    model.save_pretrained(tmp_path)
    word_tokenizer(eos_token="<eos>", **pad).save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path))
    assert loaded.tokenizer.pad_token == "<pad>" and loaded.tokenizer.pad_token_id == 0  # one that it knows
    assert loaded.model.get_input_embeddings().weight.shape[0] == 30


@pytest.mark.parametrize("pad", [{}, {"pad_token": "w5"}], ids=["none", "eos"])
def test_a_pad_token_that_has_to_be_added_lies_outside_the_embedding(tmp_path, pad, gpt2_folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="w5", **pad).save_pretrained(tmp_path)
    model, tokenizer, _ = load_policy(str(tmp_path))
    assert tokenizer.pad_token_id == 30 and tokenizer.eos_token_id == 5
    assert model.get_input_embeddings().weight.shape[0] == 30
    save_model(model, tokenizer, tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).pad_token_id == 30  # and stays so from stage to stage


# Trust


def test_remote_code_is_off_unless_asked(monkeypatch, gpt2_folder):
    seen = []

    def record(kind, original):
        def from_pretrained(*args, **kwargs):
            seen.append((kind, kwargs["trust_remote_code"]))
            return original(*args, **kwargs)

        return from_pretrained

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", record("t", AutoTokenizer.from_pretrained))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record("m", AutoModelForCausalLM.from_pretrained))
    load_policy(gpt2_folder)
    assert seen == [("t", False), ("m", False)]
    load_policy(gpt2_folder, trust_remote_code=True)
    assert seen[2:] == [("t", True), ("m", True)]
    assert ModelSource(gpt2_folder).trust_remote_code is False


# LoRA


def adapter_folder(tmp_path, base, **options):
    model, tokenizer, _ = load_policy(base, lora=LoRA(rank=2, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_model(model, tokenizer, tmp_path / "adapter", adapter="adapter")
    return model, str(tmp_path / "adapter")


@pytest.mark.parametrize("folder", ["gpt2_folder", "llama_folder"])
def test_lora_trains_its_factors_alone(folder, request):
    plain = load_policy(request.getfixturevalue(folder)).model
    model = load_policy(request.getfixturevalue(folder), lora=LoRA(rank=3, alpha=6)).model
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_A" in name or "lora_B" in name for name in trainable)
    assert {min(parameter.shape) for parameter in trainable.values()} == {3}
    assert not any(p.any() for name, p in trainable.items() if "lora_B" in name)
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)  # it starts as it was
    assert model.peft_config["default"].lora_alpha == 6 and not model.training


def test_lora_targets_and_dropout(llama_folder):
    model = load_policy(llama_folder, lora=LoRA(rank=2, targets=["o_proj"], dropout=0.3)).model
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"o_proj"}
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert 0.3 in rates
    disable_dropout(model)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_wrong_lora_options(llama_folder):
    with pytest.raises(UserError, match="rank"):
        LoRA(rank=0)
    with pytest.raises(UserError, match="dropout"):
        LoRA(dropout=1.0)
    with pytest.raises(UserError) as error:
        load_policy(llama_folder, lora=LoRA(targets=["no_such_module"]))
    one_line(error, "no_such_module", "lora.targets")


def test_an_adapter_folder_loads_as_it_was_saved(tmp_path, llama_folder):
    model, folder = adapter_folder(tmp_path, llama_folder)
    assert not (Path(folder) / "model.safetensors").exists()
    loaded = load_policy(folder)
    assert loaded.unmerged_adapter
    tokens = torch.tensor([[3, 4, 5, 20]])
    torch.testing.assert_close(loaded.model(input_ids=tokens).logits, model(input_ids=tokens).logits)
    trainable = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_an_unmerged_adapter_has_no_adapter_off_reference(tmp_path, llama_folder):
    _, folder = adapter_folder(tmp_path, llama_folder)
    loaded = load_policy(folder)
    lm = CausalLM(loaded.model)
    with pytest.raises(UserError) as error:
        make_reference(lm, "adapter_off", loaded.unmerged_adapter)
    one_line(error, "unmerged adapter", "merge", "frozen_copy")
    for kind in ("frozen_copy", "auto"):
        assert type(make_reference(lm, kind, loaded.unmerged_adapter)).__name__ == "FrozenCopy"


def test_lora_on_an_unmerged_adapter_is_refused(tmp_path, llama_folder):
    _, folder = adapter_folder(tmp_path, llama_folder)
    with pytest.raises(UserError) as error:
        load_policy(folder, lora=LoRA(rank=2))
    one_line(error, "unmerged adapter", "merge")


def test_the_base_model_of_an_adapter_is_loaded_with_the_same_trust_and_dtype(tmp_path, llama_folder, monkeypatch):
    _, folder = adapter_folder(tmp_path, llama_folder)
    seen, original = [], loading.from_path
    monkeypatch.setattr(loading, "from_path", lambda kind, source: seen.append(source) or original(kind, source))
    load_policy(folder, trust_remote_code=True, dtype="bfloat16")
    assert [(source.path, source.dtype, source.trust_remote_code) for source in seen] == [
        (llama_folder, "bfloat16", True)
    ]


@pytest.mark.parametrize("base", [None, "/no/such/base"])
def test_an_adapter_without_its_base_model(tmp_path, llama_folder, base):
    _, folder = adapter_folder(tmp_path, llama_folder)
    config = Path(folder) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(UserError) as error:
        load_policy(folder)
    one_line(error, base or "base model")


# Encoder-decoders

MARIAN = {"model_type": "marian", "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "init_std": 0.5}
MARIAN |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
MARIAN |= {"max_position_embeddings": 32, "scale_embedding": True}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
ENCODER_DECODERS = {"marian": MARIAN, "bart": MARIAN | {"model_type": "bart"}, "t5": T5}
ENCODER_DECODERS["t5 v1.1"] = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.mark.parametrize("folder", SEQ2SEQ)
def test_an_encoder_decoder_is_loaded_as_what_it_is(folder, request):
    model = load_policy(request.getfixturevalue(folder)).model
    plain = AutoModelForSeq2SeqLM.from_pretrained(request.getfixturevalue(folder))
    assert type(model) is type(plain) and not model.training
    for (name, ours), (_, theirs) in zip(*(each.state_dict().items() for each in (model, plain)), strict=True):
        assert torch.equal(ours, theirs), name
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    positions = {f"model.{half}.embed_positions.weight" for half in ("encoder", "decoder")}
    assert fixed == (positions if folder == "marian_folder" else set()), "sinusoids are no weights"


@pytest.mark.parametrize("architecture", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS)
def test_an_encoder_decoder_from_an_architecture_generates_and_is_saved(architecture, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    model, tokenizer, _ = load_policy(architecture=architecture, tokenizer=tokenizer_folder)
    config = model.config
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 0)
    assert config.vocab_size == len(tokenizer) == model.get_output_embeddings().out_features
    save_model(model, tokenizer, tmp_path)
    lm = as_policy(load_policy(str(tmp_path)).model)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    prompts = left_padded(ROWS, extra=1)
    rollout = sample(ActorCritic(lm), prompts, Sampling(max_new_tokens=9, top_k=1), torch.zeros(4, 9), 1, 0)
    for i, row in enumerate(ROWS):
        generated = plain.generate(torch.tensor([row]), num_beams=1, do_sample=False, max_new_tokens=9)[0, 1:]
        assert rollout.tokens[i][rollout.mask[i]].tolist() == generated.tolist()
    names = {"input_ids": torch.tensor([ROWS[0]]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    torch.testing.assert_close(plain(**names).logits, model(**names).logits)


@pytest.mark.parametrize("folder", SEQ2SEQ)
def test_an_adapter_of_an_encoder_decoder(tmp_path, folder, request):
    model, saved = adapter_folder(tmp_path, request.getfixturevalue(folder))
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    loaded = load_policy(saved)
    assert loaded.unmerged_adapter and type(loaded.model) is type(model)
    names = {"input_ids": torch.tensor([ROWS[0]]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    torch.testing.assert_close(loaded.model(**names).logits, model(**names).logits)
    trainable = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert {name.split(".encoder.")[0] == name for name in trainable} == {True, False}, "in both halves"


def test_marian_is_adapted_as_bart_is(marian_folder, bart_folder):
    """Peft has a choice of modules for BART alone."""
    adapted = []
    for folder in (marian_folder, bart_folder):
        model = load_policy(folder, lora=LoRA(rank=2)).model
        adapted.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert adapted[0] == adapted[1] and {name.split(".lora_")[0].split(".")[-1] for name in adapted[0]} == {
        "q_proj",
        "v_proj",
    }


@pytest.mark.parametrize("folder", SEQ2SEQ)
def test_no_dropout_is_left_whatever_its_kind(folder, request):
    """Marian and BART give rates to functional dropout and skip whole layers; the mode of training alone decides."""
    model = load_policy(request.getfixturevalue(folder)).model.train()
    names = {"input_ids": torch.tensor([ROWS[2]]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    assert not torch.equal(model(**names).logits, model(**names).logits)
    disable_dropout(model)
    trained = model(**names).logits
    assert torch.equal(trained, model(**names).logits)
    torch.testing.assert_close(trained, model.eval()(**names).logits)


def test_a_tokenizer_that_appends_an_end(tmp_path, word_tokenizer):
    from tokenizers.processors import TemplateProcessing

    plain = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    plain.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("w5 w6")["input_ids"] == [5, 6, 1]
    assert encode_source(tokenizer, ["w5 w6"], eos=True) == [[5, 6, 1]], "one end, not two"


def test_the_tokenizer_of_marian(tmp_path):
    """Two sentencepiece models over one vocabulary, as the hub's translation models have."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    sources, targets = ["the cat sat on the mat", "a dog sat"], ["le chat est assis", "un chien est la"]
    vocabulary = {"</s>": 0, "<unk>": 1}
    for name, texts in (("source", sources), ("target", targets)):
        prefix = str(tmp_path / name)
        options = {"vocab_size": 40, "hard_vocab_limit": False, "bos_id": -1, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=prefix, **options)
        (tmp_path / f"{name}.model").rename(tmp_path / f"{name}.spm")
        pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / f"{name}.spm"))
        for index in range(pieces.get_piece_size()):
            vocabulary.setdefault(pieces.id_to_piece(index), len(vocabulary))
    vocabulary["<pad>"] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, len(vocabulary) - 1)
    assert tokenizer(sources[0])["input_ids"][-1] == 0, "it appends the end itself"
    pairs = EncodedPairs(encode_source(tokenizer, sources, eos=True), encode_target(tokenizer, targets))
    assert all(row.index(0) == len(row) - 1 for side in pairs for row in side), "one end, not two"
    batch = paired(pairs, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert decode_apart(tokenizer, *batch) == (sources, targets, [True, True])


# GGUF


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory, llama_folder):
    """The tiny llama as llama.cpp writes it: rotary halves interleaved, a sentencepiece vocabulary beside it."""
    gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    folder = tmp_path_factory.mktemp("gguf")
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(30)])
    writer.add_token_types([2, 3, 3, *[1] * 27])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            halves = array.reshape(-1, 2, config.head_dim // 2, array.shape[1])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder)


def test_a_gguf_file_holds_the_same_model(gguf_folder, llama_folder, tokenizer_folder):
    tokens = torch.tensor([[3, 4, 5, 20]])
    expected = LlamaForCausalLM.from_pretrained(llama_folder)(input_ids=tokens).logits
    own = load_policy(gguf_folder, gguf_file="tiny.gguf")
    torch.testing.assert_close(own.model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert own.tokenizer.pad_token_id is not None and own.tokenizer.pad_token_id != own.tokenizer.eos_token_id == 2
    other = load_policy(gguf_folder, gguf_file="tiny.gguf", tokenizer=tokenizer_folder)  # an ordinary folder
    assert other.tokenizer.eos_token == "<eos>"


def test_a_missing_gguf_file_is_one_line(gguf_folder):
    with pytest.raises(UserError) as error:
        load_policy(gguf_folder, gguf_file="other.gguf")
    one_line(error, gguf_folder)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast"])
def test_the_fused_activation_is_the_same_function(activation, tokenizer_folder):
    architecture = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    source = ModelSource(architecture=architecture | {"activation_function": activation}, tokenizer=tokenizer_folder)
    ours = load_source(source).model
    theirs = GPT2LMHeadModel(ours.config)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.tensor([[3, 9, 4, 28, 7]])
    found = []
    for model in (ours, theirs):
        logits = model.eval()(tokens).logits
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert type(ours.transformer.h[0].mlp.act) is not type(theirs.transformer.h[0].mlp.act)
    assert ours.config.activation_function == activation, "what is saved is the model as it was"
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
