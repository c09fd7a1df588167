"""The memory of RL on a 7B model in each arrangement, from shapes alone: `python benchmarks/memory_table.py`.

With `--check` the same computation for two small Llamas is compared with PPO batches that run on the CPU, each in a
process of its own. Measured is the largest resident set of two batches above what is resident once everything is
imported and has run on a tiny model; glibc is told to hand freed memory back at once, so that it is what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lockstep import end_with_parent
from measure import peak_mib, save, table
from memory_model import Arrangement, Batch, estimate
from transformers import LlamaConfig

HELD = ("weights", "gradients", "optimizer", "averages", "reference", "reward")
PASSING = ("cache", "activations", "output_layer", "peak")
SEVEN_B = Batch(rows=32, mini_batches=4, micro_rows=1, prompt=512, response=128)
HALF = torch.bfloat16
ARRANGEMENTS = [
    Arrangement("all weights, float32"),
    Arrangement("LoRA", HALF, rank=16),
    Arrangement("LoRA, shared base", HALF, rank=16, shared_reward=True),
    Arrangement("LoRA, shared base, 4 bits", HALF, rank=16, shared_reward=True, four_bits=True),
    Arrangement("the same, checkpointing", HALF, 16, shared_reward=True, four_bits=True, gradient_checkpointing=True),
]
CHECKED = [Arrangement("full"), Arrangement("lora", rank=16), Arrangement("shared", rank=16, shared_reward=True)]
SMALL = Batch(rows=8, mini_batches=2, micro_rows=4, prompt=56, response=8)
TOLERANCE = 0.10


def llama(hidden: int, layers: int, intermediate: int, heads: int, vocabulary: int) -> LlamaConfig:
    """A Llama of this shape."""
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        **special,
    )


SIZES = {"46M": llama(512, 12, 1376, 8, 8000), "80M": llama(640, 14, 1728, 10, 8000)}
TINY = llama(32, 2, 64, 2, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with measured memory on the CPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(json.loads(given.worker))
    elif given.check:
        check()
    else:
        print_table()


def print_table() -> None:
    """The parts for Llama 7B, in GiB."""
    rows = []
    for arrangement in ARRANGEMENTS:
        memory = estimate(LlamaConfig(), arrangement, SEVEN_B, accelerator=True)
        rows.append([arrangement.name, *(f"{getattr(memory, name) / 2**30:.1f}" for name in HELD + PASSING)])
    table(["Llama 7B, GiB", *(name.replace("_", " ") for name in HELD + PASSING)], rows)


def check() -> None:
    """Computed beside measured, for each arrangement and size; exit status 1 where they are too far apart."""
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(f"{folder}/tiny", TINY)
        for size, config in SIZES.items():
            write_models(f"{folder}/{size}", config)
            for arrangement in CHECKED:
                computed = estimate(config, arrangement, SMALL).peak / 2**20
                measured = measure(folder, size, arrangement)
                results[f"{size} {arrangement.name}"] = {"computed_mib": computed, "measured_mib": measured}
                difference = f"{computed / measured - 1:+.1%}"
                rows.append([size, arrangement.name, f"{computed:.0f}", f"{measured:.0f}", difference])
                print(*rows[-1], flush=True)
    table(["weights", "arrangement", "computed MiB", "measured MiB", "difference"], rows)
    save("memory_table", {"batch": asdict(SMALL), "cases": results})
    apart = [name for name, r in results.items() if abs(r["computed_mib"] / r["measured_mib"] - 1) > TOLERANCE]
    if apart:
        sys.exit(f"computed and measured differ by more than {TOLERANCE:.0%}: {', '.join(apart)}")


def measure(folder: str, size: str, arrangement: Arrangement) -> float:
    """Peak MiB of two PPO batches in a process of its own, above what it holds after a run of a tiny model."""
    models = {"tiny": f"{folder}/tiny", "real": f"{folder}/{size}"}
    options = models | {"rank": arrangement.rank, "shared": arrangement.shared_reward}
    environment = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "131072", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--worker", json.dumps(options)]
    environment = {**os.environ, **environment}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=end_with_parent)
    if run.returncode:
        sys.exit(f"the worker stopped:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])["mib"]


def work(options: dict[str, Any]) -> None:
    """What runs in the process of its own."""
    warnings.simplefilter("ignore")
    run_ppo(Path(options["tiny"]), options["rank"], options["shared"])
    began = resident_mib()
    run_ppo(Path(options["real"]), options["rank"], options["shared"])
    print(json.dumps({"mib": peak_mib() - began}))


def write_models(folder: str, config: LlamaConfig) -> None:
    """`policy`, a reward model of its shape in `reward`, and an adapter on the policy in `adapter`."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    from elastic_lightning.policies import LoRA, ModelSource
    from elastic_lightning.policies.classifier import new_classifier
    from elastic_lightning.policies.saving import save_model

    tokenizer, policy = word_tokenizer(), f"{folder}/policy"
    save_model(LlamaForCausalLM(config), tokenizer, policy)
    config.num_labels = 1
    save_model(LlamaForSequenceClassification(config), tokenizer, f"{folder}/reward")
    adapter = new_classifier(ModelSource(policy, lora=LoRA(16)), tokenizer, num_labels=1)
    save_model(adapter, tokenizer, f"{folder}/adapter", adapter="adapter")


def word_tokenizer():
    """A hundred words: what a tokenizer holds is not a part of the table."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<pad>": 1} | {f"w{number}": number for number in range(2, 100)}
    model = Tokenizer(WordLevel(words, unk_token="<eos>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")


def forget_peak(trainer, module) -> None:
    """As a callback's hook: loading, where a file and its copy are both in memory, is not what is measured."""
    Path("/proc/self/clear_refs").write_text("5")


def run_ppo(models: Path, rank: int | None, shared: bool) -> None:
    """Two PPO batches with Elastic Reset, the peak counted from the first one on."""
    from lightning import Trainer
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data import DataLoader

    from elastic_lightning import ElasticReset
    from elastic_lightning.algorithms import PPO, PPOConfig
    from elastic_lightning.policies import LoRA, ModelSource, Prompts, Sampling
    from elastic_lightning.rewards import AdapterReward, PreferenceReward

    torch.manual_seed(0)
    reward = AdapterReward(str(models / "adapter")) if shared else PreferenceReward(str(models / "reward"))
    module = PPO(
        ModelSource(str(models / "policy"), lora=None if rank is None else LoRA(rank)),
        reward,
        PPOConfig(epochs=1, mini_batches=SMALL.mini_batches, micro_batch_size=SMALL.micro_rows),
        Sampling(max_new_tokens=SMALL.response, eos=False),
        seed=1,
    )
    tokens = torch.randint(2, 100, (2, SMALL.rows, SMALL.prompt))
    batches = [Prompts(part, torch.ones_like(part, dtype=torch.bool)) for part in tokens]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[ElasticReset(every=1), LambdaCallback(on_train_start=forget_peak)],
        **quiet,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


def resident_mib() -> float:
    """What this process holds now."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024


if __name__ == "__main__":
    main()
