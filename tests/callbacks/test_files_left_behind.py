"""Samples, predictions, save_pretrained folders and checkpoints: what a run leaves in its folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_lightning.callbacks import BatchCheckpoint, EMAOnly, ResponseWriter, SampleLogger, SavePretrained
from elastic_lightning.callbacks.samples import _markdown
from elastic_lightning.errors import UserError


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# SampleLogger ----------------------------------------------------------------------------------------------------


def test_samples_are_written_at_each_validation(lab, tmp_path, logger, read_events):
    module = lab.ppo()
    validation = [torch.randint(0, 12, (2, 5)), *lab.prompts(3, rows=2)]  # human text comes first and is not sampled
    options = {"logger": logger, "num_sanity_val_steps": -1, "val_check_interval": 2}
    trainer = lab.trainer(tmp_path, [SampleLogger(samples=3)], **options)
    trainer.fit(module, lab.loader(lab.prompts(4)), lab.loader(validation))
    rows = lines(tmp_path / "run" / "samples.jsonl")
    assert [row["ppo_step"] for row in rows] == [0] * 3 + [2] * 3 + [4] * 3
    assert set(rows[0]) == {"ppo_step", "prompt", "response", "reward", "complete"}
    prompts = [module.tokenizer.decode(tokens) for batch in validation[1:3] for tokens in batch.tokens][:3]
    for start in (0, 3, 6):
        assert [row["prompt"] for row in rows[start : start + 3]] == prompts
    for row in rows:
        words = row["response"].split()
        assert row["reward"] == pytest.approx(words.count("w3") / max(len(words), 1))
        assert isinstance(row["complete"], bool) and (len(words) < 4 or not row["complete"])
    ((tag, tables),) = read_events(logger.log_dir, "text").items()
    assert tag.startswith("samples") and [step for step, _ in tables] == [0, 2, 4]
    for (_, table), start in zip(tables, (0, 3, 6), strict=True):
        assert len(table.splitlines()) == 2 + 3
        for row in rows[start : start + 3]:
            assert f"| {row['prompt']} | {row['response']} | {row['reward']:.3f} |" in table


def test_samples_of_one_policy_are_the_same_each_time(lab, tmp_path, logger):
    module, trainer = lab.ppo(), None
    for _ in range(2):
        trainer = lab.trainer(tmp_path, [SampleLogger()], logger=logger)
        trainer.validate(module, lab.loader(lab.prompts(1)), verbose=False)
    rows = lines(tmp_path / "run" / "samples_validate.jsonl")
    assert len(rows) == 8 and rows[:4] == rows[4:]


def test_a_table_survives_pipes_and_newlines(lab, tmp_path, logger, read_events):
    class Odd(SampleLogger):
        def on_validation_batch_end(self, trainer, pl_module, outputs, *args, **kwargs):
            outputs = [row | {"prompt": "a|b\nc", "response": "ü"} for row in outputs]
            super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    trainer = lab.trainer(tmp_path, [Odd(samples=1)], logger=logger)
    trainer.validate(lab.ppo(), lab.loader(lab.prompts(1)), verbose=False)
    ((_, [(_, table)]),) = read_events(logger.log_dir, "text").items()
    assert table.splitlines()[2].startswith(r"| a\|b c | ü |")
    (row,) = lines(tmp_path / "run" / "samples_validate.jsonl")
    assert row["prompt"] == "a|b\nc" and "ü" in (tmp_path / "run" / "samples_validate.jsonl").read_text(
        encoding="utf-8"
    )


# ResponseWriter --------------------------------------------------------------------------------------------------


def test_predictions_are_written_once_and_whole(lab, tmp_path):
    path = tmp_path / "deep" / "predictions.jsonl"
    path.parent.mkdir()
    path.write_text("stale\n")
    trainer = lab.trainer(tmp_path, [ResponseWriter(str(path), replace=True)])
    returned = trainer.predict(lab.ppo(), lab.loader(lab.prompts(3)))
    rows = lines(path)
    assert rows == [row for batch in returned for row in batch] and len(rows) == 12
    assert set(rows[0]) == {"prompt", "response", "complete", "reward"}


def test_predictions_go_to_the_run_folder_by_default(lab, tmp_path, logger):
    trainer = lab.trainer(tmp_path, [ResponseWriter()], logger=logger)
    trainer.predict(lab.ppo(), lab.loader(lab.prompts(1)), return_predictions=False)
    assert len(lines(tmp_path / "run" / "predictions.jsonl")) == 4


# SavePretrained --------------------------------------------------------------------------------------------------


def test_the_end_is_saved(lab, tmp_path, logger):
    module = lab.ppo()
    lab.fit(module, tmp_path, [SavePretrained()], logger=logger)
    assert not (tmp_path / "run" / "best").exists() and not list((tmp_path / "run").glob("*.writing"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert tokenizer("w3 w5").input_ids == [3, 5]
    tokens = torch.randint(0, 12, (2, 5))
    torch.testing.assert_close(model(tokens).logits, module.actor.lm.model(tokens).logits)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_the_best_is_saved(lab, tmp_path, mode, best):
    scores, weights = iter([0.3, 0.9, 0.1, 0.5]), []
    module = lab.ppo()

    def validation_epoch_end():
        module.log("val/score", next(scores))
        weights.append({n: p.detach().clone() for n, p in module.shadowed_parameters().items()})

    module.on_validation_epoch_end = validation_epoch_end
    callback = SavePretrained(monitor="val/score", mode=mode, folder=str(tmp_path / "out"))
    trainer = lab.trainer(tmp_path, [callback], val_check_interval=1)
    trainer.fit(module, lab.loader(lab.prompts(4)), lab.loader(lab.prompts(1)))
    assert names(tmp_path / "out") == ["best", "final"]
    for folder, index in (("best", best - 1), ("final", 3)):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / folder)
        for name, parameter in saved.named_parameters():
            assert torch.equal(parameter, weights[index][f"model.{name}"]), folder
    assert callback.best == pytest.approx({"max": 0.9, "min": 0.1}[mode])


@pytest.mark.parametrize("first", [True, False])
def test_the_best_are_the_weights_that_were_measured(lab, tmp_path, first):
    module, measured = lab.ppo(), []

    def validation_epoch_end():
        module.log("val/score", float(len(measured)))
        measured.append({n: p.detach().clone() for n, p in module.shadowed_parameters().items()})

    module.on_validation_epoch_end = validation_epoch_end
    callbacks = [
        SavePretrained(monitor="val/score", folder=str(tmp_path / "out")),
        EMAOnly(0.5, validate=True, save=False),
    ]
    trainer = lab.trainer(tmp_path, callbacks if first else callbacks[::-1], val_check_interval=1)
    trainer.fit(module, lab.loader(lab.prompts(2)), lab.loader(lab.prompts(1)))
    best, final = (AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("best", "final"))
    for name, parameter in best.named_parameters():
        assert torch.equal(parameter, measured[-1][f"model.{name}"])
    assert any(not torch.equal(a, b) for a, b in zip(best.parameters(), final.parameters(), strict=True))
    online = module.shadowed_parameters()
    assert all(torch.equal(parameter, online[f"model.{name}"]) for name, parameter in final.named_parameters())


def test_a_masked_response_has_no_reward_to_show():
    rows = [{"prompt": "a", "response": "b", "reward": None}, {"prompt": "c", "response": "d", "reward": 0.5}]
    assert _markdown(rows).split("\n")[2:] == ["| a | b | none |", "| c | d | 0.500 |"]


def test_the_best_so_far_is_remembered(lab, tmp_path):
    callback = SavePretrained(monitor="val/reward")
    callback.load_state_dict({"best": 0.7})
    assert callback.state_dict() == {"best": 0.7}


def test_a_nan_is_never_the_best(lab, tmp_path):
    scores, module = iter([float("nan"), 0.2]), lab.ppo()
    module.on_validation_epoch_end = lambda: module.log("val/score", next(scores))
    callback = SavePretrained(monitor="val/score", folder=str(tmp_path / "out"))
    trainer = lab.trainer(tmp_path, [callback], val_check_interval=1)
    trainer.fit(module, lab.loader(lab.prompts(2)), lab.loader(lab.prompts(1)))
    assert callback.best == pytest.approx(0.2)


def test_an_unknown_monitor_is_named(lab, tmp_path):
    trainer = lab.trainer(tmp_path, [SavePretrained(monitor="val/rewrd")], num_sanity_val_steps=2)
    with pytest.raises(UserError, match=r"nothing logs 'val/rewrd'.*val/reward"):
        trainer.fit(lab.ppo(), lab.loader(lab.prompts(1)), lab.loader(lab.prompts(1)))


def test_lora_is_saved_merged_or_as_adapter(lab, tmp_path):
    for adapter in ("merged", "adapter"):
        lab.fit(lab.ppo(lora=True), tmp_path, [SavePretrained(adapter=adapter, folder=str(tmp_path / adapter))])
    assert "adapter_config.json" not in names(tmp_path / "merged" / "final")
    assert "adapter_model.safetensors" in names(tmp_path / "adapter" / "final")


# BatchCheckpoint -------------------------------------------------------------------------------------------------


def checkpoints(lab, root, count=5, **options):
    trainer = lab.trainer(root, [BatchCheckpoint(**options)], enable_checkpointing=True)
    trainer.fit(lab.ppo(), lab.loader(lab.prompts(count)))
    return names(root / "checkpoints")


def test_checkpoints_count_ppo_batches(lab, tmp_path):
    numbers = (2, 4, 5)  # the last at the end
    assert checkpoints(lab, tmp_path, every=2, keep=5) == [f"batch_00000{number}.ckpt" for number in numbers]
    for number in numbers:
        checkpoint = torch.load(tmp_path / "checkpoints" / f"batch_00000{number}.ckpt", weights_only=True)
        assert checkpoint["ppo_step"] == number


def test_the_latest_are_kept(lab, tmp_path):
    assert checkpoints(lab, tmp_path, every=1, keep=2) == ["batch_000004.ckpt", "batch_000005.ckpt"]


def test_a_later_file_of_an_older_run_does_not_push_out_the_new(lab, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    stale = [tmp_path / "checkpoints" / f"batch_0000{number}.ckpt" for number in (90, 91)]
    for path in stale:
        path.write_text("an older run's")
    kept = checkpoints(lab, tmp_path, every=1, keep=2)
    assert kept == ["batch_000004.ckpt", "batch_000005.ckpt", "batch_000090.ckpt", "batch_000091.ckpt"]
    assert all(path.read_text() == "an older run's" for path in stale)


def test_a_save_that_dies_leaves_the_last_one_whole(lab, tmp_path, monkeypatch):
    callback = BatchCheckpoint(every=1)
    trainer = lab.trainer(tmp_path, [callback], enable_checkpointing=True)
    save, calls = trainer.save_checkpoint, []

    def dies(path, **options):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        save(path, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", dies)
    with pytest.raises(UserError, match=r"no space left on device; the last good checkpoint is .*batch_000002.ckpt"):
        trainer.fit(lab.ppo(), lab.loader(lab.prompts(5)))
    whole = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in whole] == ["batch_000001.ckpt", "batch_000002.ckpt"]
    assert [torch.load(path, weights_only=True)["ppo_step"] for path in whole] == [1, 2]


def test_the_count_goes_on_after_a_resume(lab, tmp_path):
    def run(epochs, ckpt_path=None):
        trainer = lab.trainer(
            tmp_path, [BatchCheckpoint(every=2, keep=9)], enable_checkpointing=True, max_epochs=epochs
        )
        trainer.fit(lab.ppo(), lab.loader(lab.prompts(3)), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "end.ckpt")

    run(1)
    run(2, tmp_path / "end.ckpt")
    assert names(tmp_path / "checkpoints") == [f"batch_00000{number}.ckpt" for number in (2, 3, 4, 6)]


def test_a_resumed_run_that_cannot_save_names_the_checkpoint_it_came_from(lab, tmp_path):
    checkpoints(lab, tmp_path, count=3)
    path = tmp_path / "checkpoints" / "batch_000003.ckpt"
    trainer = lab.trainer(tmp_path, [BatchCheckpoint(every=1)], enable_checkpointing=True, max_epochs=2)
    (tmp_path / "checkpoints" / "batch_000004.writing.writing").symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"No space left on device; the last good checkpoint is {path}$"):
        trainer.fit(lab.ppo(), lab.loader(lab.prompts(3)), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("name", ["final", "best", "checkpoints"])
def test_what_stands_where_a_folder_is_to_be_is_found_before_training(link, name, lab, tmp_path, logger):
    place = tmp_path / "run" / name
    place.parent.mkdir()
    place.symlink_to(tmp_path / "nowhere") if link else place.write_text("mine")
    module = lab.ppo()
    own = [SavePretrained(monitor="val/reward"), BatchCheckpoint(every=1)]
    with pytest.raises(UserError, match=rf"run/{name} is a {'link' if link else 'file'}.*move it away"):
        lab.trainer(tmp_path, own, logger=logger, enable_checkpointing=True).fit(module, lab.loader(lab.prompts(1)))
    assert module.ppo_step == 0


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1, "keep": 0}])
def test_bad_counts_are_refused(options):
    with pytest.raises(UserError, match="must be 1 or more"):
        BatchCheckpoint(**options)


# All -------------------------------------------------------------------------------------------------------------


def test_a_fast_dev_run_leaves_nothing(lab, tmp_path):
    callbacks = [BatchCheckpoint(every=1), SavePretrained(), SampleLogger(), EMAOnly()]
    trainer = lab.trainer(tmp_path, callbacks, fast_dev_run=True, enable_checkpointing=True, logger=True)
    trainer.fit(lab.ppo(), lab.loader(lab.prompts(1)), lab.loader(lab.prompts(1)))
    assert list(tmp_path.iterdir()) == []
