"""Is the learning curve the same on every path of computation? `python benchmarks/learning.py`.

The toy world's PPO without a KL penalty, three seeds a path (`learning.yaml`; finished runs are kept, so it can be run
in parts). A path agrees with its baseline when the mean difference over the curve, and at its end, is no larger than
the spread of the baseline's own seeds: largest minus smallest.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from measure import save, table

HERE = Path(__file__).parent
BASELINES = {
    "chunked": "plain",
    "bf16_rollout": "plain",
    "bf16_autocast": "plain",
    "compiled": "plain",
    "upper_layers_shared": "upper_layers_whole",
}
METRICS = ("reward", "kl")

Curves = dict[str, dict[int, dict[str, list[float]]]]  # method -> seed -> metric -> values over ppo_step


def run(output: Path) -> None:
    """Run what is not there yet."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # the classes of paths.py
    command = [sys.executable, "-m", "elastic_lightning.cli", "pipeline", HERE / "learning.yaml", "--output", output]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})


def read(file: Path) -> Curves:
    """The curves that the pipeline's report wrote."""
    curves: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            for metric in METRICS:
                curves[row["method"]][int(row["seed"])][metric].append(float(row[metric]))
    return curves


def compare(curves: Curves, method: str, baseline: str, metric: str) -> dict[str, float]:
    """Means over seeds of the curve's mean and end, of both, and the spread of the baseline's seeds."""
    result = {}
    for name, summary in (("mean", lambda values: sum(values) / len(values)), ("end", lambda values: values[-1])):
        ours = [summary(seed[metric]) for seed in curves[method].values()]
        theirs = [summary(seed[metric]) for seed in curves[baseline].values()]
        result |= {
            f"{name}": sum(ours) / len(ours),
            f"{name}_baseline": sum(theirs) / len(theirs),
            f"{name}_spread": max(theirs) - min(theirs),
        }
    return result


def agrees(result: dict[str, float]) -> bool:
    """Whether both differences lie within the spread."""
    return all(abs(result[name] - result[f"{name}_baseline"]) <= result[f"{name}_spread"] for name in ("mean", "end"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tb_logs/learning"))
    given = parser.parse_args()
    run(given.output)
    curves = read(given.output / "report" / "table.csv")
    rows, results = [], {}
    for method, baseline in BASELINES.items():
        for metric in METRICS:
            result = compare(curves, method, baseline, metric)
            results[f"{method}/{metric}"] = result | {"baseline": baseline, "agrees": agrees(result)}
            cells = [
                f"{result[name]:.3f} / {result[f'{name}_baseline']:.3f} ({result[f'{name}_spread']:.3f})"
                for name in ("mean", "end")
            ]
            rows.append([method, baseline, metric, *cells, "yes" if agrees(result) else "no"])
    table(["path", "baseline", "metric", "mean, its / the baseline's (spread)", "end", "within the spread"], rows)
    save("learning", {"comparisons": results})


if __name__ == "__main__":
    main()
