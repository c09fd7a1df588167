"""Wrong pipeline files: each one line, before anything runs."""

import os

import pytest
import yaml
from pipeline_world import stage, write

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import pipeline as pipelines
from elastic_lightning.evaluation.stages import read_pipeline


def wrong(**change):
    return {"one": {**stage("a"), **change}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": wrong(comand="a")}, r"stage 'one': unknown key 'comand' \(did you mean 'command'\?\)"),
        ({"stages": wrong(command=None)}, "stage 'one': no 'command'"),
        ({"stages": wrong(needs=["tow"]), "x": 1}, "unknown key 'x'"),
        ({"stages": {**wrong(needs=["tow"]), "two": stage("b")}}, "unknown stage 'tow' .did you mean 'two'"),
        ({"stages": {"one": stage("a", needs="two"), "two": stage("b", needs="one")}}, "in a circle: "),
        ({"stages": wrong(config="none.yaml")}, "no such config file: .*none.yaml"),
        ({"stages": wrong(seeds=[1, 1])}, "seeds must be different whole numbers"),
        ({"stages": wrong(seeds=3)}, "seeds must be list, not 3"),
        ({"stages": wrong(seeds=[])}, "seeds must be different"),
        ({"stages": wrong(set={"a": "{ouput}/x"})}, r"unknown placeholder {ouput} \(did you mean 'output'"),
        ({"stages": wrong(arguments=["{data}"])}, "give the folder with --data DIR"),
        ({"stages": wrong(arguments=[{"a": 1}])}, "arguments must be strings or numbers"),
        ({"stages": wrong(produces=[1])}, "produces must hold strings"),
        ({"stages": wrong(set={1: 1})}, "keys of set must be strings"),
        ({"stages": {"report": stage("a")}}, "and not 'report'"),
        ({"stages": {"../up": stage("a")}}, "a stage is named by"),
        ({"stages": {"one": ["fit"]}}, "stage 'one': expected a mapping"),
        ({"stages": {}}, "no stages"),
        ({"stages": wrong(), "output": None}, "no 'output'"),
        ({"stages": wrong(), "jobs": 0}, "--jobs must be at least 1"),
        ({"stages": wrong(), "jobs": True}, "jobs must be int, not True"),
        ({"stages": wrong(), "data": "/nowhere/at/all"}, "--data: no such folder: /nowhere/at/all"),
        ({"stages": wrong(), "report": {"rewards": "x"}}, "report: unknown key 'rewards' .did you mean 'reward'"),
    ],
)
def test_every_mistake_is_one_line_before_anything_runs(world, content, message):
    file = world / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output": str(world / "out"), **content}))
    with pytest.raises(UserError, match=message) as caught:
        read_pipeline(file)
    assert "\n" not in str(caught.value)
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [", "not valid YAML"),
        ("stages: {a: {command: x}, a: {command: y}}", "'a' is given twice"),
        ("- a", "expected a mapping"),
        ("", "expected a mapping"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pipeline(tmp_path / "pipeline.yaml")


def test_missing_file_and_main_options(world):
    with pytest.raises(UserError, match="no such pipeline file"):
        pipelines.main([str(world / "none.yaml")])
    file = str(write(world, {"one": stage("a", set={"x": "{data}"})}))
    with pytest.raises(UserError, match="--data: no such folder"):
        pipelines.main([file, "--data", str(world / "none")])
    with pytest.raises(UserError, match="--jobs"):
        pipelines.main([file, "--data", str(world), "--jobs", "0"])
    read = read_pipeline(world / "pipeline.yaml", world, world / "elsewhere", 3)
    assert (read.output, read.jobs) == (world / "elsewhere", 3)
    assert os.fspath(read.runs["one/seed_1"].folder).startswith(str(world / "elsewhere"))
