"""Models and tokenizers from folders, the hub, architectures and GGUF files."""

import subprocess
import sys

import pytest
import torch
from policy_cases import one_line
from tokenizer_kinds import KINDS
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import elastic_lightning.policies.loading as loading
from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    LoRA,
    ModelSource,
    load_policy,
    load_tokenizer,
)
from elastic_lightning.policies.loading import load_source, lone_gguf
from elastic_lightning.policies.merging import merge_adapter
from elastic_lightning.policies.saving import save_model

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


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


@pytest.mark.parametrize("kind", ["llama", "pad is eos"])
def test_the_end_of_text_of_an_architecture_is_learned(tmp_path, kind):
    """Transformers gives the embedding of a config's pad token no gradient: it must not be that of eos."""
    KINDS[kind]().save_pretrained(tmp_path)
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    model, tokenizer, _ = load_policy(architecture={"model_type": "llama", **sizes}, tokenizer=str(tmp_path))
    tokens = torch.tensor([[tokenizer.eos_token_id, 5]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    embedding = model.get_input_embeddings()
    assert embedding.weight.grad[tokenizer.eos_token_id].abs().sum() > 0
    assert len(tokenizer) == embedding.num_embeddings == model.config.pad_token_id + 1


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
    for wrong in ({"model_type": "no_such_type"}, {**GPT2, "n_head": 3}, {"model_type": "gemma3"}):
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


@pytest.mark.parametrize(("pad", "expected"), [({}, "<pad>"), ({"pad_token": "<eos>"}, "<eos>")], ids=["none", "eos"])
def test_a_tokenizer_pads_with_a_token_that_it_knows(tmp_path, word_tokenizer, pad, expected, gpt2_folder):
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    word_tokenizer(eos_token="<eos>", **pad).save_pretrained(tmp_path)
    loaded = load_policy(str(tmp_path))
    assert loaded.tokenizer.pad_token == expected and len(loaded.tokenizer) == 30
    assert loaded.model.get_input_embeddings().weight.shape[0] == 30


@pytest.mark.parametrize("special", [{}, {"eos_token": "w5"}, {"eos_token": "w5", "pad_token": "<outside>"}], ids=str)
def test_what_is_saved_pads_with_a_token_that_has_an_embedding(tmp_path, special, gpt2_folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(tmp_path)
    model, tokenizer, _ = load_policy(str(tmp_path))
    save_model(model, tokenizer, tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    batch = saved(["w3 w4", "w7"], padding=True, return_tensors="pt")
    assert saved.padding_side == "left" and batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    written = plain.generate(**batch, max_new_tokens=3, do_sample=False)
    alone = plain.generate(torch.tensor([[7]]), max_new_tokens=3, do_sample=False)
    assert written[1, 2:].tolist() == alone[0, 1:].tolist()
    again = load_policy(str(tmp_path / "saved")).tokenizer  # from stage to stage
    assert again.pad_token_id == saved.pad_token_id < 30 == len(saved)


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
    assert own.tokenizer.pad_token_id == own.tokenizer.eos_token_id == 2  # it holds no token that is meant for it
    other = load_policy(gguf_folder, gguf_file="tiny.gguf", tokenizer=tokenizer_folder)  # an ordinary folder
    assert other.tokenizer.eos_token == "<eos>"


def test_the_only_gguf_file_of_a_folder_needs_no_name(gguf_folder, tmp_path):
    tokens = torch.tensor([[3, 4, 5, 20]])
    named, found = load_policy(gguf_folder, gguf_file="tiny.gguf"), load_policy(gguf_folder)
    assert torch.equal(found.model(input_ids=tokens).logits, named.model(input_ids=tokens).logits)
    assert found.tokenizer.get_vocab() == named.tokenizer.get_vocab()
    for name in ("a.gguf", "b.gguf"):  # two: which one is meant?
        (tmp_path / name).touch()
    assert lone_gguf(gguf_folder) == "tiny.gguf" and lone_gguf(str(tmp_path)) is lone_gguf("org/name") is None


def test_an_adapter_on_a_gguf_file_is_merged_into_whole_weights(gguf_folder, tmp_path):
    tokens = torch.tensor([[3, 4, 5, 20]])
    trained = load_policy(gguf_folder, lora=LoRA(rank=2, targets=["q_proj"]))
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    expected = trained.model(input_ids=tokens).logits
    assert not torch.allclose(expected, load_policy(gguf_folder).model(input_ids=tokens).logits, atol=1e-3)
    save_model(trained.model, trained.tokenizer, tmp_path / "adapter", "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # no GGUF file beside it, nothing quantised
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)


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
