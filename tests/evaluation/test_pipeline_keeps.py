"""What a pipeline keeps: finished stages, files of others, and one writer, however it ends and begins again."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ended import gone
from pipeline_world import run, stage, traces, write

from elastic_lightning.data.tokenizers import FILES
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import pipeline as pipelines
from elastic_lightning.evaluation.runs import event_folders
from elastic_lightning.evaluation.stages import read_pipeline
from elastic_lightning.evaluation.tax import find

CONFIGS = Path(__file__).parents[2] / "configs"
LOCK = ".elastic-lightning.lock"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def outside(world, program, *flags):
    """A pipeline in a process of its own, whose stages are this program."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom elastic_lightning import cli\n"
        "from elastic_lightning.evaluation import pipeline\n"
        f"pipeline.PROGRAM = ({sys.executable!r}, {str(program)!r})\n"
        "pipeline.run.__defaults__ = (pipeline.PROGRAM, *pipeline.run.__defaults__[1:])\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "pipeline", str(world / "pipeline.yaml"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "same",
    [
        "# a remark\nmodel: {lr: 0.1, layers: [1, 2]}\n\n",
        "model:\n  lr: 0.10  # as before\n  'layers':\n  - 1\n  - 2\n",
        "model: {lr: 0.1, layers: [1, 2]}\n# --- the end ---",
    ],
)
def test_how_a_config_is_written_changes_nothing(same, world):
    config, folder = world / "a.yaml", world / "out/one/seed_1"
    config.write_text("model: {lr: 0.1, layers: [1, 2]}\n")
    stages = {"one": stage("a", config="a.yaml"), "two": stage("b", needs=["one"])}
    assert run(world, stages)[2] == ["a", "b"]
    (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    config.write_text(same)
    assert run(world)[2] == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before and names(folder.parent) == ["seed_1"]


@pytest.mark.parametrize(
    "changed", ["model: {lr: 0.2}\n", "model: {lr: '0.1'}\n", "model: {lr: 0.1, x: null}\n", "model: {lr: 1}\n"]
)
def test_a_changed_stage_is_moved_aside_and_what_is_not_of_it_stays(changed, world):
    config, folder = world / "a.yaml", world / "out/one/seed_1"
    config.write_text("model: {lr: 0.1}\n")
    stages = {"one": stage("a", config="a.yaml", set={"make": "{run}/final/weights"}, made="{run}/final")}
    stages["one"]["set"]["make"] = "{run}/final/weights"
    assert run(world, stages)[0] == 0
    record = (folder / "stage.json").read_text()
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_text("mine too")
    config.write_text(changed)
    status, printed, ran = run(world)
    assert (status, ran) == (0, ["a"]) and f"what an earlier run left is in {folder}.old-1" in printed
    old = folder.with_name("seed_1.old-1")
    assert names(old) == ["final", "log.txt", "stage.json"] and (old / "stage.json").read_text() == record
    assert names(folder) == [".pipeline", "final", "log.txt", "notes.txt", "plots", "stage.json"]
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "plots" / "a.png").read_text() == "mine too"
    assert run(world, force=True)[2] == ["a"]
    assert names(folder.with_name("seed_1.old-2")) == names(old) and (folder / "notes.txt").read_text() == "mine"


def test_what_a_stage_makes_elsewhere_is_moved_aside_too_and_only_that(world):
    product = world / "out/tokenizer/tokenizer.json"
    product.parent.mkdir(parents=True)
    product.write_text("mine")  # before the stage ever ran
    stages = {"tokenizer": stage("a", made="{output}/tokenizer/tokenizer.json")}
    run(world, stages)
    run(world, force=True)
    assert names(product.parent) == ["seed_1", "seed_1.old-1", "tokenizer.json"]
    product.unlink()
    run(world)
    product.write_text("made first")
    run(world, force=True)
    assert (product.parent / "tokenizer.json.old-1").read_text() == "made first" and product.read_text() == "made"


def test_what_was_moved_aside_is_in_no_report(tmp_path):
    for name in ("seed_1", "seed_1.old-1", "seed_1.old-12"):
        (tmp_path / "ppo" / name).mkdir(parents=True)
        (tmp_path / "ppo" / name / "events.out.tfevents.1").touch()
        (tmp_path / "ppo" / name / "evaluation.json").write_text(json.dumps({"perplexity": {"perplexity": 2.0}}))
    assert event_folders([tmp_path]) == [tmp_path / "ppo/seed_1"]
    assert event_folders([tmp_path / "ppo/seed_1.old-1"]) == [tmp_path / "ppo/seed_1.old-1"]  # unless it is asked for
    assert [(one.method, one.seed) for one in find([tmp_path])] == [("ppo", 1)]


def test_a_stage_that_was_stopped_before_it_saved_begins_again_in_its_place(world):
    stages = {"one": stage("fit", set={"fail": "1"})}
    folder = world / "out/one/seed_1"
    assert run(world, stages)[0] == 1
    (folder / "made").unlink()
    for name in ("events.out.tfevents.1", "config.yaml", "notes.txt", "batch.writing", ".unsaved", LOCK):
        (folder / name).touch()
    (folder / "checkpoints").mkdir()
    assert run(world)[0] == 1
    assert names(folder) == [".pipeline", "log.txt", "made", "notes.txt"] and names(folder.parent) == ["seed_1"]
    (folder / "final").mkdir()  # something to keep
    assert run(world)[0] == 1
    assert names(folder.with_name("seed_1.old-1")) == ["final", "log.txt", "made"]
    assert (folder / "notes.txt").exists()


def test_a_second_pipeline_is_told_who_is_first(world):
    write(world, {"slow": stage("slow", set={"sleep": 30})})
    first = outside(world, world / "script.py")
    wait_for(world / "out/slow/seed_1/log.txt")
    second = outside(world, world / "script.py")
    assert second.wait(60) == 1
    assert f"error: process {first.pid} on " in (said := second.stdout.read()) and "writes to" in said, said
    first.terminate()
    assert first.wait(20) == 143


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_stages_of_a_killed_pipeline_end_with_it(world):
    """And the next one goes on at once."""
    (world / "child.py").write_text(
        "from elastic_lightning.processes import end_with_parent\nend_with_parent()\n"
        "import os, pathlib, sys\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        + (world / "script.py").read_text()
    )
    pid = world / "pid"
    write(world, {"slow": stage(str(pid), set={"sleep": 60})})
    first = outside(world, world / "child.py")
    wait_for(pid)
    first.kill()
    first.wait()
    assert gone(int(pid.read_text()))
    pid.unlink()
    write(world, {"slow": stage(str(pid), set={"sleep": 0})})
    assert outside(world, world / "child.py").wait(60) == 0 and pid.exists()


def test_a_run_that_somebody_else_trains_is_not_started(world, monkeypatch):
    monkeypatch.setattr(pipelines, "LAST_WORDS", 0.2)
    write(world, {"one": stage("a")})
    folder = world / "out/one/seed_1"
    run(world)
    (folder / "made").unlink()
    code = "from elastic_lightning.locks import locked; import time; from pathlib import Path\n"
    code += f"with locked(Path({str(folder)!r}), 'elastic-lightning fit'): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} on .*elastic-lightning fit"):
            run(world)
        other.kill()
    assert traces(world) == []
    assert run(world)[2] == ["a"]


def test_a_stage_is_no_pipeline(world):
    write(world, {"one": stage("pipeline", arguments=["{output}/../pipeline.yaml"])})
    with pytest.raises(UserError, match="stage 'one': a stage cannot be a pipeline"):
        read_pipeline(world / "pipeline.yaml")
    assert not (world / "out").exists()


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("pipeline*.yaml")), ids=lambda file: file.parent.name)
def test_a_tokenizer_of_ours_can_be_trained_again(file):
    """What `tokenizer` would not write over are all of it products of the stage, which are moved aside."""
    for settings in yaml.safe_load(file.read_text())["stages"].values():
        if settings["command"] == "tokenizer":
            products = settings["produces"] if isinstance(settings["produces"], list) else [settings["produces"]]
            assert {product.rpartition("/")[2] for product in products} == set(FILES)
