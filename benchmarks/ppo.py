"""Whole PPO batches, ours beside TRL's PPOTrainer and with Elastic Reset beside without: `python benchmarks/ppo.py`.

Every worker is a process of its own; they run one batch each in turn, so that a slow minute of the machine hits all
alike. The first round is a warm-up. A ratio is the median of TRL's seconds over ours, round by round.

Cases (TRL's value function is always a model of its own; it computes in float32 unless a case says otherwise):
    bf16_shared    ours under bf16 autocast, value head on the policy's trunk
    fp32_shared    ours in float32, value head on the policy's trunk
    fp32_separate  ours in float32, the value function a transformer of its own: what TRL does
    bf16_both      ours as in bf16_shared, TRL under bf16 autocast
    bf16_separate  both under bf16 autocast, both with a value function of its own
                   (a CPU without instructions for bfloat16 leaves the cases with bf16 out)
    elastic_reset  fp32_shared with Elastic Reset (every 2 batches) beside fp32_shared without
    chunked_loss   fp32_shared beside the same with one [B, T, V] tensor of logits and automatic gradients
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from lockstep import Worker
from measure import runnable, save, spread, table
from peer import TRL, peer_python
from shapes import Shape, default_shape, prepare

# On a GPU decoding is faster with a copy of the weights in bf16; on a CPU attention is faster written out.
if torch.cuda.is_available():
    BF16 = {"precision": "bf16-mixed", "execution": {"rollout_dtype": "bfloat16"}}
    PEER_BF16 = {"precision": "bf16-mixed"}
else:
    BF16 = PEER_BF16 = {"precision": "bf16-mixed", "attention": "eager"}


class Case(NamedTuple):
    """Options of our worker and of the one it is compared with: TRL's, or ours again where `other_is` says so."""

    ours: dict[str, Any]
    other: dict[str, Any]
    other_is: str = f"TRL {TRL}"

    @property
    def peer(self) -> bool:
        return self.other_is.startswith("TRL")


CASES = {
    "bf16_shared": Case(BF16, {}),
    "fp32_shared": Case({}, {}),
    "fp32_separate": Case({"separate": True}, {}),
    "bf16_both": Case(BF16, PEER_BF16),
    "bf16_separate": Case(BF16 | {"separate": True}, PEER_BF16),
    "elastic_reset": Case({"reset_every": 2}, {}, "ours without Elastic Reset"),
    "chunked_loss": Case({}, {"plain_loss": True}, "ours, logits whole"),
}
DEFAULT = tuple(CASES)
Reports = dict[str, list[dict[str, Any]]]  # of workers, one a round


class Peer(NamedTuple):
    """How TRL is run: an interpreter, and folders in front of its path."""

    python: str
    path: str = ""


Failures = dict[str, str]  # of workers: the end of their logs
Sides = dict[str, tuple[bool, dict[str, Any]]]  # of workers: whether it is TRL's, and its options


def sides(cases: dict[str, Case]) -> Sides:
    """The workers that cases need: one for each set of options, whichever cases share it."""
    both = [side for case in cases.values() for side in ((False, case.ours), (case.peer, case.other))]
    return {worker_key(*side): side for side in both}


def start(wanted: Sides, shape: Shape, rounds: int, peer: Peer | None, failures: Failures) -> dict[str, Worker]:
    """Those workers, but none of TRL's where there is no peer."""
    common = {"shape": asdict(shape), "batches": rounds + 1}
    workers: dict[str, Worker] = {}
    for key, (theirs, options) in wanted.items():
        if peer is not None or not theirs:
            script, how = ("worker_trl.py", peer) if theirs else ("worker_ours.py", Peer(sys.executable))
            workers[key] = Worker(key, how.python, script, common | options, how.path, wait=False)
    for key, worker in list(workers.items()):
        if _answer(workers, key, worker.receive, failures):
            print(f"Ready: {key}", flush=True)
    return workers


def _answer(
    workers: dict[str, Worker], key: str, ask: Callable[[], dict[str, Any]], failures: Failures
) -> dict[str, Any] | None:
    """What a worker answers; one that has stopped is taken out, and why is kept."""
    try:
        return ask()
    except SystemExit as stopped:
        failures[key] = str(stopped)
        del workers[key]
        return None


def worker_key(peer: bool, options: dict[str, Any]) -> str:
    """A name for a worker, the same for the same options."""
    return f"{'TRL' if peer else 'ours'} {options or ''}".strip()


def run(workers: dict[str, Worker], rounds: int, failures: Failures) -> Reports:
    """What every worker reported, [rounds] each; the warm-up is dropped, and so is a worker that stops."""
    reports: Reports = {key: [] for key in workers}
    for number in range(rounds + 1):
        for key, worker in list(workers.items()):
            report = _answer(workers, key, worker.batch, failures)
            if report is None:
                continue
            print(f"{'warm-up' if number == 0 else f'round {number}'}  {key}: {report['seconds']:.2f} s", flush=True)
            if number:
                reports[key].append(report)
    for worker in workers.values():
        worker.stop()
    return {key: reports[key] for key in workers}


def alone(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One worker's figures, where there is nothing to compare them with."""
    last = reports[-1]
    figures = {"seconds": spread([report["seconds"] for report in reports]), "optimizer_steps": last["optimizer_steps"]}
    return figures | {"peak_mib": last["peak_mib"], "parts_seconds": last.get("parts")}


def compare(case: Case, reports: Reports, shape: Shape) -> dict[str, Any]:
    """One case's figures: seconds of both sides, their ratio round by round, optimizer steps, parts of our batch."""
    ours = reports[worker_key(False, case.ours)]
    other = reports[worker_key(case.peer, case.other)]
    seconds = [report["seconds"] for report in ours], [report["seconds"] for report in other]
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    parts = {name: statistics.median(r["parts"][name] for r in ours) for name in ours[0]["parts"]}
    result = {
        "ratio": statistics.median(ratios),
        "ratio_spread": spread(ratios),
        "seconds": {"ours": spread(seconds[0]), "other": spread(seconds[1])},
        "samples_per_second": {
            "ours": shape.batch / statistics.median(seconds[0]),
            "other": shape.batch / statistics.median(seconds[1]),
        },
        "optimizer_steps": {"ours": ours[-1]["optimizer_steps"], "other": other[-1]["optimizer_steps"]},
        "peak_mib": {"ours": ours[-1]["peak_mib"], "other": other[-1]["peak_mib"]},
        "parts_seconds": parts,
        "other": case.other_is,
    }
    if case.ours.get("reset_every"):
        result["inside_share"] = statistics.median(r["reset_seconds"] / r["seconds"] for r in ours)
        result["inside_seconds"] = spread([r["reset_seconds"] for r in ours])
        result["paired_difference_seconds"] = spread([a - b for a, b in zip(*seconds, strict=True)])
    return result


def show(results: dict[str, dict[str, Any]]) -> None:
    """The table of all cases."""
    head = ["case", "other side", "ours s", "other s", "ratio", "ratio min..max", "steps", "rollout/score/update s"]
    rows = []
    for name, result in results.items():
        ours, other = result["seconds"]["ours"]["median"], result["seconds"]["other"]["median"]
        low, high = result["ratio_spread"]["min"], result["ratio_spread"]["max"]
        steps = result["optimizer_steps"]
        parts = "/".join(f"{seconds:.2f}" for seconds in result["parts_seconds"].values())
        cells = [f"{ours:.2f}", f"{other:.2f}", f"{result['ratio']:.2f}", f"{low:.2f}..{high:.2f}"]
        rows.append([name, result["other"], *cells, f"{steps['ours']}/{steps['other']}", parts])
    table(head, rows)
    if "elastic_reset" in results:
        result = results["elastic_reset"]
        difference = result["paired_difference_seconds"]
        print(
            f"Elastic Reset: {100 * result['inside_share']:.2f} % of a batch inside update and reset; with it a batch "
            f"takes {difference['median']:+.2f} s ({difference['min']:+.2f} to {difference['max']:+.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=3, help="measured after the warm-up")
    parser.add_argument("--batch", type=int, help="prompts a PPO batch")
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it runs")
    given = parser.parse_args()
    shape = default_shape(given.quick)
    if given.batch:
        shape = Shape(**asdict(shape) | {"batch": given.batch})
    cases = {name: CASES[name] for name in runnable(given.cases, lambda name: "bf16" in str(CASES[name]))}
    prepare(shape)
    peer = Peer(peer_python()) if any(case.peer for case in cases.values()) else None
    failures: Failures = {}
    reports = run(start(sides(cases), shape, given.rounds, peer, failures), given.rounds, failures)
    if failures:
        sys.exit(next(iter(failures.values())))
    results = {name: compare(case, reports, shape) for name, case in cases.items()}
    show(results)
    save("ppo_quick" if given.quick else "ppo", {"shape": asdict(shape), "rounds": given.rounds} | results)


if __name__ == "__main__":
    main()
