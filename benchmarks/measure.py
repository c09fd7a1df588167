"""What the benchmarks share: time, memory, the machine, tables and result files."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def peak_mib() -> float:
    """Peak memory of this process in MiB: on the device where CUDA is used, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent held when this process was started
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def runnable(names: Iterable[str], in_bfloat16: Callable[[str], bool]) -> list[str]:
    """The cases that this machine computes in reasonable time: those in bfloat16 are left out, with a line that says
    so, where it is a CPU without instructions for it and emulates every number."""
    import torch

    from elastic_lightning.algorithms.precision import missing_for_bfloat16

    missing = "" if torch.cuda.is_available() else missing_for_bfloat16()
    left_out = [name for name in names if missing and in_bfloat16(name)]
    if left_out:
        print(f"Left out, as this CPU has no instructions for bfloat16 ({missing}): {', '.join(left_out)}", flush=True)
    return [name for name in names if name not in left_out]


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, str]:
    """Where a figure was measured."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": name,
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extras = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in f"{flags} "]
    return " ".join([models[0] if models else platform.processor() or "CPU", *extras])


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def save(name: str, content: dict[str, Any]) -> None:
    """Write `results/<name>.json`, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine()} | content, indent=2) + "\n")
    print(f"Wrote {path}")


def table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table that also reads as Markdown."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(padded) + " |"

    print(line(head))
    print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in rows:
        print(line(row))
