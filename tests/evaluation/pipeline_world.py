"""A pipeline file and what its runs leave, for stages that are a tiny script in place of the command line."""

import io
import json
import sys

import yaml
from rich.console import Console

from elastic_lightning.evaluation import pipeline as pipelines
from elastic_lightning.evaluation.stages import read_pipeline

# Writes the files named, traces when it ran, and fails, sleeps or logs to TensorBoard when it is told to.
SCRIPT = """
import json, os, pathlib, subprocess, sys, time
options = dict(argument[2:].split("=", 1) for argument in sys.argv[2:] if argument.startswith("--") and "=" in argument)
began = time.time()
print("hello from", sys.argv[1])
if "child" in options:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(options["child"]).write_text(str(child.pid))
time.sleep(float(options.get("sleep", 0)))
if "reward" in options:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    folder = "{trainer.logger.init_args.save_dir}/{trainer.logger.init_args.name}/{trainer.logger.init_args.version}"
    for key, value in options.items():
        folder = folder.replace("{" + key + "}", value)
    writer = EventFileWriter(folder)
    for step in (0, 10):
        for tag, value in (("val/reward", 0.5 + step * float(options["reward"])), ("val/kl", step)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=began, summary=summary))
    writer.close()
if "make" in options:
    pathlib.Path(options["make"]).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(options["make"]).write_text("made")
with open(os.environ["TRACE"], "a") as trace:
    line = {"args": sys.argv[1:], "began": began, "ended": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}
    trace.write(json.dumps(line) + "\\n")
if "fail" in options:
    print("\\n".join(f"line {i}" for i in range(100)))
    sys.exit(3)
"""


def stage(command="work", made="{run}/made", **more):
    """A stage that writes one file; `set` is added to."""
    settings = {"make": made, **more.pop("set", {})}
    return {"command": command, "set": settings, "produces": [made], **more}


def write(world, stages, **more):
    """The pipeline file."""
    file = world / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output": str(world / "out"), "stages": stages, **more}, sort_keys=False))
    return file


def run(world, stages=None, only=None, force=False, **more):
    """(exit status, what was printed, the commands that ran) of one call."""
    (world / "trace.jsonl").unlink(missing_ok=True)
    console = Console(file=io.StringIO(), width=200)
    pipeline = read_pipeline(write(world, stages, **more) if stages else world / "pipeline.yaml")
    status = pipelines.run(pipeline, [sys.executable, str(world / "script.py")], only, force, console)
    return status, console.file.getvalue(), [line["args"][0] for line in traces(world)]


def traces(world):
    file = world / "trace.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
