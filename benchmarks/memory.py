"""Peak memory of a PPO batch: `python benchmarks/memory.py`.

Each row is a process of its own that runs two batches (the second with its optimizer state) and reports its largest
resident set, or the CUDA allocator's peak. `above idle` takes off what the process held before a model was loaded.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace

from lockstep import Worker
from measure import runnable, save, table
from peer import TRL, peer_python
from ppo import BF16
from shapes import default_shape, prepare

CASES = {
    f"TRL {TRL} float32, separate value model": None,
    "ours float32, shared trunk": {},
    "ours float32, shared trunk, Elastic Reset": {"reset_every": 1},
    "ours float32, separate value trunk": {"separate": True},
    "ours bf16 autocast, shared trunk": BF16,
    "ours float32, gradient checkpointing": {"execution": {"gradient_checkpointing": True}},
    "ours float32, upper 2 layers trained": {"execution": {"trainable_layers": 2}},
    "ours float32, LoRA r 16": {"lora": True},
    "ours float32, LoRA r 16, Elastic Reset": {"lora": True, "reset_every": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--batch", type=int, help="prompts a PPO batch")
    given = parser.parse_args()
    shape = default_shape(given.quick)
    shape = replace(shape, batch=given.batch) if given.batch else shape
    if given.quick:
        shape = replace(shape, layers=4)  # so that there are layers to freeze
    prepare(shape)
    results = {}
    for name in runnable(CASES, lambda name: "bf16" in name):
        options = CASES[name]
        script, python = ("worker_trl.py", peer_python()) if options is None else ("worker_ours.py", sys.executable)
        worker = Worker(name, python, script, {"shape": asdict(shape), "batches": 2} | (options or {}))
        reports = [worker.batch() for _ in range(2)]
        worker.stop()
        results[name] = {"peak_mib": reports[-1]["peak_mib"], "idle_mib": reports[-1]["idle_mib"]}
        print(f"{name}: {results[name]['peak_mib']:.0f} MiB", flush=True)
    peer = results[next(iter(CASES))]["peak_mib"]
    table(
        ["PPO batch", "peak MiB", "above idle", "of TRL's peak"],
        [
            [name, f"{r['peak_mib']:.0f}", f"{r['peak_mib'] - r['idle_mib']:.0f}", f"{r['peak_mib'] / peer:.2f}"]
            for name, r in results.items()
        ],
    )
    save("memory_quick" if given.quick else "memory", {"shape": asdict(shape), "cases": results})


if __name__ == "__main__":
    main()
