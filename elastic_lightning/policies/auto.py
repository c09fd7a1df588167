"""One auto class for causal models and encoder-decoders."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from elastic_lightning.errors import UserError


class AutoLanguageModel:
    """Transformers' auto class for language models of both kinds: the config says which one a model is."""

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """The model at a path, with a report where ``output_loading_info`` asks for it."""
        where = ("gguf_file", "local_files_only", "trust_remote_code")
        config = AutoConfig.from_pretrained(path, **{name: options[name] for name in where if name in options})
        loaded = cls._kind(config).from_pretrained(path, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if "Sinusoidal" in type(module).__name__:  # loading makes a parameter to be trained of these constants
                module.requires_grad_(False)
        return loaded

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
        """Random weights in the shape of a config."""
        return cls._kind(config).from_config(config, **options)

    @staticmethod
    def _kind(config: PreTrainedConfig) -> type:
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        own_code = kind.__name__ in (getattr(config, "auto_map", None) or {})
        if type(config) not in kind._model_mapping and not own_code:
            raise UserError(
                f"a model of type {config.model_type} writes no text: transformers' {kind.__name__} has none such"
            )
        return kind
