"""Train PPO with Elastic Reset on the toy world for a while, and see whether memory, descriptors or threads grow.

    python tests/faults/soak.py --minutes 30 --csv soak.csv --plot soak.png

One process does what a real run does: rollouts, resets, validation, samples, TensorBoard, checkpoints. It exits with 1
where memory at the end is not within 2 % of memory after the first three minutes, or descriptors or threads are more.
Linux only, as it reads /proc.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 5  # samples whose median stands for a moment: a checkpoint being written holds a descriptor
COLUMNS = ("seconds", "resident_mib", "descriptors", "threads")


class Sample(NamedTuple):
    """The process at one moment; the fields are those of COLUMNS."""

    seconds: float
    resident: float
    descriptors: int
    threads: int


def measure(start: float) -> Sample:
    """This process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    # Listing the folder opens it: one descriptor of those it shows.
    descriptors, threads = len(os.listdir("/proc/self/fd")) - 1, len(os.listdir("/proc/self/task"))
    return Sample(time.monotonic() - start, resident, descriptors, threads)


class Sampler(threading.Thread):
    """Measures every so many seconds, from when a file appears until it is told to stop."""

    def __init__(self, every: float, begins: Path) -> None:
        super().__init__(daemon=True)
        self.every, self.begins, self.done = every, begins, threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self.begins.exists():
            if self.done.wait(0.1):
                return
        began = time.monotonic()
        while True:
            self.samples.append(measure(began))
            if self.done.wait(self.every):
                return

    def finish(self) -> list[Sample]:
        self.done.set()
        self.join()
        return self.samples


def train(folder: Path, minutes: float) -> None:
    """PPO and Elastic Reset on the toy world, for so long."""
    sys.path.insert(0, str(ROOT / "tests"))
    from toy_world import fit_arguments, make_toy

    from elastic_lightning.cli import main

    seconds = round(60 * minutes)
    callbacks = (
        "[{class_path: ElasticReset, init_args: {every: 15, decay: 0.99}}, {class_path: SampleLogger}, "
        "{class_path: BatchCheckpoint, init_args: {every: 10}}]"
    )
    status = main(
        [
            *fit_arguments(make_toy(folder / "toy"), folder, str(ROOT / "configs/toy/elastic_reset.yaml")),
            "--model.init_args.sampling.max_new_tokens=20",
            "--data.init_args.train_texts=640",
            "--data.init_args.batch_size=32",
            "--trainer.limit_train_batches=null",
            "--trainer.val_check_interval=10",
            "--trainer.max_epochs=-1",
            f"--trainer.max_time={{seconds: {seconds}}}",
            f"--trainer.callbacks={callbacks}",
        ]
    )
    if status != 0:
        raise SystemExit(f"the run failed with status {status}")


def moment(samples: list[Sample]) -> Sample:
    """The medians of some samples that follow one another."""
    return Sample(*(statistics.median(values) for values in zip(*samples, strict=True)))


def judge(samples: list[Sample], settled: float, tolerance: float) -> tuple[list[str], bool]:
    """What to print, and whether the run stayed as it was after `settled` seconds."""
    later = [sample for sample in samples if sample.seconds >= settled]
    if len(later) < 2 * WINDOW:
        raise SystemExit(f"only {len(later)} samples after {settled:g} seconds: train for longer or sample more often")
    first, last = moment(later[:WINDOW]), moment(later[-WINDOW:])
    change = last.resident / first.resident - 1
    verdicts = {
        f"resident memory {first.resident:.1f} -> {last.resident:.1f} MiB ({change:+.2%}, limit {tolerance:.0%})": (
            abs(change) <= tolerance
        ),
        f"file descriptors {first.descriptors:g} -> {last.descriptors:g}": last.descriptors <= first.descriptors,
        f"threads {first.threads:g} -> {last.threads:g}": last.threads <= first.threads,
    }
    lines = [f"{'ok  ' if fine else 'GREW'} {line}" for line, fine in verdicts.items()]
    span = f"from {first.seconds:.0f} s to {last.seconds:.0f} s, medians of {WINDOW} of {len(samples)} samples"
    return [span, *lines], all(verdicts.values())


def write(path: Path, samples: list[Sample]) -> None:
    """The samples as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([f"{s.seconds:.1f}", f"{s.resident:.2f}", s.descriptors, s.threads] for s in samples)


def plot(path: Path, samples: list[Sample], settled: float) -> None:
    """Memory over time, and descriptors and threads below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [sample.seconds / 60 for sample in samples]
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(2, 1))
    above.plot(minutes, [sample.resident for sample in samples])
    above.axvline(settled / 60, color="grey", linestyle=":", label="compared with the end")
    above.set_ylabel("resident memory (MiB)")
    above.set_ylim(0, 1.2 * max(sample.resident for sample in samples))
    above.legend(loc="lower right")
    for name in ("descriptors", "threads"):
        below.plot(minutes, [getattr(sample, name) for sample in samples], label=name)
    below.set_xlabel("minutes")
    below.set_ylim(0, 1.2 * max(max(sample.descriptors, sample.threads) for sample in samples))
    below.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument("--settled", type=float, default=180.0, help="seconds until the process is as it should stay")
    parser.add_argument("--tolerance", type=float, default=0.02, help="share by which memory may differ at the end")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between samples")
    parser.add_argument("--csv", type=Path, help="write the samples here")
    parser.add_argument("--plot", type=Path, help="write a picture here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The validation before the first batch writes the first samples: what is imported is there by then.
        sampler = Sampler(given.every, Path(folder) / "run" / "seed_1" / "samples.jsonl")
        sampler.start()
        train(Path(folder), given.minutes)
        samples = sampler.finish()
    if given.csv:
        write(given.csv, samples)
    if given.plot:
        plot(given.plot, samples, given.settled)
    lines, fine = judge(samples, given.settled, given.tolerance)
    print("\n".join(lines))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
