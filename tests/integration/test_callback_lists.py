"""`trainer.callbacks` of several configuration files: what takes part in the run, and what is said of the rest."""

from pathlib import Path

import pytest
import yaml

from elastic_lightning.cli import main
from elastic_lightning.lightning_cli import ElasticCLI

CONFIG = "configs/toy/elastic_reset.yaml"
METHOD = yaml.safe_load((Path(__file__).parents[2] / CONFIG).read_text())
BASE = [callback["class_path"] for callback in METHOD["trainer"]["callbacks"]]
HARE = {"class_path": "HareTortoise", "init_args": {"every": 3}}


@pytest.fixture
def built(toy_fit, tmp_path, monkeypatch, capsys):
    """Callbacks of the run that these further settings make of the toy's Elastic Reset, and what was printed."""
    runs = []
    monkeypatch.setattr(ElasticCLI, "_run_subcommand", lambda self, subcommand: runs.append(self.trainer))

    def build(*settings, flags=()):
        arguments = toy_fit()
        for number, callbacks in enumerate(settings):
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump({"trainer": callbacks}))
            arguments.insert(2 + number, f"--config={path}")
        assert main([*arguments, *flags]) == 0
        names = [type(callback).__name__ for callback in runs[-1].callbacks]
        return names, [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]

    return build


def test_one_callback_needs_no_list(built):
    names, _ = built({"callbacks": {"class_path": "ElasticReset", "init_args": {"every": 7}}})
    assert names.count("ElasticReset") == 1 and "BatchCheckpoint" in names and "SampleLogger" not in names


@pytest.mark.parametrize("one", [HARE, [HARE]], ids=["one", "list"])
def test_what_a_later_file_replaces_is_named(built, tmp_path, one):
    names, notes = built({"callbacks": one})
    assert "HareTortoise" in names and "ElasticReset" not in names
    (note,) = notes
    assert note.startswith(f"note: {', '.join(BASE)} of {CONFIG} are not in this run")
    names, notes = built({"callbacks": "SampleLogger"}, flags=["--trainer.callbacks=SavePretrained"])
    assert "SavePretrained" in names and "ElasticReset" not in names
    assert [line.split(" not in this run")[0] for line in notes] == [
        f"note: {', '.join(name for name in BASE if name != 'SavePretrained')} of {CONFIG} are",
        f"note: SampleLogger of {tmp_path}/0.yaml is",
    ]


def test_what_is_added_replaces_nothing(built):
    names, notes = built({"callbacks+": [HARE]}, {"callbacks+": {"class_path": "DeviceStatsMonitor"}})
    assert {"ElasticReset", "SampleLogger", "SavePretrained", "HareTortoise", "DeviceStatsMonitor"} <= set(names)
    assert notes == []


@pytest.mark.slow
def test_the_command_line_measures_the_average(toy_fit, tmp_path, capsys):
    """`validate` of a checkpoint gives what the fit logged when it was written."""
    import json
    import re

    average = {"class_path": "EMAOnly", "init_args": {"decay": 0.9, "validate": True, "save": False}}
    flags = [f"--trainer.callbacks={json.dumps([average])}", "--model.init_args.ppo.learning_rate=1e-2"]
    assert main([*toy_fit(), *flags]) == 0
    run = tmp_path / "run" / "seed_1"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    logged = events.Scalars("val/kl")[-1]
    capsys.readouterr()
    assert main(["validate", f"--config={run}/config.yaml", f"--ckpt_path={run}/checkpoints/batch_000004.ckpt"]) == 0
    measured = float(re.search(r"val/kl\W+([\d.]+)", capsys.readouterr().out).group(1))
    assert logged.step == 4 and logged.value > 1e-3
    assert measured == pytest.approx(logged.value, rel=1e-4)
