"""Imports point one way, and importing the package is light."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import elastic_lightning

ROOT = Path(elastic_lightning.__file__).parent
HEAVY = {"datasets", "peft", "matplotlib", "sacrebleu"}

# What each part may import, beside itself; "" is the package's own __init__.
BASE = {"functional", "errors", "terminal", "bounded_yaml", "checks"}
MODELS = BASE | {"metrics", "policies", "rewards"}
ALLOWED = {
    "errors": set(),
    "checks": {"errors"},
    "terminal": set(),
    "bounded_yaml": set(),
    "functional": set(),
    "ranks": {"errors"},
    "outputs": {"errors"},
    "locks": {"errors"},
    "processes": set(),
    "signals": set(),
    "mistakes": {"errors", "policies", "terminal"},
    "resume": {"errors", "outputs"},
    "run_folder": {"outputs", "resume", "signals"},
    "endings": {"mistakes"},
    "metrics": BASE | {"policies"},
    "policies": BASE | {"ranks"},
    "rewards": BASE | {"policies", "ranks"},
    "algorithms": MODELS | {"ranks"},
    "callbacks": MODELS | {"outputs", "ranks", "signals"},
    "data": MODELS | {"algorithms", "callbacks", "outputs"},
    "evaluation": MODELS | {"callbacks", "data", "locks", "outputs", "processes"},
    "lightning_cli": MODELS
    | {"algorithms", "callbacks", "data", "endings", "locks", "mistakes", "outputs", "processes", "resume"}
    | {"run_folder", "signals", ""},
    "cli": MODELS
    | {"algorithms", "callbacks", "data", "evaluation", "lightning_cli", "mistakes", "processes", "signals", ""},
    "": MODELS | {"algorithms", "callbacks", "data", "evaluation"},
    "__main__": {"cli"},
}

MODULES = sorted(path.relative_to(ROOT.parent).with_suffix("").parts for path in ROOT.rglob("*.py"))


def tree_of(parts):
    return ast.parse(ROOT.parent.joinpath(*parts).with_suffix(".py").read_text())


def part_of(module):
    """The part a dotted name lies in: that of elastic_lightning.data.imdb is data, that of the package itself ""."""
    return module.split(".")[1] if "." in module else ""


def imported(nodes, package):
    """Dotted names of everything these syntax nodes import; relative imports count from the package, a list."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from elastic_lightning import data` imports data, not the package alone.
            yield from (f"{base}.{alias.name}" if alias.name in ALLOWED else base for alias in node.names)


def complaints(part, names):
    """The imports that this part may not make."""
    ours = [name for name in names if name.split(".")[0] == "elastic_lightning"]
    wrong = [name for name in ours if part_of(name) not in ALLOWED[part] | {part}]
    if part == "functional":
        light = {"torch", "elastic_lightning", *sys.stdlib_module_names}
        wrong += [name for name in names if name.split(".")[0] not in light]
    return wrong


@pytest.mark.parametrize("parts", MODULES, ids="/".join)
def test_imports_point_one_way(parts):
    part = "" if parts[1] == "__init__" else parts[1]
    assert part in ALLOWED, f"say in this test what elastic_lightning.{part} may import"
    names = list(imported(ast.walk(tree_of(parts)), list(parts[:-1])))
    assert complaints(part, names) == []


@pytest.mark.parametrize(
    ("part", "line", "wrong"),
    [
        ("functional", "import numpy", ["numpy"]),
        ("functional", "import math, torch.nn.functional", []),
        ("functional", "from elastic_lightning.errors import UserError", ["elastic_lightning.errors"]),
        ("functional", "from ..metrics import SequenceKL", ["elastic_lightning.metrics"]),
        ("functional", "from .kl import kl_k1", []),
        ("metrics", "from elastic_lightning import functional", []),
        ("policies", "from elastic_lightning import rewards", ["elastic_lightning.rewards"]),
        ("callbacks", "def f():\n  import elastic_lightning.algorithms.ppo", ["elastic_lightning.algorithms.ppo"]),
        ("algorithms", "from elastic_lightning.callbacks import ElasticReset", ["elastic_lightning.callbacks"]),
        ("evaluation", "from elastic_lightning.algorithms import PPO", ["elastic_lightning.algorithms"]),
        ("data", "from elastic_lightning.cli import main", ["elastic_lightning.cli"]),
        ("data", "from elastic_lightning import errors, cli", ["elastic_lightning.cli"]),
        ("rewards", "from elastic_lightning import __version__", ["elastic_lightning"]),
    ],
)
def test_the_rule_finds_wrong_imports(part, line, wrong):
    assert complaints(part, list(imported(ast.walk(ast.parse(line)), ["elastic_lightning", part]))) == wrong


@pytest.mark.parametrize("name", ["functional", "metrics"])
def test_everything_announced_can_be_imported(name):
    module = importlib.import_module(f"elastic_lightning.{name}")
    assert all(hasattr(module, public) for public in module.__all__)


def test_importing_the_package_is_light():
    script = "import sys, elastic_lightning; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert loaded & HEAVY <= {"matplotlib"}
    # torchmetrics loads matplotlib wherever it is installed: see instead that none of the modules we load asks for it.
    for parts in MODULES:
        if ".".join(parts).removesuffix(".__init__") in loaded:
            names = imported(tree_of(parts).body, list(parts[:-1]))
            assert "matplotlib" not in {name.split(".")[0] for name in names}, parts
