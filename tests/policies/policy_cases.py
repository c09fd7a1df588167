"""Policies and prompts that several tests use, and the oracle: plain transformers, one row at a time, no padding."""

import torch

from elastic_lightning.policies import ActorCritic, CausalLM, LoRA, Prompts, load_policy

ROWS = [[5, 9, 20], [7], [3, 4, 6, 8, 11, 29, 2], [12, 13]]


def left_padded(rows, extra=0, pad=0):
    """Prompts of the rows, padded on the left to the longest and `extra` more."""
    length = max(map(len, rows)) + extra
    tokens = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return Prompts(tokens, mask)


def make_actor(folder, lora=False, separate_value_trunk=False):
    """A policy whose value head, adapters and value trunk are all away from their start."""
    torch.manual_seed(1)
    model = load_policy(folder, lora=LoRA(rank=2, alpha=4) if lora else None).model
    actor = ActorCritic(CausalLM(model), separate_value_trunk).eval()
    with torch.no_grad():
        actor.value_head.weight.normal_()
        actor.value_head.bias.fill_(0.5)
        for name, parameter in actor.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
            elif "value_trunk" in name and parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return actor


@torch.no_grad()
def plain_logprobs(model, prompt, response, temperature):
    """Log-probabilities [T] of the response's tokens by the model's own forward."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    scaled = torch.log_softmax(logits.double() / temperature, dim=-1)
    return torch.stack([scaled[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


@torch.no_grad()
def plain_values(actor, prompt, response):
    """Values [T] before each response token by a plain forward of the trunk that makes them."""
    trunk = actor.value_trunk if actor.value_trunk is not None else actor.lm.backbone
    hidden = trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
    return hidden @ actor.value_head.weight[0] + actor.value_head.bias
