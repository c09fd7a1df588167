"""The progress bar, as it prints to a log file and to a terminal."""

import io
import re
import sys

import pytest

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks import BatchCheckpoint, RunProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(lab, root, module, bar, batches=None, validation=None, callbacks=(), **options):
    trainer = lab.trainer(root, [bar, *callbacks], **{"enable_progress_bar": True} | options)
    trainer.fit(module, lab.loader(batches or lab.prompts(3)), lab.loader(validation) if validation else None)
    return trainer


def test_plain_lines(lab, tmp_path, capsys):
    trainer = run(lab, tmp_path, lab.ppo(), RunProgress(seconds=0), callbacks=[ElasticReset(every=2)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3", "3/3"]  # one a batch, and the end
    reward, kl = (float(trainer.callback_metrics[f"train/{name}"]) for name in ("reward", "kl"))
    assert f"reward {reward:.3f}" in lines[-1] and f"kl {kl:.2f}" in lines[-1]
    assert "batches/s" in lines[-1] and "samples/s" in lines[-1]
    assert lines[-1].endswith("next reset in 1")


def test_lines_are_spaced(lab, tmp_path, capsys):
    run(lab, tmp_path, lab.ppo(), RunProgress(seconds=1000))
    assert capsys.readouterr().out.count("training ") == 1  # the last alone


def test_no_word_of_resets_where_there_are_none(lab, tmp_path, capsys):
    run(lab, tmp_path, lab.ppo(), RunProgress(seconds=0))
    assert "reset" not in capsys.readouterr().out


def test_nothing_when_disabled(lab, tmp_path, capsys):
    bar = RunProgress(seconds=0)
    bar.disable()
    run(lab, tmp_path, lab.ppo(), bar, validation=lab.prompts(1), num_sanity_val_steps=-1)
    bar.print("a word")
    assert not any(word in capsys.readouterr().out for word in ("training", "validating", "a word"))


def test_a_module_that_logs_nothing(lab, tmp_path, capsys):
    run(lab, tmp_path, lab.plain(), RunProgress(seconds=0), lab.batches(2), max_epochs=2)
    assert "training 4/4" in capsys.readouterr().out


def test_validation_shows_in_the_line(lab, tmp_path, capsys):
    run(lab, tmp_path, lab.ppo(), RunProgress(seconds=0), validation=lab.prompts(2), num_sanity_val_steps=-1)
    out = capsys.readouterr().out
    assert "validating the start 2/2" in out
    assert "val reward" in out.splitlines()[-1]


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_other_stages_count_their_batches(lab, tmp_path, capsys, what):
    bar, module = RunProgress(seconds=0), lab.ppo()
    trainer = run(lab, tmp_path, module, bar)
    capsys.readouterr()
    getattr(trainer, what)(module, lab.loader(lab.prompts(2)))
    label = {"validate": "validating", "test": "testing", "predict": "predicting"}[what]
    assert f"{label} 2/2" in capsys.readouterr().out


def test_a_resumed_run_goes_on_counting(lab, tmp_path, capsys):
    lab.fit(lab.ppo(), tmp_path, []).save_checkpoint(tmp_path / "half.ckpt")
    trainer = lab.trainer(tmp_path, [RunProgress(seconds=0)], enable_progress_bar=True, max_epochs=2)
    trainer.fit(lab.ppo(), lab.loader(lab.prompts()), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert "training 5/8" in capsys.readouterr().out


def test_a_run_resumed_with_a_lower_limit_does_not_count_past_it(lab, tmp_path, capsys):
    save = [BatchCheckpoint(every=1)]
    lab.fit(lab.ppo(), tmp_path, save, max_epochs=2, limit_train_batches=3, enable_checkpointing=True)
    capsys.readouterr()
    bars = [RunProgress(seconds=0), BatchCheckpoint(every=1)]
    options = {"enable_progress_bar": True, "enable_checkpointing": True, "limit_train_batches": 3}
    trainer = lab.trainer(tmp_path, bars, max_epochs=1, **options)
    path = tmp_path / "checkpoints" / "batch_000006.ckpt"
    trainer.fit(lab.ppo(), lab.loader(lab.prompts()), ckpt_path=path, weights_only=True)
    out = capsys.readouterr().out
    assert "6/3" not in out and "training 6/6" in out


def test_a_bar_on_a_terminal(lab, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    run(lab, tmp_path, lab.ppo(), RunProgress(), callbacks=[ElasticReset(every=2)])
    shown = terminal.getvalue()
    assert "training" in shown and "3/3" in shown and "reward" in shown and "next reset in" in shown


@pytest.mark.parametrize("columns", [80, 50])
def test_a_narrow_terminal_shows_the_batches_and_the_numbers(lab, tmp_path, monkeypatch, columns):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    run(lab, tmp_path, lab.ppo(), RunProgress(), callbacks=[ElasticReset(every=2)])
    drawn = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).split("\n") if line]
    last = "\n".join(drawn[-4:])
    assert "3/3" in last and "reward" in last and "next reset in 1" in " ".join(last.split())
    assert "…" not in last and all(len(line.split("\r")[-1]) <= columns for line in drawn)


def test_no_stdout_at_all(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    run(lab, tmp_path, lab.plain(), RunProgress(seconds=0), lab.batches(2))


def test_the_bar_is_taken_down_after_an_exception(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    bar, module = RunProgress(), lab.plain()

    def fails(batch, batch_idx):
        assert bar._bar is not None
        raise RuntimeError("went wrong")

    module.training_step = fails
    with pytest.raises(RuntimeError, match="went wrong"):
        run(lab, tmp_path, module, bar, lab.batches(2))
    assert bar._bar is None
