"""The parts of `gpu.sh`, each a process of its own with a limit of its own, and the JSON of what they found.

It imports nothing but the standard library: what is missing or broken is found out in a part, and written down.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lockstep import end_with_parent

HERE = Path(__file__).parent
SHARES = {"environment": 30, "models": 50, "tests": 90, "equality": 70, "rollout": 80, "ppo": 160}  # of the time
DONE = "done"


def run_part(command: list[str], result: Path, seconds: float) -> dict[str, Any]:
    """Run one part; how it ended, what it had written to `result` by then, and where it did not end well, its last
    words."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A session of its own, to be ended with all that it has started.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            code = process.wait(max(seconds, 0))
            status = DONE if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after its {seconds:.0f} s"
        finally:
            _end(process)
        log.seek(0)
        words = log.read()[-3000:]
    found = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if result.exists():
        found["result"] = json.loads(result.read_text())
    return found if status == DONE else found | {"log": words}


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(commands: dict[str, list[str]], folder: Path, output: Path, seconds: float) -> dict[str, Any]:
    """Run the parts one after the other. A part's limit is its share of what the ones before it have left."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"limit_seconds": seconds, "parts": {}}
    for name, command in commands.items():
        to_come = sum(SHARES.get(part, 1) for part in commands if part not in report["parts"])
        limit = (end - time.monotonic()) * SHARES.get(name, 1) / to_come
        found = run_part(command, folder / f"{name}.json", limit)
        report["parts"][name] = found
        _write(output, report)
        print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
    return report


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--trl", default="", help="a folder with the wheels of TRL and of what it needs")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=470, help="for all parts together")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            name: [sys.executable, str(HERE / "gpu_parts.py"), name, str(Path(folder) / f"{name}.json"), given.trl]
            for name in given.parts
        }
        report = run_all(commands, Path(folder), given.output.resolve(), given.seconds)
    print(f"Wrote {given.output}")
    sys.exit(any(part["status"] != DONE for part in report["parts"].values()))


if __name__ == "__main__":
    main()
