"""The language model as a policy: loading, value head, reference and sampling."""

from elastic_lightning.policies.actor_critic import ActorCritic, Evaluation
from elastic_lightning.policies.batches import PairedTexts, Prompts, Responses, right_padded
from elastic_lightning.policies.causal import CausalLM
from elastic_lightning.policies.graph_sampling import GraphSampler
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.loading import (
    LoadedPolicy,
    LoRA,
    ModelSource,
    as_policy,
    load_policy,
    load_source,
    load_tokenizer,
)
from elastic_lightning.policies.reference import AdapterOff, FrozenCopy, make_reference
from elastic_lightning.policies.rollout_copy import RolloutCopy
from elastic_lightning.policies.sampling import Rollout, Sampling, counter_uniforms, draw, sample
from elastic_lightning.policies.seq2seq import Seq2SeqLM
from elastic_lightning.policies.text import Texts, decode_texts, encode_sources, encode_targets, ended

__all__ = [
    "ActorCritic",
    "AdapterOff",
    "CausalLM",
    "Evaluation",
    "FrozenCopy",
    "GraphSampler",
    "LoRA",
    "LoadedPolicy",
    "ModelSource",
    "PairedTexts",
    "PolicyLM",
    "Prompts",
    "Responses",
    "Rollout",
    "RolloutCopy",
    "Sampling",
    "Seq2SeqLM",
    "Texts",
    "as_policy",
    "counter_uniforms",
    "decode_texts",
    "draw",
    "encode_sources",
    "encode_targets",
    "ended",
    "load_policy",
    "load_source",
    "load_tokenizer",
    "make_reference",
    "right_padded",
    "sample",
]
