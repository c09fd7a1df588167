"""Time and memory of our PPO batch as one size doubles at a time: `python benchmarks/scaling.py`.

Each row is a process of its own; seconds are the median of the batches after a warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict

import torch
from lockstep import Worker
from measure import save, table
from shapes import GPT2_SMALL, Shape, doubled, prepare

BASE = Shape(layers=4, width=256, heads=4, vocabulary=8_192, batch=16, prompt=16, response=24)
AXES = ("batch", "response", "vocabulary", "width", "layers")


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    """Seconds, peak memory and parameters of one shape."""
    prepare(shape)
    options = {"shape": asdict(shape), "batches": rounds + 1, "reset_every": 2}
    worker = Worker(str(shape), sys.executable, "worker_ours.py", options)
    reports = [worker.batch() for _ in range(rounds + 1)][1:]
    worker.stop()
    embeddings = (shape.vocabulary + shape.prompt + shape.response) * shape.width
    return {
        "parameters": shape.layers * (12 * shape.width**2 + 13 * shape.width) + embeddings + 2 * shape.width,
        "seconds": statistics.median(report["seconds"] for report in reports),
        "peak_mib": reports[-1]["peak_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="measured after the warm-up")
    parser.add_argument("--quick", action="store_true", help="one doubling, one round")
    given = parser.parse_args()
    doublings, rounds = (1, 1) if given.quick else (given.doublings, given.rounds)
    base = GPT2_SMALL if torch.cuda.is_available() else BASE
    first = measure(base, rounds)
    rows, results = [], {}
    for axis in given.axes:
        results[axis] = {str(getattr(base, axis)): first}
        before = first
        for times in range(1, doublings + 1):
            shape = doubled(base, axis, times)
            now = measure(shape, rounds)
            results[axis][str(getattr(shape, axis))] = now
            rows.append(
                [
                    f"{axis} {getattr(shape, axis):,}",
                    f"{now['parameters'] / 1e6:.1f}",
                    f"{now['seconds']:.2f}",
                    f"x {now['seconds'] / before['seconds']:.2f}",
                    f"{now['peak_mib']:.0f}",
                    f"x {now['peak_mib'] / before['peak_mib']:.2f}",
                ]
            )
            print("  ".join(rows[-1]), flush=True)
            before = now
    start = [f"{first['parameters'] / 1e6:.1f}", f"{first['seconds']:.2f}", "", f"{first['peak_mib']:.0f}", ""]
    head = ["doubled", "parameters M", "seconds", "to the row before", "peak MiB", "to the row before"]
    table(head, [["base", *start], *rows])
    save("scaling_quick" if given.quick else "scaling", {"base": asdict(base), "axes": results})


if __name__ == "__main__":
    main()
