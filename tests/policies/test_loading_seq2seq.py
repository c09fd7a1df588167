"""Encoder-decoders: loaded, built, adapted, and their tokenizers."""

import json

import pytest
import torch
from policy_cases import ROWS, SEQ2SEQ, adapter_folder, left_padded
from transformers import (
    AutoModelForSeq2SeqLM,
)

from elastic_lightning.policies import (
    ActorCritic,
    LoRA,
    Sampling,
    as_policy,
    encode_source,
    encode_target,
    load_policy,
    load_tokenizer,
    sample,
)
from elastic_lightning.policies.encoding import EncodedPairs, paired
from elastic_lightning.policies.loading import disable_dropout
from elastic_lightning.policies.saving import save_model
from elastic_lightning.policies.text import decode_apart

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
