"""`benchmarks/gpu.sh`: bounded, whole after any failure, and without a GPU the same with tiny shapes."""

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import gpu_parts
import pytest
from gpu import DONE, run_all
from gpu_equality import TOLERANCE
from rollout import bytes_a_token
from shapes import LLAMA_1B, Shape, prepare

from elastic_lightning.policies import load_policy

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
MISSING = ("datasets", "peft", "jsonargparse", "pytest", "trl")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def python(code):
    return [sys.executable, "-c", code]


def alive(pid):
    """Whether a process runs; one that has ended and was not asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    hangs = f"{child}; open({str(tmp_path / 'tests.json')!r}, 'w').write(str(p.pid)); p.wait()"
    commands = {
        "environment": python(f"open({str(tmp_path / 'environment.json')!r}, 'w').write('[1]')"),
        "models": python("raise SystemExit('no such GPU')"),
        "tests": python(hangs),
        "ppo": python(f"open({str(tmp_path / 'ppo.json')!r}, 'w').write('[2]')"),
    }
    began = time.monotonic()
    report = run_all(commands, tmp_path, tmp_path / "out" / "gpu.json", 6)
    assert time.monotonic() - began < 8
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == report
    parts = report["parts"]
    assert [parts[name]["status"] for name in ("environment", "models", "ppo")] == [DONE, "failed with code 1", DONE]
    assert (parts["environment"]["result"], parts["ppo"]["result"]) == ([1], [2])
    assert "no such GPU" in parts["models"]["log"] and "result" not in parts["models"]
    assert parts["tests"]["status"].startswith("stopped after its")
    assert not alive(parts["tests"]["result"]), "what a part has started ends with it"


def test_wheels_are_imported_without_being_installed(tmp_path):
    with zipfile.ZipFile(tmp_path / "toy-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("datasets/__init__.py", "")
        for folder in ("trl", "trl/experimental"):
            wheel.writestr(f"{folder}/__init__.py", "")
        wheel.writestr("trl/experimental/ppo.py", "class PPOTrainer: ...")
    path = gpu_parts._unpacked(str(tmp_path), tmp_path / "unpacked")
    assert gpu_parts._missing_trl(path) == ""
    assert "trl" in gpu_parts._missing_trl(str(tmp_path / "nothing"))


def test_what_pytest_recorded_is_counted(tmp_path):
    records = tmp_path / "records.xml"
    records.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="none"><skipped/>'
        '</testcase><testcase classname="a" name="bad"><failure message="1 == 2"/></testcase></testsuite></testsuites>'
    )
    assert gpu_parts._outcomes(records) == {"passed": 1, "skipped": 1, "failed": {"a::bad": "1 == 2"}}


def test_the_bandwidth_limit_of_a_llama_counts_shared_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("shapes.CACHE", tmp_path)
    sizes = {"layers": 2, "width": 32, "heads": 4, "vocabulary": 64, "batch": 8, "prompt": 4, "response": 6}
    shape = Shape(**sizes, family="llama", kv_heads=2, inner=48)
    model = load_policy(str(prepare(shape) / "policy")).model
    assert model.config.num_key_value_heads == 2 and model.config.tie_word_embeddings
    used = sum(p.numel() for name, p in model.named_parameters() if name != "model.norm.weight")
    cache_values = 8 * (4 + 3) * 2 * 16 * 2  # rows, columns, layers, width of two heads, keys and values
    assert bytes_a_token(shape, 4) == pytest.approx(4 * (used + cache_values))
    assert LLAMA_1B.weights_read == pytest.approx(1.236e9, rel=1e-3)  # as its makers count it
    assert replace(shape, family="gpt2").folder != shape.folder


@pytest.mark.slow
def test_without_a_gpu_all_of_it_runs_small(tmp_path):
    """With no more than the wheels that its header names: what else is installed here cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {MISSING} else find(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(find_spec)\n"
    )
    output = tmp_path / "gpu.json"
    environment = {**os.environ, **NO_GPU, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = ["bash", str(SCRIPT), "--output", str(output)]
    run = subprocess.run(
        command, env=environment | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=500
    )
    report = json.loads(output.read_text())
    assert run.returncode == 0, run.stdout + json.dumps(report)[-3000:]
    parts = {name: part["result"] for name, part in report["parts"].items()}
    assert {part["status"] for part in report["parts"].values()} == {DONE} and len(parts) == 6
    assert parts["tests"] == {"ran": False, "why": "pytest is not installed"}
    assert parts["environment"]["versions"]["torch"] and parts["environment"]["machine"]["device"]
    rows = {(row["architecture"], row["dtype"]): row for row in parts["equality"]["rows"]}
    assert len(rows) == 6 and all(row["ok"] for row in rows.values())
    for (architecture, dtype), row in rows.items():
        assert bool(row["refused"]) == (architecture == "falcon_alibi") == ("captured" not in row["from_forward"])
        assert 0 < row["from_forward"]["eager"]["max"] < TOLERANCE[dtype][0]
    assert rows["llama", "float32"]["rows_alike"] == 1
    for shape in ("tiny_gpt2", "tiny_llama"):
        timed = parts["rollout"][shape]
        assert timed["ratios"]["ours float32 / generate float32"] > 0
        assert 0 < timed["cases"]["ours float32"]["share_of_limit"] < 1
        assert parts["ppo"][shape]["workers"]["ours"]["seconds"]["median"] > 0
        assert "trl" in parts["ppo"][shape]["fp32_shared"]["missing"][0]
    assert parts["ppo"]["tiny_gpt2"]["offloaded"]["ratio"] > 0
