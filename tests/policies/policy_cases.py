"""Policies and prompts that several tests use, and the oracle: plain transformers, one row at a time, no padding."""

import pytest
import torch

from elastic_lightning.policies import ActorCritic, LoRA, Prompts, as_policy, load_policy
from elastic_lightning.policies.saving import save_model

CAUSAL, SEQ2SEQ = ["gpt2_folder", "llama_folder"], ["marian_folder", "bart_folder", "t5_folder"]
EVERY_KIND = pytest.mark.parametrize("folder", CAUSAL + SEQ2SEQ)
ROWS = [[5, 9, 20], [7], [3, 4, 6, 8, 11, 29, 2], [12, 13]]


def left_padded(rows, extra=0, pad=0):
    """Prompts of the rows, padded on the left to the longest and `extra` more."""
    length = max(map(len, rows)) + extra
    tokens = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Prompts(tokens, mask)


def make_actor(folder, lora=False, separate_value_trunk=False):
    """A policy whose value head, adapters and value trunk are all away from their start."""
    if lora:
        pytest.importorskip("peft")
    torch.manual_seed(1)
    model = load_policy(folder, lora=LoRA(rank=2, alpha=4) if lora else None).model
    actor = ActorCritic(as_policy(model), separate_value_trunk).eval()
    with torch.no_grad():
        actor.value_head.weight.normal_()
        actor.value_head.bias.fill_(0.5)
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
            elif "value_trunk" in name and parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return actor


def inputs_of(model, prompt, response):
    """What the model's own forward reads, and which of its positions predict the response."""
    if model.config.is_encoder_decoder:
        before = [model.config.decoder_start_token_id, *response[:-1]]
        inputs = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([before])}
        return inputs, slice(None)
    return {"input_ids": torch.tensor([prompt + response])}, slice(len(prompt) - 1, -1)


@torch.no_grad()
def plain_logits(model, prompt, response):
    """Logits [T, V] that predict the response's tokens by the model's own forward."""
    inputs, at = inputs_of(model, prompt, response)
    return model(**inputs).logits[0, at]


def plain_logprobs(model, prompt, response, temperature):
    """Log-probabilities [T] of the response's tokens."""
    scaled = torch.log_softmax(plain_logits(model, prompt, response).double() / temperature, dim=-1)
    return torch.stack([scaled[t, token] for t, token in enumerate(response)])


@torch.no_grad()
def plain_values(actor, prompt, response):
    """Values [T] before each response token by a plain forward of the trunk that makes them."""
    trunk = actor.value_trunk if actor.value_trunk is not None else actor.lm.backbone
    inputs, at = inputs_of(actor.lm.model, prompt, response)
    if "decoder_input_ids" in inputs:
        source = trunk.encoder(input_ids=inputs["input_ids"]).last_hidden_state
        trunk, inputs = trunk.decoder, {"input_ids": inputs["decoder_input_ids"], "encoder_hidden_states": source}
    hidden = trunk(**inputs).last_hidden_state[0, at]
    return hidden @ actor.value_head.weight[0] + actor.value_head.bias


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    for part in parts:
        assert part in message
    return message


def adapter_folder(tmp_path, base, **options):
    model, tokenizer, _ = load_policy(base, lora=LoRA(rank=2, **options))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_model(model, tokenizer, tmp_path / "adapter", adapter="adapter")
    return model, str(tmp_path / "adapter")
