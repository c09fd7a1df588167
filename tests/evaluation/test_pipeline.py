"""Pipelines whose stages are a tiny script in place of the command line."""

import io
import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from ended import gone
from pipeline_world import run, stage, traces, write
from rich.console import Console

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import pipeline as pipelines
from elastic_lightning.evaluation import progress
from elastic_lightning.evaluation.stages import flag, read_pipeline

CHAIN = {
    "third": stage("c", needs=["second"]),
    "second": stage("b", needs="first"),
    "first": stage("a"),
    "aside": stage("d"),
}


def test_order_skip_and_rerun_of_what_depends(world):
    status, printed, ran = run(world, CHAIN)
    assert status == 0 and sorted(ran) == ["a", "b", "c", "d"]
    assert ran.index("a") < ran.index("b") < ran.index("c")
    assert "first/seed_1: done" in printed and "No report" in printed
    assert (world / "out/first/seed_1/log.txt").read_text() == "hello from a\n"

    status, printed, ran = run(world)
    assert status == 0 and ran == [] and printed.count("skipped") == 4

    changed = {**CHAIN, "second": stage("b", needs="first", set={"lr": 2})}
    assert run(world, changed)[2] == ["b", "c"]

    (world / "out/first/seed_1/made").unlink()
    assert run(world)[2] == ["a", "b", "c"]
    assert run(world, force=True)[2].count("d") == 1


def test_upstream_rerun_in_another_call_is_noticed(world):
    run(world, CHAIN)
    assert run(world, only=["first"], force=True)[2] == ["a"]
    assert run(world)[2] == ["b", "c"]


def test_changed_config_file_reruns(world):
    (world / "a.yaml").write_text("x: 1")
    stages = {"one": stage("a", config="a.yaml")}
    assert run(world, stages)[2] == ["a"]
    assert f"--config={world / 'a.yaml'}" in traces(world)[0]["args"]
    assert run(world)[2] == []
    (world / "a.yaml").write_text("x: 2")
    assert run(world)[2] == ["a"]


def test_independent_stages_overlap_up_to_jobs(world, monkeypatch):
    monkeypatch.setattr(pipelines, "cores", lambda: 4)
    stages = {name: stage(name, set={"sleep": 0.6}) for name in "abc"}
    run(world, stages, jobs=2)
    one, two, three = sorted(traces(world), key=lambda line: line["began"])
    assert two["began"] < one["ended"]
    assert three["began"] > min(one["ended"], two["ended"])
    assert {line["threads"] for line in traces(world)} == {"2"}


def test_fit_flags_seeds_and_placeholders(world):
    (world / "data").mkdir()
    settings = {
        "model.lr": 1e-5,
        "on": True,
        "list": [1, "a"],
        "policy": "{output}/lm/seed_1/final",
        "json": '{"a": 1}',
    }
    stages = {"ppo": stage("fit", seeds=[1, 2], set=settings, arguments=["--data", "{data}", "{seed}", 7])}
    run(world, stages, data=str(world / "data"))
    out = world / "out"
    assert sorted(line["args"] for line in traces(world))[1] == [
        "fit",
        "--seed_everything=2",
        "--trainer.logger=TensorBoardLogger",
        f"--trainer.logger.init_args.save_dir={out}",
        "--trainer.logger.init_args.name=ppo",
        "--trainer.logger.init_args.version=seed_2",
        f"--make={out}/ppo/seed_2/made",
        "--model.lr=1.0e-05",
        "--on=true",
        "--list=[1, a]",
        f"--policy={out}/lm/seed_1/final",
        '--json={"a": 1}',
        "--data",
        str(world / "data"),
        "2",
        "7",
    ]
    stages["ppo"]["seeds"] = [1, 2, 3]
    assert len(run(world, stages, data=str(world / "data"))[2]) == 1


def test_flags_are_what_jsonargparse_reads():
    assert [flag(value) for value in ("x: y", 3, None, {"a": [1.5]})] == ["x: y", "3", "null", "{a: [1.5]}"]


def test_report_closes_over_fits_with_the_tag(world):
    stages = {
        "ppo": stage("fit", seeds=[1, 2], set={"reward": 0.04}),
        "elastic": stage("fit", set={"reward": 0.03}),
        "language_model": stage("fit"),
    }
    status, printed, _ = run(world, stages, jobs=2)
    assert status == 0 and "0.900 ± 0.000" in printed and "Left out" not in printed
    written = {file.name for file in (world / "out/report").iterdir()}
    assert written == {"table.csv", "summary.csv", "frontier.png", ".report.json"}

    stages["elastic"]["report"] = True
    printed = run(world, stages)[1]
    assert "elastic " in printed and "ppo  " not in printed

    (world / "out/report/table.csv").write_text("mine")  # no reason to fail when all the work is done
    status, printed, _ = run(world, stages)
    assert status == 0 and f"it is in {world}/out/report.old-1 now" in printed
    assert (world / "out/report.old-1/table.csv").read_text() == "mine"
    assert (world / "out/report/table.csv").read_text().startswith("method,")


def test_failure_shows_the_log_and_stops_the_rest(world):
    stages = {
        "slow": stage("slow", set={"sleep": 30, "child": str(world / "child")}),
        "bad": stage("bad", set={"sleep": 0.8, "fail": 1}),
        "after": stage("after", needs=["bad"]),
    }
    began = time.monotonic()
    status, printed, ran = run(world, stages, jobs=2)
    assert status == 1 and ran == ["bad"] and time.monotonic() - began < 10
    assert "bad/seed_1 failed: exit status 3" in printed and str(world / "out/bad/seed_1/log.txt") in printed
    assert "line 99" in printed and "line 80\n" in printed and "line 79" not in printed
    assert "slow/seed_1: stopped" in printed
    assert gone(int((world / "child").read_text()))
    assert run(world, {**stages, "bad": stage("bad"), "slow": stage("slow")})[2] == ["slow", "bad", "after"]


def test_outputs_that_are_not_written_are_a_failure(world):
    stages = {"one": {"command": "a"}}
    status, printed, _ = run(world, stages)
    assert status == 1 and f"without writing {world / 'out/one/seed_1/final'}" in printed


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_stages(world, number, expected):
    write(world, {"slow": stage("slow", set={"sleep": 30, "child": str(world / "child")})})
    code = f"""
        import sys
        from pathlib import Path
        from elastic_lightning.evaluation import pipeline
        sys.exit(pipeline.run(pipeline.read_pipeline(Path({str(world / "pipeline.yaml")!r})),
                              [sys.executable, {str(world / "script.py")!r}]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (world / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(10) == expected
    assert gone(int((world / "child").read_text()))
    assert not (world / "out/slow/seed_1/stage.json").exists()


def test_foreign_folder_is_never_touched(world):
    foreign = world / "out/one/seed_1"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by a pipeline"):
        run(world, {"zero": stage("z"), "one": stage("a")})
    assert (foreign / "thesis.txt").read_text() == "years of work"
    assert traces(world) == []


def test_own_folder_is_moved_aside_before_a_rerun(world):
    run(world, {"one": stage("a")})
    (world / "out/one/seed_1/events.out.tfevents.1").touch()
    (world / "out/one/seed_1/final").mkdir()
    run(world, force=True)
    made = {"log.txt", "made", "stage.json"}
    assert {path.name for path in (world / "out/one/seed_1").iterdir()} == {".pipeline", *made}
    moved = {path.name for path in (world / "out/one/seed_1.old-1").iterdir()}
    assert moved == {"events.out.tfevents.1", "final", *made}


def test_only(world):
    with pytest.raises(UserError, match=r"first/seed_1 must be complete.*add 'first'"):
        run(world, CHAIN, only=["second"])
    assert run(world, only=["first", "second"])[2] == ["a", "b"]
    assert run(world, only=["third"])[2] == ["c"]
    with pytest.raises(UserError, match="'second' stands between"):
        run(world, only=["first", "third"])
    with pytest.raises(UserError, match=r"unknown stage 'frist' .did you mean 'first'"):
        run(world, only=["frist"])


def test_live_table_and_lines(world, monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT", 0.3)
    _, printed, _ = run(world, {"one": stage("a", set={"sleep": 0.8})})
    assert printed.count("one/seed_1: running") >= 3 and "hello from a" in printed

    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    pipelines.run(read_pipeline(world / "pipeline.yaml"), [sys.executable], console=console)
    assert "skipped" in console.file.getvalue()


def test_tail_shows_what_a_terminal_shows(tmp_path):
    (tmp_path / "log").write_bytes(b"one\n 10%\r 50%\r100%\n\x1b[32mgreen\x1b[0m\n\nbad \xff\r\n")
    assert progress.tail(tmp_path / "log", 3) == ["100%", "green", "bad \ufffd"]
    assert progress.tail(tmp_path / "none", 3) == []


def test_record_that_is_no_json_reruns(world):
    run(world, {"one": stage("a")})
    (world / "out/one/seed_1/stage.json").write_text("{")
    assert run(world)[2] == ["a"]


def test_the_model_is_a_placeholder_with_a_default(world):
    stages = {"one": stage("a", set={"x": "{model}"}), "two": stage("b")}
    with pytest.raises(UserError, match="--model"):
        read_pipeline(write(world, stages))
    file = write(world, stages, model="org/name")
    default, given = read_pipeline(file), read_pipeline(file, model="folder")
    assert "--x=org/name" in default.runs["one/seed_1"].arguments
    assert "--x=folder" in given.runs["one/seed_1"].arguments
    changed = [name for name in default.runs if default.runs[name].fingerprint != given.runs[name].fingerprint]
    assert changed == ["one/seed_1"]  # another model is another run, where it is read


def test_a_pipeline_that_only_evaluates_prints_what_it_measured(world):
    run(world, {"ppo_humaneval": stage("evaluate")})
    found = {"humaneval": {"pass@1": 0.125}}
    (world / "out/ppo_humaneval/seed_1/evaluation.json").write_text(json.dumps(found))
    _, printed, ran = run(world)
    assert not ran and "pass@1" in printed and "0.125" in printed and "No report" not in printed
    assert not (world / "out/report").exists()  # which another pipeline may have written


def test_a_fit_that_was_interrupted_goes_on_from_its_checkpoint(world):
    failing = {"one": stage("fit", "{run}/checkpoints/batch_000001.ckpt", set={"fail": "1"})}
    assert run(world, failing)[0] == 1
    assert not any("ckpt_path" in argument for argument in traces(world)[0]["args"])
    folder = world / "out/one/seed_1"
    (folder / "kept").touch()
    assert run(world)[0] == 1
    assert "--ckpt_path=last" in traces(world)[0]["args"] and (folder / "kept").exists()
    assert (folder / "log.txt").read_text().count("hello from fit") == 2
    assert run(world, force=True)[0] == 1
    assert "--ckpt_path=last" not in traces(world)[0]["args"] and (folder / "kept").exists()
    assert [path.name for path in (folder.parent / "seed_1.old-1/checkpoints").iterdir()] == ["batch_000001.ckpt"]
    failing["one"]["set"]["more"] = "1"  # another run now
    assert run(world, failing)[0] == 1
    assert "--ckpt_path=last" not in traces(world)[0]["args"]


def test_what_reads_another_pipelines_run_is_out_of_date_when_that_ran_again(world):
    run(world, {"model": stage("a")})
    stages = {"measured": stage("b", set={"of": "{output}/model/seed_1/final"})}
    assert run(world, stages)[2] == ["b"] and run(world, stages)[2] == []
    run(world, {"model": stage("a")}, force=True)
    assert run(world, stages)[2] == ["b"]
