"""What a user can get wrong (see `wrong_inputs`): one clear line, a non-zero status, nothing overwritten, and soon."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest
import torch
import toy_world
from faults import foreign_inputs, wrong_inputs
from faults.input_world import World
from transformers import AutoTokenizer

from elastic_lightning.cli import main

ROWS = wrong_inputs.ROWS | foreign_inputs.ROWS
LIMIT = 20  # seconds of this process's work; a busy machine is not the program's fault
LONGEST = 600  # letters of a line that is still clear
OUTSIDE = (  # run as a user would, in a process of their own
    "command: unknown command",
    "config: a key given twice",
    "data: truncated gzip",
    "checkpoint: a pickle payload",
    "output: the folder is a file",
)

toy, toy_fit = toy_world.toy, toy_world.toy_fit


@pytest.fixture
def world(toy, toy_fit, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("elastic_lightning.policies.reading.constants.HF_HUB_OFFLINE", True)
    return World(tmp_path, toy, toy_fit)


def files(folder):
    """Every file under a folder with its content's time, and every folder but those of a run."""
    return {
        path: path.stat().st_mtime_ns if path.is_file() else None
        for path in folder.rglob("*")
        if path.is_file() or path.name == "executed"
    }


def check(row, status, stderr):
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status not in (0, None), "it should have failed"
    assert "Traceback" not in stderr
    assert len(errors) == 1 and stderr.rstrip().endswith(errors[0]), stderr
    assert len(errors[0]) < LONGEST
    assert all(word in errors[0] for word in row.words), errors[0]


@pytest.mark.parametrize("name", ROWS)
def test_one_clear_line(name, world, tmp_path, capsys):
    row = ROWS[name]
    arguments = row.arguments(world)
    before = files(tmp_path)
    start = time.process_time()
    status = main(arguments)
    seconds = time.process_time() - start
    check(row, status, capsys.readouterr().err)
    assert files(tmp_path) == before, "nothing is overwritten, and nothing half-made stands in the way of the next try"
    assert seconds < LIMIT


@pytest.mark.parametrize("name", OUTSIDE)
def test_one_clear_line_of_a_process(name, world, tmp_path):
    row = ROWS[name]
    arguments = row.arguments(world)
    before = files(tmp_path)
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "elastic_lightning.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=20 * LIMIT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(row, done.returncode, done.stderr)
    assert files(tmp_path) == before
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < LIMIT


def test_there_are_forty_rows_of_every_kind():
    assert len(ROWS) == len(wrong_inputs.ROWS) + len(foreign_inputs.ROWS) >= 40 and set(OUTSIDE) <= set(ROWS)


def test_the_payload_would_work(world):
    """What the rows about pickles rely on: loaded without care, the payload leaves its mark."""
    flag = ROWS["checkpoint: a pickle payload"].arguments(world)[-1]
    torch.load(flag.removeprefix("--ckpt_path="), weights_only=False)
    assert (world.folder / "executed").exists()


# What looks wrong and is not, and what has no row ---------------------------------------------------------------------


def test_a_tokenizer_without_pad_token_gets_one(world, toy, tmp_path):
    def without_pad(folder):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config.pop("pad_token")
        path.write_text(json.dumps(config))
        assert AutoTokenizer.from_pretrained(folder).pad_token is None

    assert main(world.policy(without_pad)) == 0


def test_prompts_that_just_fit_are_fine(world):
    sizes = ["--model.init_args.sampling.max_new_tokens=96", "--data.init_args.max_prompt_tokens=32"]
    assert main(world.fit(*sizes, "--trainer.limit_train_batches=1", "--trainer.val_check_interval=1")) == 0


def test_a_finished_run_is_not_written_over(toy_fit, tmp_path, capsys):
    assert main(toy_fit()) == 0
    before = files(tmp_path)
    assert main(toy_fit()) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_early_stopping_by_what_nothing_logs_is_one_line_too(toy_fit, capsys):
    flags = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/rewrd"]
    assert main([*toy_fit(), *flags]) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: RuntimeError: Early stopping") and "val/rewrd" in error and "TRACEBACK" in error


def test_no_command_shows_the_usage(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_out_of_memory_says_what_to_lower(world, capsys, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr("elastic_lightning.policies.causal.CausalLM.start", full)  # where a rollout begins
    assert main(world.fit()) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: CUDA out of memory") and "micro_batch_size" in line
