"""One part of `gpu.sh`: `python benchmarks/gpu_parts.py PART RESULT [FOLDER OF WHEELS]`.

What it finds is written to RESULT after each step, so that a part that is ended keeps what it had.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from lockstep import end_with_parent
from measure import machine

if TYPE_CHECKING:  # here and below: a part imports what it needs, which takes its time
    from shapes import Shape

ROOT = Path(__file__).parents[1]
WHEELS = ("torch", "lightning", "transformers", "torchmetrics", "sacrebleu", "matplotlib", "tensorboard")
OPTIONAL = ("pytest", "peft", "datasets", "jsonargparse", "accelerate", "trl")
TINY = {"layers": 2, "width": 64, "heads": 4, "vocabulary": 512, "batch": 8, "prompt": 8, "response": 12}
ROUNDS = 2  # after the warm-up
Write = Callable[[dict[str, Any]], None]


def shapes() -> dict[str, Shape]:
    """What is timed: of real sizes on a GPU, tiny elsewhere."""
    from shapes import GPT2_SMALL, LLAMA_1B, Shape

    if _cuda():
        return {"gpt2_small": GPT2_SMALL, "llama_1b": LLAMA_1B}
    tiny = Shape(**TINY, epochs=2, mini_batches=2)
    return {"tiny_gpt2": tiny, "tiny_llama": replace(tiny, family="llama", kv_heads=2, inner=128)}


def environment(write: Write, wheels: str) -> None:
    """Where all this is measured, and with what."""
    import torch

    found: dict[str, Any] = {"machine": machine(), "versions": {name: _version(name) for name in WHEELS + OPTIONAL}}
    if _cuda():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    write(found)


def models(write: Write, wheels: str) -> None:
    """The models that are timed, with random weights, so that no other part waits for them."""
    from shapes import prepare

    made = []
    for name, shape in shapes().items():
        prepare(shape)
        made.append(name)
        write({"made": made})


def tests(write: Write, wheels: str) -> None:
    """(a) The tests marked `cuda`."""
    if importlib.util.find_spec("pytest") is None:
        write({"ran": False, "why": "pytest is not installed"})
        return
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.xml"
        command = [sys.executable, "-m", "pytest", "-m", "cuda", f"--junitxml={records}", "-p", "no:cacheprovider"]
        code = subprocess.run([*command, *map(str, files)], cwd=ROOT, preexec_fn=end_with_parent).returncode
        write({"ran": True, "code": code} | _outcomes(records))
    if code:
        sys.exit(f"pytest ended with code {code}")


def _outcomes(records: Path) -> dict[str, Any]:
    """Counts of passed and skipped tests, and what failed, of pytest's XML."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for case in ElementTree.parse(records).iter("testcase"):
        bad = [part for part in case if part.tag in ("failure", "error")]
        if bad:
            found["failed"][f"{case.get('classname')}::{case.get('name')}"] = bad[0].get("message", "")[:500]
        else:
            found["skipped" if case.find("skipped") is not None else "passed"] += 1
    return found


def equality(write: Write, wheels: str) -> None:
    """(b) Captured decoding against eager decoding and a forward pass."""
    from gpu_equality import rows

    found: list[dict[str, Any]] = []
    for row in rows():
        found.append(row)
        write({"rows": found})
    wrong = [f"{row['architecture']} {row['dtype']}" for row in found if not row["ok"]]
    if wrong:
        sys.exit(f"not equal: {', '.join(wrong)}")


def rollout(write: Write, wheels: str) -> None:
    """(c) Rollout beside `generate`."""
    import torch
    from rollout import cases, copy_bandwidth, figures, show, timed

    content: dict[str, Any] = {}
    for name, shape in shapes().items():
        found = {case: run for case, run in cases(shape).items() if "compiled" not in case}  # which takes minutes
        content[name] = figures(shape, timed(found, ROUNDS), copy_bandwidth())
        write(content)
        show(content[name])
        del found
        if _cuda():
            torch.cuda.empty_cache()


def ppo(write: Write, wheels: str) -> None:
    """(c) Whole PPO batches beside TRL's."""
    from ppo import Peer, alone, compare, run, sides, start, worker_key

    with tempfile.TemporaryDirectory() as folder:
        path = _unpacked(wheels, Path(folder))
        missing = _missing_trl(path)
        content: dict[str, Any] = {"trl": f"missing: {missing}" if missing else "there"}
        for name, shape, cases, together in _groups():
            failures: dict[str, str] = {}
            reports: dict[str, list[dict[str, Any]]] = {}
            wanted = sides(cases)
            for part in [wanted] if together else [{key: side} for key, side in wanted.items()]:
                workers = start(part, shape, ROUNDS, None if missing else Peer(sys.executable, path), failures)
                reports |= run(workers, ROUNDS, failures)
            found: dict[str, Any] = {"workers": {key: alone(report) for key, report in reports.items()}}
            for label, case in cases.items():
                keys = {worker_key(False, case.ours), worker_key(case.peer, case.other)}
                if keys <= reports.keys():
                    found[label] = compare(case, reports, shape)
                else:
                    why = [failures[key][-500:] for key in keys if key in failures]
                    found[label] = {"missing": why or [content["trl"]]}
            content[name] = found
            write(content)


def _groups() -> list[tuple[str, Shape, dict[str, Any], bool]]:
    """Cases of `ppo.py`: their group's name, the shape, and whether their workers take turns (they are in memory
    together then, which those of a billion weights are not). The most telling come first."""
    from ppo import CASES, Case

    (small, shape), (large, large_shape) = shapes().items()
    offloaded = Case({"reset_every": 2, "offload": True}, {}, "ours without Elastic Reset")
    if not _cuda():
        plain = {"fp32_shared": CASES["fp32_shared"]}
        return [(small, shape, plain | {"offloaded": offloaded}, True), (large, large_shape, plain, False)]
    first = {name: CASES[name] for name in ("fp32_shared", "bf16_both")}
    more = {name: CASES[name] for name in ("fp32_separate", "elastic_reset")}
    uncaptured = Case({}, {"execution": {"cuda_graphs": False}}, "ours without CUDA graphs")
    more |= {"captured": uncaptured, "offloaded": offloaded}
    return [
        (small, shape, first, True),
        (large, large_shape, {"bf16_both": CASES["bf16_both"]}, False),
        (f"{small}_more", shape, more, True),
    ]


def _unpacked(wheels: str, folder: Path) -> str:
    """The wheels of a folder, unpacked to be imported from: no installer is needed. Empty where there is no folder."""
    if not wheels:
        return ""
    for wheel in sorted(Path(wheels).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return str(folder)


def _missing_trl(path: str) -> str:
    """Why TRL's PPO cannot be run; empty where it can."""
    search = os.pathsep.join(part for part in (path, os.environ.get("PYTHONPATH", "")) if part)
    command = [sys.executable, "-c", "from trl.experimental.ppo import PPOTrainer; import datasets"]
    environment = {**os.environ, "PYTHONPATH": search, "TRL_EXPERIMENTAL_SILENCE": "1"}
    tried = subprocess.run(command, capture_output=True, text=True, env=environment)
    return "" if tried.returncode == 0 else tried.stderr.strip().split("\n")[-1]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    part, result, wheels = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

    def write(content: dict[str, Any]) -> None:
        beside = result.with_suffix(".new")
        beside.write_text(json.dumps(content))
        beside.replace(result)

    known = {"environment": environment, "models": models, "tests": tests, "equality": equality}
    (known | {"rollout": rollout, "ppo": ppo})[part](write, wheels)


if __name__ == "__main__":
    main()
