"""``elastic-lightning generate``: sample from a policy folder or a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from elastic_lightning.checks import check_counts, check_seed, check_text
from elastic_lightning.data.parallel import read_lines
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.arguments import Parser
from elastic_lightning.outputs import check_absent, check_writable, write_whole
from elastic_lightning.policies import (
    ActorCritic,
    LoRA,
    ModelSource,
    Prompts,
    Sampling,
    as_policy,
    counter_uniforms,
    draw_lengths,
    load_policy,
    load_source,
    sample,
)
from elastic_lightning.policies.checkpoints import read_checkpoint
from elastic_lightning.terminal import json_line, plain

MOST_BYTES = 2**28  # of a file of prompts: all are in memory, and a pipe or a device may have no end
MOST_RESPONSES = 10**6  # of one call: they are in memory too


def generate(
    policy: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    sampling: Sampling,
    seed: int = 1,
    samples: int = 1,
    batch_size: int = 32,
    first_row: int = 0,
    special_tokens: bool = False,
) -> list[dict[str, Any]]:
    """Draw `samples` responses to each prompt; one dict of prompt, response, complete and tokens for each.

    `tokens` is the length of the response, `complete` whether it ended by itself; `special_tokens` adds `marked`, the
    pair of prompt and response with those within them.
    Row after row has random numbers of its own, counted from `first_row`.

    Raises:
        UserError: a prompt has no tokens, or does not fit the model's context with its response.
    """
    drawn = policy.lm.drawn_tokens(tokenizer)._asdict()
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    rows: list[dict[str, Any]] = []
    for start in range(0, len(repeated), batch_size):
        batch = _encode(policy, tokenizer, repeated[start : start + batch_size])
        policy.lm.check_context(batch.tokens.shape[1], sampling.max_new_tokens)
        index = torch.arange(len(batch.tokens), device=batch.tokens.device) + first_row + start
        uniforms = counter_uniforms(seed, 0, index, sampling.max_new_tokens)
        lengths = draw_lengths(seed, 0, index, sampling)
        rollout = sample(policy, batch, sampling, uniforms, lengths=lengths, **drawn)
        texts = policy.lm.decode(tokenizer, batch, rollout.responses)
        done = [
            {"prompt": prompt, "response": response, "complete": complete, "tokens": tokens}
            for prompt, response, complete, tokens in zip(*texts, rollout.mask.sum(dim=1).tolist(), strict=True)
        ]
        if special_tokens:
            marked = policy.lm.decode(tokenizer, batch, rollout.responses, special_tokens=True)
            done = [row | {"marked": pair} for row, pair in zip(done, zip(*marked[:2], strict=True), strict=True)]
        rows += done
    return rows


def main(argv: list[str]) -> int:
    """Parse the arguments, sample, print or write JSONL."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    if not arguments.prompt and not arguments.prompts_file:
        raise UserError("no prompts: give --prompt TEXT (as often as you like) or --prompts_file FILE, one a line")
    prompts = arguments.prompt + (_lines(Path(arguments.prompts_file)) if arguments.prompts_file else [])
    if len(prompts) * arguments.samples > MOST_RESPONSES:
        raise UserError(
            f"{len(prompts)} prompts with {arguments.samples} responses each are more than {MOST_RESPONSES} responses: "
            "lower --samples, or ask in parts"
        )
    sampling = Sampling(
        arguments.max_new_tokens, arguments.min_new_tokens, arguments.temperature, arguments.top_k, arguments.top_p
    )
    policy, tokenizer = load(arguments.model, arguments.trust_remote_code)
    _place(policy, arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = generate(policy, tokenizer, prompts, sampling, arguments.seed, arguments.samples, arguments.batch_size)
    if arguments.output:
        check_absent(Path(arguments.output), arguments.force)  # it may have come meanwhile
        write_whole(Path(arguments.output), "".join(map(json_line, rows)))
        print(f"wrote {len(rows)} responses to {plain(arguments.output)}")
    else:
        for row in rows:
            print(plain(row["prompt"] + policy.lm.separator + row["response"], keep="\n\t"))
    return 0


def _lines(file: Path) -> list[str]:
    """The prompts of a file, one a line that is not empty."""
    return [line for line in read_lines(file, MOST_BYTES) if line.strip()]


def load(path: str, trust_remote_code: bool = False) -> tuple[ActorCritic, PreTrainedTokenizerBase]:
    """Policy and tokenizer from a `save_pretrained` folder, a hub id, or a ``.ckpt`` file of a PPO run.

    Code that comes with the model runs where `trust_remote_code` says so: a checkpoint alone cannot allow it.
    """
    if not path.endswith(".ckpt"):
        loaded = load_policy(path, trust_remote_code=trust_remote_code)
        return ActorCritic(as_policy(loaded.model)).eval(), loaded.tokenizer
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters", {})
    if not isinstance(settings.get("policy"), dict):
        raise UserError(f"{path} is not a checkpoint of a policy trained here: its hyper-parameters name no policy")
    fields = {**settings["policy"], "trust_remote_code": trust_remote_code}
    try:
        source = ModelSource(**{**fields, "lora": LoRA(**fields["lora"]) if fields.get("lora") else None})
    except TypeError as error:
        raise UserError(f"{path} is not a checkpoint of a policy trained here: {error}") from error
    loaded = load_source(source)
    critic = any(name.startswith("actor.value_head.") for name in checkpoint["state_dict"])  # RLOO and GRPO have none
    policy = ActorCritic(as_policy(loaded.model), settings.get("separate_value_trunk", False), critic).eval()
    _load_trained(policy, checkpoint["state_dict"], path)
    return policy, loaded.tokenizer


def _load_trained(policy: ActorCritic, state: dict[str, torch.Tensor], path: str) -> None:
    """Put a checkpoint's weights in place; it holds the trained ones, the others came with the policy's folder."""
    weights = {name.removeprefix("actor."): value for name, value in state.items() if name.startswith("actor.")}
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    own = policy.state_dict()
    if not trained <= set(weights) <= set(own) or any(
        own[name].shape != value.shape for name, value in weights.items()
    ):
        raise UserError(f"the weights in {path} are of another model than its hyper-parameters name")
    policy.load_state_dict(weights, strict=False)


def _check(arguments: argparse.Namespace) -> None:
    """What can be known to be wrong before a model is loaded."""
    check_counts("--", vars(arguments), "samples", "batch_size", "max_new_tokens")
    check_counts("--", vars(arguments), "min_new_tokens", "top_k", least=0)
    check_seed("--seed", arguments.seed)
    for prompt in arguments.prompt:
        check_text("--prompt", prompt)
    if not arguments.output:
        return
    output = Path(arguments.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output is a file to write in a folder that is there, and {output} is not")
    check_writable(output.absolute().parent, "responses")
    if arguments.prompts_file and output.exists() and output.samefile(arguments.prompts_file):
        raise UserError(f"--output would be written over the prompts in {output}: give another file")
    check_absent(output, arguments.force)


def _place(policy: ActorCritic, device: str) -> None:
    try:
        policy.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by what it is that is missing
        raise UserError(f"cannot use --device {device}: {str(error).splitlines()[0]}") from error


def _encode(policy: ActorCritic, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Prompts:
    tokens, mask = policy.lm.encode(tokenizer, texts)
    empty = [text for text, row in zip(texts, mask, strict=True) if not row.any()]
    if empty:
        raise UserError(f"the prompt {empty[0]!r} has no tokens")
    device = next(policy.parameters()).device
    return Prompts(tokens.to(device), mask.to(device))


def _parser() -> Parser:
    defaults, parser = Sampling(), Parser("generate", "Sample from a policy.")
    parser.add_argument("--model", required=True, help="save_pretrained folder, hub id, or .ckpt file of a PPO run")
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; may be given several times, and beside a file"
    )
    parser.add_argument("--prompts_file", help="a text file with one prompt a line")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=defaults.max_new_tokens, help="longest response")
    parser.add_argument("--min_new_tokens", type=int, default=defaults.min_new_tokens, help="shortest response")
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="logits are divided by it")
    parser.add_argument(
        "--top_k", type=int, default=defaults.top_k, help="draw from the k likeliest tokens; 1 is greedy, 0 keeps all"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=defaults.top_p,
        help="draw from the likeliest tokens whose probabilities reach p; 1 keeps all",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--batch_size", type=int, default=32, help="responses drawn at once")
    parser.add_argument("--device", help="such as cuda:1; by default cuda where there is one, else cpu")
    parser.add_argument("--output", help="a file of JSON lines to write; by default responses are printed")
    parser.add_argument("--force", action="store_true", help="replace the file of --output where it is there")
    parser.add_argument("--trust_remote_code", action="store_true", help="run python code that comes with the model")
    return parser
