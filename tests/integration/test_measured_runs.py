"""Whose weights the README's examples measure, generate from and go on with."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from toy_world import fit_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_lightning.cli import main
from elastic_lightning.errors import UserError
from elastic_lightning.resume import checkpoint_for

README = (Path(__file__).parents[2] / "README.md").read_text()
LEARNS = ["--model.init_args.ppo.learning_rate=0.005", "--model.init_args.sampling.top_k=1"]  # greedy


def shown(beginning, **places):
    """The README's line that begins so, as arguments, with RUN and the like in their places."""
    (line,) = re.findall(rf"^elastic-lightning ({beginning}.*?)(?: *#.*)?$", README, re.MULTILINE)
    for name, place in places.items():
        line = line.replace(name, str(place))
    return shlex.split(line)


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """The run of the README's resume example, begun, and stopped after two of its batches."""
    root = tmp_path_factory.mktemp("measured")
    example = shown("fit .*--ckpt_path last")
    flags = [*fit_arguments(toy, root)[2:], *LEARNS]
    assert main([*example[:-2], *flags, "--trainer.limit_train_batches=2"]) == 0
    begun = set((root / "run" / "seed_1" / "checkpoints").iterdir())
    assert main([*example, *flags, "--trainer.limit_train_batches=2", "--trainer.max_epochs=2"]) == 0
    folder = root / "run" / "seed_1"
    assert [path.name for path in begun] == ["batch_000002.ckpt"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "batch_000004.ckpt"
    return folder


def logged(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars("val/kl")]


def measured(out):
    """val/kl in the table that `validate` prints."""
    return float(re.search(r"val/kl\W+([\d.e-]+)", out)[1])


def greedy(model, tokenizer, prompt):
    """What plain transformers makes of a prompt."""
    tokens = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    ids = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, tokens.shape[1] :], skip_special_tokens=True).strip()


def test_validate_measures_what_the_run_ended_with(run, capsys):
    start, half, end = logged(run)
    assert start == pytest.approx(0, abs=1e-6) and end > 0.01 and abs(end - half) > 1e-3
    assert main(["validate", f"--config={run}/config.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"measuring {run}/checkpoints/batch_000004.ckpt (--ckpt_path none for the start)" in out
    assert measured(out) == pytest.approx(end, rel=1e-5)
    assert main(["validate", f"--config={run}/config.yaml", "--ckpt_path", "none"]) == 0
    assert measured(capsys.readouterr().out) == pytest.approx(0, abs=1e-6)
    assert main([part.replace("000050", "000002") for part in shown("validate", RUN=run)]) == 0
    assert measured(capsys.readouterr().out) == pytest.approx(half, rel=1e-5)


def test_predict_answers_as_the_final_model_does(run, toy):
    assert main(shown("predict", RUN=run)) == 0
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (run / "final", toy / "policy")]
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    ours, start = ([greedy(model, tokenizer, row["prompt"]) for row in rows] for model in models)
    assert [row["response"].strip() for row in rows] == ours != start


def test_generate_takes_the_final_model(run, capsys):
    arguments = [part for part in shown("generate", RUN=run) if part not in ("--samples", "3")]
    assert main([*arguments, "--top_k=1", "--max_new_tokens=6"]) == 0
    model, tokenizer = (kind.from_pretrained(run / "final") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert (
        capsys.readouterr().out.strip() == ("this film was" + " " + greedy(model, tokenizer, "this film was")).strip()
    )


def test_the_configuration_of_a_run_does_not_say_where_it_was_resumed(run):
    assert "ckpt_path: null" in (run / "config.yaml").read_text()


def trainer_in(folder):
    return Trainer(logger=False, default_root_dir=folder, accelerator="cpu")


def saved(folder, *names):
    for name in names:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / name).touch()
    return folder


def test_a_run_that_moved_is_measured_where_it_lies(tmp_path):
    here = saved(tmp_path / "here", "batch_000007.ckpt")
    elsewhere = trainer_in(tmp_path / "where_it_was")
    found = checkpoint_for("validate", None, elsewhere, [Path("base.yaml"), here / "config.yaml"])
    assert found == here / "checkpoints" / "batch_000007.ckpt"
    assert checkpoint_for("validate", "none", elsewhere, [here / "config.yaml"]) is None
    assert checkpoint_for("fit", None, elsewhere, [here / "config.yaml"]) is None
    assert checkpoint_for("validate", None, elsewhere, [tmp_path / "config.yaml"]) is None


def test_two_runs_or_none_left_are_no_guess(tmp_path):
    here, there = (saved(tmp_path / name, "batch_000007.ckpt") for name in ("here", "there"))
    with pytest.raises(UserError, match=r"which of these runs is meant: .*here or .*there"):
        checkpoint_for("predict", None, trainer_in(there), [here / "config.yaml"])
    (tmp_path / "emptied" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"emptied holds a run and no checkpoint.*--ckpt_path none"):
        checkpoint_for("predict", None, trainer_in(tmp_path / "emptied"), [])
