"""Every architecture of docs/models.md against plain transformers, one row at a time without padding.

Run as a program it prints the table that stands there: ``python tests/policies/test_architectures.py``.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import CAUSAL, EOS, PAD, REFUSED, SEQ2SEQ, VOCABULARY, build
from policy_cases import left_padded, one_line, plain_logits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from elastic_lightning.errors import UserError
from elastic_lightning.policies import (
    ActorCritic,
    LoRA,
    Sampling,
    as_policy,
    counter_uniforms,
    greedy,
    load_policy,
    right_padded,
    sample,
)
from elastic_lightning.policies.saving import save_model

ROWS = [[5, 9, 20, 33, 41, 6, 7], [7], [3, 44, 6, 8, 11, 29, 50, 12, 9, 10, 11], [12, 13]]
TEMPERATURE, NEW, TOLERANCE = 0.7, 8, 1e-4
WORKING = CAUSAL | SEQ2SEQ
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"


class Deviations(NamedTuple):
    """Largest differences from plain transformers: of log-probabilities while sampling and in the update, of the logits
    of the exported policy, and of those of a merged adapter."""

    sampler: float
    update: float
    final: float
    lora: float


def save(model, folder):
    """Model and a tokenizer of its vocabulary as a folder."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": f"w{PAD}", "eos_token": f"w{EOS}", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def reloaded(folder, seq2seq):
    return (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(folder).eval()


@torch.no_grad()
def largest(differences: Iterator[torch.Tensor]) -> float:
    return max(difference.abs().max().item() for difference in differences)


def against_plain(model, statistics, rollout):
    """The largest difference of log-probabilities [B, T] from those of the model's own forward, row by row."""

    def differences():
        for i, row in enumerate(ROWS):
            tokens = rollout.tokens[i][rollout.mask[i]]
            scaled = (plain_logits(model, row, tokens.tolist()).double() / TEMPERATURE).log_softmax(-1)
            yield statistics[i][rollout.mask[i]] - scaled.gather(-1, tokens[:, None])[:, 0]

    return largest(differences())


def export_differs(lm, tokenizer, folder, seq2seq, rollout):
    """The largest difference between logits of a policy and those of its export, which must also write the same."""
    save_model(lm.model, tokenizer, folder)
    plain = reloaded(folder, seq2seq)
    responses = [rollout.tokens[i][rollout.mask[i]].tolist() for i in range(len(ROWS))]
    pairs = list(zip(ROWS, responses, strict=True))
    difference = largest(plain_logits(plain, *pair) - plain_logits(lm.model, *pair) for pair in pairs)
    prompts = left_padded(ROWS)
    ours = greedy(lm, prompts, NEW, EOS, PAD)
    tokens, mask = right_padded(prompts) if seq2seq else prompts
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": EOS}
    written = plain.generate(input_ids=tokens, attention_mask=mask.long(), **options)
    written = written[:, 1:] if seq2seq else written[:, tokens.shape[1] :]
    assert written.shape == ours.tokens.shape and torch.equal(written[ours.mask], ours.tokens[ours.mask])
    return difference


def adapted(folder):
    """The policy with an adapter on all its matrices but the output layer and the routers of experts, away from 0."""
    whole = load_policy(folder).model
    head = whole.get_output_embeddings()
    matrices = [
        name for name, part in whole.named_modules() if isinstance(part, nn.Linear | Conv1D) and part is not head
    ]
    targets = {name.rpartition(".")[2] for name in matrices if "router" not in name and not name.endswith("gate")}
    targets = sorted(target for target in targets if not target.isdecimal())  # a place in a list is no name
    torch.manual_seed(2)
    loaded = load_policy(folder, lora=LoRA(rank=2, alpha=4, targets=targets))
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return as_policy(loaded.model)


def measure(name: str, folder: Path) -> Deviations:
    """Load, sample, take a step of the update, export; and the same of an adapter."""
    seq2seq = name in SEQ2SEQ
    source = save(build(*WORKING[name]), folder / "source")
    plain, loaded = reloaded(source, seq2seq), load_policy(source)
    actor = ActorCritic(as_policy(loaded.model)).eval()
    sampling, uniforms = Sampling(NEW, temperature=TEMPERATURE), counter_uniforms(1, 0, torch.arange(len(ROWS)), NEW)
    prompts = left_padded(ROWS)
    rollout = sample(actor, prompts, sampling, uniforms, EOS, PAD)
    sampler = against_plain(plain, rollout.logprobs, rollout)
    loss, evaluation = actor(prompts, rollout.responses, lambda logprobs, entropy, part: -logprobs.sum(), TEMPERATURE)
    update = against_plain(plain, evaluation.logprobs, rollout)
    loss.backward()
    torch.optim.SGD(actor.lm.parameters(), lr=1e-3).step()
    final = export_differs(actor.lm, loaded.tokenizer, folder / "final", seq2seq, rollout)
    lm = adapted(source)
    lora = export_differs(lm, loaded.tokenizer, folder / "merged", seq2seq, rollout)
    return Deviations(sampler, update, final, lora)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKING)
def test_an_architecture_is_what_plain_transformers_make_of_it(name, tmp_path):
    deviations = measure(name, tmp_path)
    assert all(value <= TOLERANCE for value in deviations), deviations


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name_at_load(name):
    model_type, fields, reason = REFUSED[name]
    model = build(model_type, fields)
    with pytest.raises(UserError) as error:
        as_policy(model)
    one_line(error, type(model).__name__, reason)


def test_the_document_names_what_is_tested():
    rows = re.findall(r"^\| ([^|]+?) +\| ([^|]+?) +\|", DOCUMENT.read_text(), re.MULTILINE)
    names = [name for name, _ in rows if name not in ("architecture", "refused") and not name.startswith("-")]
    assert names == [*WORKING, *REFUSED]


def main() -> int:
    """Print the tables."""
    print("| architecture | sampler | update | exported | adapter merged |\n| --- | --- | --- | --- | --- |")
    for name in WORKING:
        with tempfile.TemporaryDirectory() as folder:
            deviations = [f"{value:.0e}" for value in measure(name, Path(folder))]
        print("|", " | ".join([name, *deviations]), "|", flush=True)
    print("\n| refused | because it |\n| --- | --- |")
    for name, (model_type, fields, _) in REFUSED.items():
        try:
            as_policy(build(model_type, fields))
        except UserError as error:
            print(f"| {name} | {str(error).split(': such an architecture')[0]} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
