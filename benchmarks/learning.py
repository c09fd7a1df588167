"""Is the learning curve the same on every path of computation? `python benchmarks/learning.py`.

The toy world's PPO without a KL penalty, six seeds a path (`learning.yaml`; finished runs are kept, so it can be run in
parts). Runs of one seed draw with the same random numbers and part after some batches, when rounding has tipped a draw.
A path agrees with its baseline when the 95 % interval of the seeds' paired differences holds 0, for the mean over the
curve and for its end.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import yaml
from lockstep import end_with_parent
from measure import runnable, save, table

HERE = Path(__file__).parent
BASELINES = {
    "chunked": "plain",
    "bf16_rollout": "plain",
    "bf16_autocast": "plain",
    "compiled": "plain",
    "upper_layers_shared": "upper_layers_whole",
}
METRICS = ("reward", "kl")
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # 97.5 % quantile of Student's t, by the number of pairs

Curves = dict[str, dict[int, dict[str, list[float]]]]  # method -> seed -> metric -> values over ppo_step


def run(output: Path, methods: list[str]) -> None:
    """Run what is not there yet, of these methods and what they are compared with."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # the classes of paths.py
    command = [sys.executable, "-m", "elastic_lightning.cli", "pipeline", HERE / "learning.yaml", "--output", output]
    stages = yaml.safe_load((HERE / "learning.yaml").read_text())["stages"]
    command += ["--only", *(name for name in stages if name in methods or name not in BASELINES)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, preexec_fn=end_with_parent)


def read(file: Path) -> Curves:
    """The curves that the pipeline's report wrote."""
    curves: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            for metric in METRICS:
                curves[row["method"]][int(row["seed"])][metric].append(float(row[metric]))
    return curves


def compare(curves: Curves, method: str, baseline: str, metric: str) -> dict[str, float]:
    """The curve's mean and its end: means over seeds of both paths, the spread of the baseline's seeds (largest minus
    smallest), and the mean paired difference with half the width of its 95 % interval."""
    result = {}
    for name, summary in (("mean", statistics.mean), ("end", lambda values: values[-1])):
        theirs = {seed: summary(curve[metric]) for seed, curve in curves[baseline].items()}
        ours = {seed: summary(curve[metric]) for seed, curve in curves[method].items()}
        differences = [ours[seed] - theirs[seed] for seed in theirs]
        result |= {
            name: statistics.mean(ours.values()),
            f"{name}_baseline": statistics.mean(theirs.values()),
            f"{name}_spread": max(theirs.values()) - min(theirs.values()),
            f"{name}_difference": statistics.mean(differences),
            f"{name}_interval": T95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5,
        }
    return result


def agrees(result: dict[str, float]) -> bool:
    """Whether both intervals hold 0."""
    return all(abs(result[f"{name}_difference"]) <= result[f"{name}_interval"] for name in ("mean", "end"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tb_logs/learning"))
    given = parser.parse_args()
    methods = runnable(BASELINES, lambda name: "bf16" in name)
    run(given.output, methods)
    curves = read(given.output / "report" / "table.csv")
    rows, results = [], {}
    for method in methods:
        baseline = BASELINES[method]
        for metric in METRICS:
            result = compare(curves, method, baseline, metric)
            results[f"{method}/{metric}"] = result | {"baseline": baseline, "agrees": agrees(result)}
            cells = []
            for name in ("mean", "end"):
                cells.append(f"{result[f'{name}_baseline']:.3f} ({result[f'{name}_spread']:.3f})")
                cells.append(f"{result[f'{name}_difference']:+.3f} +- {result[f'{name}_interval']:.3f}")
            rows.append([method, baseline, metric, *cells, "yes" if agrees(result) else "no"])
    head = ["path", "baseline", "metric", "baseline's mean (spread)", "difference", "its end (spread)", "difference"]
    table([*head, "agrees"], rows)
    save("learning", {"comparisons": results})


if __name__ == "__main__":
    main()
