"""The language model as a policy: loading, value head, reference and sampling."""

from elastic_lightning.policies.actor_critic import ActorCritic, Evaluation
from elastic_lightning.policies.batches import PairedTexts, Prompts, Responses, right_padded
from elastic_lightning.policies.causal import CausalLM
from elastic_lightning.policies.encoding import encode_source, encode_target, pad
from elastic_lightning.policies.graph_sampling import GraphSampler
from elastic_lightning.policies.language_model import PolicyLM
from elastic_lightning.policies.loading import LoadedPolicy, as_policy, load_policy, load_source, load_tokenizer
from elastic_lightning.policies.pairs import GameEvaluationBatch, PreferenceBatch, TranslationBatch
from elastic_lightning.policies.reference import AdapterOff, FrozenCopy, make_reference
from elastic_lightning.policies.rollout_copy import RolloutCopy
from elastic_lightning.policies.sampler import Sampler
from elastic_lightning.policies.sampling import Rollout, Sampling, counter_uniforms, draw, draw_lengths, greedy, sample
from elastic_lightning.policies.seq2seq import Seq2SeqLM
from elastic_lightning.policies.sources import LoRA, ModelSource
from elastic_lightning.policies.text import Texts, decode_texts, ended
from elastic_lightning.policies.translator import Translator, load_translator

__all__ = [
    "ActorCritic",
    "AdapterOff",
    "CausalLM",
    "Evaluation",
    "FrozenCopy",
    "GameEvaluationBatch",
    "GraphSampler",
    "LoRA",
    "LoadedPolicy",
    "ModelSource",
    "PairedTexts",
    "PolicyLM",
    "PreferenceBatch",
    "Prompts",
    "Responses",
    "Rollout",
    "RolloutCopy",
    "Sampler",
    "Sampling",
    "Seq2SeqLM",
    "Texts",
    "TranslationBatch",
    "Translator",
    "as_policy",
    "counter_uniforms",
    "decode_texts",
    "draw",
    "draw_lengths",
    "encode_source",
    "encode_target",
    "ended",
    "greedy",
    "load_policy",
    "load_source",
    "load_tokenizer",
    "load_translator",
    "make_reference",
    "pad",
    "right_padded",
    "sample",
]
