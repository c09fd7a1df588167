"""Tiny configs of real architectures: those that work, and those that are refused and for what reason."""

import math

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

VOCABULARY, PAD, BOS, EOS = 64, 0, 1, 2
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ROPE = {"rope_theta": 10000.0}


def llama(**fields):
    """What most decoders of today have in common, with grouped heads."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return SPECIAL | size | {"num_attention_heads": 4, "num_key_value_heads": 2} | fields


def gpt2(**fields):
    return SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | fields


def bart(**fields):
    size = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    size |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128}
    return SPECIAL | size | {"decoder_start_token_id": EOS, "forced_eos_token_id": None} | fields


def decoder_of(**fields):
    """The decoder of such a model alone."""
    return bart(is_decoder=True, is_encoder_decoder=False, **fields)


def t5(**fields):
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return SPECIAL | size | {"decoder_start_token_id": PAD} | fields


OPT = {"ffn_dim": 48, "num_key_value_heads": None, "word_embed_proj_dim": 32}
FALCON = SPECIAL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEADS = {"num_key_value_heads": 4}
WINDOW = {"sliding_window": 5}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, **HEADS}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MIXED = ["sliding_attention", "full_attention"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}

# name: (model type, fields of its config). Named after the model type, and what is particular.
CAUSAL = {
    "gpt2": ("gpt2", gpt2()),
    "gpt_neo": ("gpt_neo", llama(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=5)),
    "gpt_neox": ("gpt_neox", llama(rotary_pct=0.25)),
    "gpt_neox, tied": ("gpt_neox", llama(use_parallel_residual=False, tie_word_embeddings=True)),
    "gpt_neox_japanese": ("gpt_neox_japanese", llama()),
    "gptj": ("gptj", gpt2(rotary_dim=4)),
    "codegen": ("codegen", gpt2(rotary_dim=4)),
    "gpt_bigcode": ("gpt_bigcode", gpt2()),
    "gpt-sw3": ("gpt-sw3", gpt2()),
    "ctrl": ("ctrl", gpt2(dff=48)),
    "opt": ("opt", llama(**OPT)),
    "opt, narrow embedding": ("opt", llama(**OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False})),
    "bloom": ("bloom", SPECIAL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", SPECIAL | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "xglm": ("xglm", SPECIAL | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    "biogpt": ("biogpt", llama()),
    "falcon": ("falcon", FALCON),
    "falcon, alibi": ("falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, grouped": ("falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "llama": ("llama", llama()),
    "llama, tied": ("llama", llama(tie_word_embeddings=True)),
    "llama, llama3 rope": (
        "llama",
        llama(
            rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 16, **ROPE}
        ),
    ),
    "llama, yarn": (
        "llama",
        llama(rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **ROPE}),
    ),
    "llama4_text": (
        "llama4_text",
        llama(head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, no_rope_layers=[1, 0]),
    ),
    "mistral": ("mistral", llama(**WINDOW)),
    "ministral": ("ministral", llama(head_dim=8, **WINDOW)),
    "ministral3": ("ministral3", llama(head_dim=8)),
    "mixtral": ("mixtral", llama(**LOCAL_EXPERTS, **WINDOW)),
    "qwen2": ("qwen2", llama()),
    "qwen2, windows": ("qwen2", llama(use_sliding_window=True, max_window_layers=1, **WINDOW)),
    "qwen2_moe": ("qwen2_moe", llama(shared_expert_intermediate_size=32, **EXPERTS)),
    "qwen3": ("qwen3", llama(head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", llama(head_dim=8, **EXPERTS)),
    "gemma": ("gemma", llama(head_dim=8)),
    "gemma2, no capping": ("gemma2", llama(final_logit_softcapping=None, **GEMMA)),
    "gemma3_text": ("gemma3_text", llama(layer_types=MIXED, **GEMMA)),
    "gemma3": (
        "gemma3",
        {
            "text_config": llama(model_type="gemma3_text", layer_types=MIXED, **GEMMA),
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 60,
            "boi_token_index": 61,
            "eoi_token_index": 62,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        llama(
            head_dim=8,
            global_head_dim=8,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            final_logit_softcapping=None,
            layer_types=MIXED * 2,
            **WINDOW,
        ),
    ),
    "vaultgemma": ("vaultgemma", llama(final_logit_softcapping=None, **GEMMA)),
    "phi": ("phi", llama(partial_rotary_factor=0.5)),
    "phi3": ("phi3", llama(original_max_position_embeddings=128, **WINDOW)),
    "phi3, longrope": (
        "phi3",
        llama(
            original_max_position_embeddings=64,
            rope_parameters={"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
            | {"original_max_position_embeddings": 64, **ROPE},
        ),
    ),
    "phimoe": ("phimoe", llama(sliding_window=None, **LOCAL_EXPERTS)),
    "stablelm": ("stablelm", llama(partial_rotary_factor=0.5)),
    "persimmon": ("persimmon", llama()),
    "olmo": ("olmo", llama(clip_qkv=8.0)),
    "olmo2": ("olmo2", llama()),
    "olmo3": ("olmo3", llama(**WINDOW)),
    "olmoe": ("olmoe", llama(num_experts=4, num_experts_per_tok=2)),
    "flex_olmo": ("flex_olmo", llama(num_experts=4, num_experts_per_tok=2)),
    "granite, no scaling": ("granite", llama(logits_scaling=1.0, embedding_multiplier=12.0, attention_multiplier=0.3)),
    "granitemoe, no scaling": ("granitemoe", llama(logits_scaling=1.0, embedding_multiplier=12.0, **LOCAL_EXPERTS)),
    "cohere, no scaling": ("cohere", llama(logit_scale=1.0)),
    "starcoder2": ("starcoder2", llama(**WINDOW)),
    "smollm3": ("smollm3", llama(no_rope_layers=[1, 0], use_sliding_window=False)),
    "deepseek_v2": ("deepseek_v2", llama(q_lora_rank=None, **LATENT)),
    "deepseek_v3": ("deepseek_v3", llama(q_lora_rank=16, **LATENT)),
    "nemotron": ("nemotron", llama(partial_rotary_factor=0.5)),
    "gpt_oss": ("gpt_oss", llama(head_dim=8, **LOCAL_EXPERTS, **WINDOW)),
    "glm": ("glm", llama(head_dim=8)),
    "glm4": ("glm4", llama(head_dim=8)),
    "exaone4": ("exaone4", llama(sliding_window_pattern=2, **WINDOW)),
    "jetmoe": ("jetmoe", llama(kv_channels=8, **LOCAL_EXPERTS)),
    "helium": ("helium", llama(head_dim=8)),
    "ernie4_5": ("ernie4_5", llama(head_dim=8)),
    "seed_oss": ("seed_oss", llama(head_dim=8)),
    "apertus": ("apertus", llama()),
    "arcee": ("arcee", llama()),
    "diffllama": ("diffllama", llama()),
    "doge": ("doge", llama()),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", llama(head_dim=8)),
    "bitnet": ("bitnet", llama()),
    "cwm": ("cwm", llama()),
    "bert-generation": ("bert-generation", llama(is_decoder=True)),
}
SEQ2SEQ = {
    "t5": ("t5", t5()),
    "t5, v1.1": ("t5", t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("mt5", t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "umt5": ("umt5", t5(feed_forward_proj="gated-gelu")),
    "longt5, local": ("longt5", t5(local_radius=4, global_block_size=4)),
    "longt5, global": (
        "longt5",
        t5(local_radius=4, global_block_size=4, encoder_attention_type="transient-global"),
    ),
    "switch_transformers": (
        "switch_transformers",
        t5(num_experts=4, expert_capacity=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    ),
    "bart": ("bart", bart()),
    "bart, scaled": ("bart", bart(scale_embedding=True)),
    "mbart": ("mbart", bart(scale_embedding=True)),
    "plbart": ("plbart", bart()),
    "mvp": ("mvp", bart()),
    "pegasus": ("pegasus", bart(decoder_start_token_id=PAD)),
    "pegasus_x": ("pegasus_x", bart(decoder_start_token_id=PAD, block_size=8, num_global_tokens=4)),
    "bigbird_pegasus, full": ("bigbird_pegasus", bart(attention_type="original_full")),
    "marian": ("marian", bart(decoder_start_token_id=PAD, scale_embedding=True)),
    "marian, two vocabularies": (
        "marian",
        bart(
            decoder_start_token_id=PAD,
            share_encoder_decoder_embeddings=False,
            decoder_vocab_size=VOCABULARY - 8,
        ),
    ),
    "blenderbot": ("blenderbot", bart()),
    "blenderbot-small": ("blenderbot-small", bart()),
    "led": (
        "led",
        bart(max_encoder_position_embeddings=128, max_decoder_position_embeddings=64, attention_window=4),
    ),
}

CAPPED = "changes its logits after the output layer"
HEADED = "changes its hidden states before the output layer"
STATES = "does not decode with a cache of keys and values"
COLUMNS = "positions counted from the first column"
MAMBA = SPECIAL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
# name: (model type, fields, what the refusal says). Encoder-decoders have "seq2seq" in their name.
REFUSED = {
    "gemma2": ("gemma2", llama(**GEMMA), CAPPED),
    "granite": ("granite", llama(logits_scaling=8.0), CAPPED),
    "cohere": ("cohere", llama(logit_scale=0.0625), CAPPED),
    "cohere2": ("cohere2", llama(logit_scale=0.25, **WINDOW), CAPPED),
    "nanochat": ("nanochat", llama(final_logit_softcapping=15.0), CAPPED),
    "bert": ("bert", llama(is_decoder=True), HEADED),
    "roberta": ("roberta", llama(is_decoder=True), HEADED),
    "electra": ("electra", llama(is_decoder=True), HEADED),
    "modernbert-decoder": ("modernbert-decoder", llama(local_attention=6, sep_token_id=2, cls_token_id=1), HEADED),
    "mamba": ("mamba", MAMBA, STATES),
    "jamba": ("jamba", llama(num_experts=2, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=8), STATES),
    "lfm2": ("lfm2", llama(layer_types=["conv", "full_attention"]), STATES),
    "openai-gpt": ("openai-gpt", gpt2(), STATES),
    "bart, decoder alone": ("bart", decoder_of(), COLUMNS),
    "mbart, decoder alone": ("mbart", decoder_of(), COLUMNS),
    "pegasus, decoder alone": ("pegasus", decoder_of(), COLUMNS),
    "marian, decoder alone": ("marian", decoder_of(), COLUMNS),
    "blenderbot, decoder alone": ("blenderbot", decoder_of(), COLUMNS),
    "trocr": (
        "trocr",
        SPECIAL | {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        COLUMNS,
    ),
    "bert-generation, encoder": ("bert-generation", llama(), "attention to later tokens: is_decoder"),
    "m2m_100 (nllb)": ("m2m_100", bart(), "positions that skip pad tokens"),
    "m2m_100 (nllb), pad 1": ("m2m_100", bart(pad_token_id=1, bos_token_id=0), "positions that skip pad tokens"),
    "bigbird_pegasus": ("bigbird_pegasus", bart(block_size=2, num_random_blocks=1), "attention_type: original_full"),
    "prophetnet": (
        "prophetnet",
        SPECIAL
        | {"hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4}
        | {"num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1},
        HEADED,
    ),
}

KEPT = ("A_log", "conv1d", "rotary", "inv_freq", "sinks", "e_score_correction")  # no weights of a matrix product


def build(model_type, fields, seed=0):
    """The model, with weights so large that layers, positions and biases all show in its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **fields)
        model = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)
        for name, weight in model.named_parameters():  # tied ones once
            if not weight.requires_grad or any(part in name for part in KEPT):
                continue
            noise = torch.randn_like(weight)
            weight.data = noise * 1.3 / math.sqrt(weight.shape[-1]) if weight.ndim > 1 else weight.data + 0.1 * noise
    return model.eval()
