"""Rollout with log-probabilities and values beside `generate`: `python benchmarks/rollout.py`.

Everything runs in one process, one after the other, round by round; the first round is a warm-up. Ours keeps
log-probabilities and values while it draws; `generate` gives tokens alone, and needs a second forward for the rest.

The bandwidth limit is what a machine that did nothing but read could decode: every token reads all weights and the
cache once, at the speed at which this machine copies (bytes read and written, large arrays).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from measure import runnable, save, spread, synchronise, table
from shapes import Shape, default_shape, prepare, prompts
from transformers import AutoModelForCausalLM

from elastic_lightning.policies import (
    ActorCritic,
    CausalLM,
    GraphSampler,
    Prompts,
    RolloutCopy,
    Sampling,
    counter_uniforms,
    load_policy,
    sample,
)

EOS, PAD = 0, 1
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COPY_BYTES = 2**28


def cases(shape: Shape) -> dict[str, Callable[[], None]]:
    """What is timed: each draws one batch of responses."""
    folder = prepare(shape) / "policy"
    tokens = prompts(shape, 1).to(DEVICE)
    batch = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    actor = ActorCritic(CausalLM(load_policy(str(folder)).model)).eval().to(DEVICE)
    lower = RolloutCopy(actor.lm, torch.bfloat16).to(DEVICE)
    sampling = Sampling(max_new_tokens=shape.response, min_new_tokens=shape.response)
    rows = torch.arange(shape.batch, device=DEVICE)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval().to(DEVICE)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(DEVICE)
    step = iter(range(10**6))

    def ours(lm: CausalLM) -> Callable[[], None]:
        graphs = GraphSampler(actor, sampling, EOS, PAD, lm) if DEVICE.type == "cuda" else None

        def run() -> None:
            if lm is lower.lm:
                lower.refresh(actor.lm)  # part of what a rollout in bfloat16 costs
            uniforms = counter_uniforms(1, next(step), rows, shape.response)
            if graphs is not None:
                graphs(batch, uniforms)
            else:
                sample(actor, batch, sampling, uniforms, EOS, PAD, lm)

        return run

    def generate(model, second_forward: bool = False, **options) -> Callable[[], None]:
        def run() -> None:
            length = {"max_new_tokens": shape.response, "min_new_tokens": shape.response}
            drawn = model.generate(
                tokens, attention_mask=batch.mask.long(), do_sample=True, top_k=0, pad_token_id=PAD, **length, **options
            )
            if second_forward:
                hidden = model.base_model(drawn[:, :-1]).last_hidden_state[:, shape.prompt - 1 :]
                logits = model.get_output_embeddings()(hidden)
                logits.log_softmax(-1).gather(-1, drawn[:, shape.prompt :, None])

        return run

    found = {
        "ours float32": ours(actor.lm),
        "ours bfloat16": ours(lower.lm),
        "generate float32": generate(plain),
        "generate float32 + forward": generate(plain, second_forward=True),
        "generate bfloat16": generate(half),
        "generate float32, static cache": generate(plain, cache_implementation="static", disable_compile=True),
    }
    if DEVICE.type == "cuda":
        found["generate bfloat16, static cache, compiled"] = generate(half, cache_implementation="static")
        found["ours float32, eager"] = lambda: sample(
            actor, batch, sampling, counter_uniforms(1, next(step), rows, shape.response), EOS, PAD
        )
    return found


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of a large array."""
    source = torch.ones(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronise()
        began = time.perf_counter()
        target.copy_(source)
        synchronise()
        seconds.append(time.perf_counter() - began)
    return 2 * COPY_BYTES / statistics.median(seconds[1:])


def bytes_a_token(shape: Shape, size: int) -> float:
    """Bytes that decoding one token a row must read: the weights, and half the responses' cache on average."""
    columns = shape.prompt + shape.response / 2
    cache = 2 * shape.batch * columns * shape.layers * shape.kv_width
    return size * (shape.weights_read + cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="only cases whose name starts with one of these")
    parser.add_argument("--rounds", type=int, default=5, help="measured after the warm-up")
    parser.add_argument("--batch", type=int, help="prompts a batch")
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it runs")
    given = parser.parse_args()
    shape = default_shape(given.quick)
    shape = replace(shape, batch=given.batch) if given.batch else shape
    found = cases(shape)
    if given.cases:
        found = {name: run for name, run in found.items() if name.startswith(tuple(given.cases))}
    found = {name: found[name] for name in runnable(found, lambda name: "bfloat16" in name)}
    content = figures(shape, timed(found, given.rounds), copy_bandwidth())
    show(content)
    save("rollout_quick" if given.quick else "rollout", content)


def timed(found: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each case, [rounds]; one more round, the first, warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, run in found.items():
                synchronise()
                began = time.perf_counter()
                run()
                synchronise()
                if number:
                    seconds[name].append(time.perf_counter() - began)
    return seconds


def figures(shape: Shape, seconds: dict[str, list[float]], bandwidth: float) -> dict[str, Any]:
    """What is written down: speeds, shares of the bandwidth limit, and ratios round by round."""
    tokens = shape.batch * shape.response
    results = {}
    for name, measured in seconds.items():
        size = 2 if "bfloat16" in name else 4
        limit = shape.batch * bandwidth / bytes_a_token(shape, size)
        speed = tokens / statistics.median(measured)
        results[name] = {
            "seconds": spread(measured),
            "tokens_per_second": speed,
            "bandwidth_limit_tokens_per_second": limit,
            "share_of_limit": speed / limit,
        }
    ratios = {
        f"{ours} / {theirs}": statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
        for ours, theirs in (
            ("ours bfloat16", "generate float32"),
            ("ours float32", "generate float32"),
            ("ours float32", "generate float32 + forward"),
            ("ours bfloat16", "generate bfloat16"),
            ("ours float32", "ours float32, eager"),
        )
        if ours in seconds and theirs in seconds
    }
    return {"shape": asdict(shape), "copy_bytes_per_second": bandwidth, "ratios": ratios, "cases": results}


def show(content: dict[str, Any]) -> None:
    """Print the table, the ratios and the speed of a copy."""
    table(
        ["rollout", "seconds", "tokens/s", "of the bandwidth limit"],
        [
            [
                name,
                f"{result['seconds']['median']:.2f}",
                f"{result['tokens_per_second']:.0f}",
                f"{100 * result['share_of_limit']:.0f} %",
            ]
            for name, result in content["cases"].items()
        ],
    )
    for name, ratio in content["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    print(f"copy: {content['copy_bytes_per_second'] / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
