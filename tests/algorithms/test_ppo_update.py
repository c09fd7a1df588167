"""A PPO batch against a second implementation: plain loops over rows and tokens, without padding or batches."""

import math

import pytest
import torch

from elastic_lightning.algorithms import PPOConfig
from elastic_lightning.algorithms.ppo.update import mini_batches

LR, CLIP, VALUE_CLIP, VALUE_COEFFICIENT, ENTROPY_COEFFICIENT = 5e-3, 0.1, 0.1, 0.3, 0.02
GAMMA, LAM, BETA, MAX_NORM = 0.97, 0.9, 0.2, 0.8
# A gradient that is only rounding (a key's bias has none) must not become a step of full size.
EPS = 1e-4


def rows_of(batch):
    """Each row as (prompt ids, response ids), padding gone."""
    prompts, rollout = batch.prompts, batch.rollout
    return [
        (prompts.tokens[row][prompts.mask[row]].tolist(), rollout.tokens[row][rollout.mask[row]].tolist())
        for row in range(len(prompts.tokens))
    ]


def forward(model, prompt, response):
    """Logits [T, V] and last hidden states [T, H] that predict a response's tokens."""
    if model.config.is_encoder_decoder:
        before = torch.tensor([[model.config.decoder_start_token_id, *response[:-1]]])
        output = model(input_ids=torch.tensor([prompt]), decoder_input_ids=before, output_hidden_states=True)
        return output.logits[0], output.decoder_hidden_states[-1][0]
    output = model(input_ids=torch.tensor([prompt + response]), output_hidden_states=True)
    return output.logits[0, len(prompt) - 1 :], output.hidden_states[-1][0, len(prompt) - 1 :]


def evaluate(model, head, prompt, response, temperature):
    """Log-probability, entropy and value at each response token, of one row alone."""
    logits, hidden = forward(model, prompt, response)
    logprobs, entropies, values = [], [], []
    for position, token in enumerate(response):
        distribution = torch.log_softmax(logits[position] / temperature, dim=-1)
        logprobs.append(distribution[token])
        entropies.append(-(distribution.exp() * distribution).sum())
        values.append(hidden[position] @ head.weight[0] + head.bias[0])
    return logprobs, entropies, values


def advantages_and_returns(rewards, values):
    advantages = [0.0] * len(rewards)
    for start in range(len(rewards)):
        for step in range(start, len(rewards)):
            after = values[step + 1] if step + 1 < len(rewards) else 0.0
            delta = rewards[step] + GAMMA * after - values[step]
            advantages[start] += (GAMMA * LAM) ** (step - start) * delta
    return advantages, [advantage + value for advantage, value in zip(advantages, values, strict=True)]


def brute_force(model, head, reference, rows, scores, orders, temperature):
    """Parameters after the whole PPO batch, for `orders`: the rows of each mini-batch, in turn."""
    with torch.no_grad():
        old = [evaluate(model, head, *row, temperature) for row in rows]
        anchor = [evaluate(reference, head, *row, temperature)[0] for row in rows]
    old_logprobs = [[x.item() for x in logprobs] for logprobs, _, _ in old]
    old_values = [[x.item() for x in values] for _, _, values in old]
    advantages, returns, kl = [], [], 0.0
    for row, score in enumerate(scores):
        penalties = [p - q.item() for p, q in zip(old_logprobs[row], anchor[row], strict=True)]
        kl += sum(penalties) / len(scores)
        rewards = [-BETA * penalty for penalty in penalties]
        rewards[-1] += score
        row_advantages, row_returns = advantages_and_returns(rewards, old_values[row])
        advantages.append(row_advantages)
        returns.append(row_returns)
    flat = [x for row in advantages for x in row]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat) + 1e-8)

    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, eps=EPS, weight_decay=0.0)
    for chosen in orders:
        total, tokens = 0.0, sum(len(rows[row][1]) for row in chosen)
        for row in chosen:
            logprobs, entropies, values = evaluate(model, head, *rows[row], temperature)
            for t in range(len(logprobs)):
                advantage = (advantages[row][t] - mean) / spread
                ratio = (logprobs[t] - old_logprobs[row][t]).exp()
                held = min(max(ratio, 1 - CLIP), 1 + CLIP)
                policy = -min(ratio * advantage, held * advantage)
                before, target = old_values[row][t], returns[row][t]
                clipped = before + min(max(values[t] - before, -VALUE_CLIP), VALUE_CLIP)
                value = 0.5 * max((values[t] - target) ** 2, (clipped - target) ** 2)
                total = total + policy + VALUE_COEFFICIENT * value - ENTROPY_COEFFICIENT * entropies[t]
        optimizer.zero_grad(set_to_none=False)  # where every value is clipped, Adam's momentum goes on
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
    return kl


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("micro", [None, 1])
def test_whole_batch_against_brute_force(any_toy, tmp_path, temperature, micro):
    module = any_toy.ppo(
        epochs=2,
        mini_batches=2,
        micro_batch_size=micro,
        learning_rate=LR,
        adam_eps=EPS,
        clip=CLIP,
        value_clip=VALUE_CLIP,
        value_coefficient=VALUE_COEFFICIENT,
        entropy_coefficient=ENTROPY_COEFFICIENT,
        gamma=GAMMA,
        lam=LAM,
        kl_coefficient=BETA,
        max_grad_norm=MAX_NORM,
        sampling={"temperature": temperature},
    )
    any_toy.perturb(module, 0.03)
    batch = any_toy.prompts(rows=5)
    model, reference = any_toy.plain_model(), any_toy.plain_model()
    model.load_state_dict(module.actor.lm.model.state_dict())
    head = torch.nn.Linear(16, 1)
    head.load_state_dict(module.actor.value_head.state_dict())
    every = torch.ones(5, dtype=torch.bool)
    orders = [rows.tolist() for rows in mini_batches(module.sampling_seed, 0, every, module.config)]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    trainer = any_toy.fit(module, tmp_path, [batch])
    rows = rows_of(module.seen[0])
    words = [[token for token in response if token < 27] for _, response in rows]
    scores = [ids.count(3) / max(len(ids), 1) for ids in words]
    kl = brute_force(model, head, reference, rows, scores, orders, temperature)

    assert len({len(response) for _, response in rows}) > 1
    assert trainer.callback_metrics["train/kl"] == pytest.approx(kl, abs=1e-4)
    assert trainer.callback_metrics["train/clip_fraction"] > 0
    assert trainer.callback_metrics["train/value_clip_fraction"] > 0
    ours = dict(module.actor.lm.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, atol=1e-5, rtol=0)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(dict(module.actor.value_head.named_parameters())[name], parameter, atol=1e-5, rtol=0)
    assert max((parameter - start[name]).abs().max() for name, parameter in model.named_parameters()) > 1e-3


def test_every_row_is_used_once_an_epoch_and_epochs_differ():
    every, config = torch.ones(16, dtype=torch.bool), PPOConfig(epochs=3, mini_batches=1)
    orders = list(mini_batches(0, 0, every, config))
    assert all(sorted(order.tolist()) == list(range(16)) for order in orders)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert not torch.equal(next(mini_batches(0, 1, every, config)), orders[0])
    assert not torch.equal(next(mini_batches(1, 0, every, config)), orders[0])


@pytest.mark.parametrize("trunk", [False, True])
def test_micro_batches_equal_one_batch(any_toy, tmp_path, trunk):
    weights, gradients = {}, {}
    for size in (None, 3, 1):
        options = {
            "epochs": 1,
            "mini_batches": 1,
            "adam_eps": EPS,
            "value_coefficient": 0.5,
            "entropy_coefficient": 0.1,
        }
        module = any_toy.ppo(micro_batch_size=size, separate_value_trunk=trunk, **options)
        any_toy.perturb(module)
        batches = [any_toy.prompts(rows=8)]
        any_toy.fit(module, tmp_path, batches)
        assert len(set(module.seen[0].rollout.mask.sum(1).tolist())) > 1  # micro-batches of unlike token counts
        weights[size] = {n: p.detach().clone() for n, p in module.actor.named_parameters()}
        gradients[size] = {n: p.grad.clone() for n, p in module.actor.named_parameters() if p.grad is not None}
    for size in (3, 1):
        assert gradients[size].keys() == gradients[None].keys()
        for name, gradient in gradients[None].items():
            torch.testing.assert_close(gradients[size][name], gradient, atol=1e-6, rtol=1e-4)
        for name, weight in weights[None].items():
            torch.testing.assert_close(weights[size][name], weight, atol=1e-6, rtol=0)
    assert gradients[None]["value_head.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"kl_penalty": "adaptive"}, {"whiten_rewards": True}])
def test_several_mini_batches_do_not_depend_on_micro_batches(toy, tmp_path, options):
    results = []
    for size in (None, 2):
        module = toy.ppo(micro_batch_size=size, adam_eps=EPS, **options)
        trainer = toy.fit(module, tmp_path, [toy.prompts(rows=7, seed=s) for s in range(2)])
        metrics = {n: v.item() for n, v in trainer.callback_metrics.items() if n.startswith("train/")}
        results.append((module, metrics))
    (whole, metrics), (cut, cut_metrics) = results
    for name, parameter in whole.actor.named_parameters():
        torch.testing.assert_close(dict(cut.actor.named_parameters())[name], parameter, atol=3e-6, rtol=0)
    assert cut_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-4)
