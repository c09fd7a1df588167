"""The peer, TRL's PPOTrainer, in a virtual environment of its own with the same torch: never a dependency of ours."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import version

from shapes import CACHE

TRL = "1.12.0"  # the last line of TRL that has PPO
SAME = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "safetensors", "huggingface_hub", "datasets")
NEEDS = ("pandas", "rich")


def peer_python() -> str:
    """The interpreter of the peer's environment, which is made at the first call (minutes)."""
    folder = CACHE / f"trl-{TRL}-torch-{version('torch').split('+')[0]}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        print(f"Installing trl {TRL} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        same = [f"{name}=={version(name).split('+')[0]}" for name in SAME if _installed(name)]
        command = [str(python), "-m", "pip", "install", "-q", f"trl=={TRL}", *same, *NEEDS]
        subprocess.run(command, check=True)
        (folder / "complete").touch()
    return str(python)


def _installed(name: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", "show", "-q", name], capture_output=True).returncode == 0
