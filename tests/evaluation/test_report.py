"""The report on synthetic runs whose numbers can be worked out by hand."""

import csv
import math

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import report
from elastic_lightning.evaluation.comparison import drift_at, reward_at
from elastic_lightning.evaluation.runs import collect, reset_steps

WRITTEN = {"table.csv", "summary.csv", "frontier.png", ".report.json"}


def write_run(folder, scalars):
    """`scalars` is {tag: {step: value}}."""
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)


def path(reward, drift, **more):
    """Scalars of a run measured at steps 0, 10, 20, …"""
    named = {"val/reward": reward, "val/kl": drift, **more}
    return {tag: {10 * i: value for i, value in enumerate(values)} for tag, values in named.items()}


def rows_of(file):
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def runs(tmp_path):
    """Mean paths: ppo (0, .5) (10, .7) (40, .9); elastic (0, .5) (4, .6) (2, .55) (12, .8), reset at step 10."""
    write_run(tmp_path / "ppo" / "seed_1", path([0.5, 0.6, 0.8], [0, 8, 30], **{"val/perplexity": [100, 150, 200]}))
    write_run(tmp_path / "ppo" / "seed_2", path([0.5, 0.8, 1.0], [0, 12, 50], **{"val/perplexity": [100, 150, 220]}))
    for seed, shift in ((1, -0.02), (2, 0.02)):
        scalars = path([0.5, 0.6 + shift, 0.55 + shift, 0.8 + shift], [0, 4, 2, 12], **{"val/toy_accept": [1, 0.9]})
        write_run(tmp_path / "elastic" / f"seed_{seed}", {**scalars, "reset/count": {10: 1}})
    write_run(tmp_path / "language_model" / "seed_1", {"train/loss": {1: 3.0}})
    return tmp_path


def test_main_writes_table_summary_and_picture(runs, capsys):
    assert report.main([str(runs)]) == 0
    assert {file.name for file in (runs / "report").iterdir()} == WRITTEN
    png = (runs / "report" / "frontier.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 20_000

    table = rows_of(runs / "report" / "table.csv")
    assert list(table[0]) == ["method", "seed", "ppo_step", "reward", "kl", "perplexity", "toy_accept"]
    assert len(table) == 2 * 3 + 2 * 4
    row = next(row for row in table if (row["method"], row["seed"], row["ppo_step"]) == ("ppo", "2", "20"))
    assert (float(row["reward"]), float(row["kl"]), float(row["perplexity"])) == (1.0, 50.0, 220.0)
    assert row["toy_accept"] == ""

    printed = capsys.readouterr().out
    assert "0.900 ± 0.100" in printed and "…" not in printed.split("'kl at")[0]
    assert "Left out" in printed and "language_model" in printed


def test_summary_numbers_by_hand(runs):
    report.main([str(runs / "ppo"), str(runs / "elastic"), "--output", str(runs / "out")])
    ppo, elastic = rows_of(runs / "out" / "summary.csv")
    assert (ppo["method"], ppo["seeds"], ppo["ppo_step"]) == ("ppo", "2", "20")
    assert float(ppo["final_reward"]) == pytest.approx(0.9)
    assert float(ppo["final_reward_se"]) == pytest.approx(0.1)
    assert float(ppo["final_perplexity"]) == pytest.approx(210)
    assert ppo["final_toy_accept"] == ""
    # Elastic's best mean reward, 0.8, is what both reached: ppo crosses it halfway from (10, .7) to (40, .9).
    assert float(ppo["equal_reward"]) == pytest.approx(0.8)
    assert float(ppo["kl_at_equal_reward"]) == pytest.approx(25.0)
    # Seed 1 gets there at 30 and seed 2 at 12: half of their difference is the standard error.
    assert float(ppo["kl_at_equal_reward_se"]) == pytest.approx(9.0, abs=1e-4)
    assert float(elastic["kl_at_equal_reward"]) == pytest.approx(12.0)
    assert elastic["kl_at_equal_reward_se"] == ""  # its first seed ends at 0.78
    # Both came to drift 12: ppo's mean path is there 2/30 of the way from (10, .7) to (40, .9).
    assert float(ppo["equal_drift"]) == pytest.approx(12.0)
    assert float(ppo["reward_at_equal_kl"]) == pytest.approx(0.7 + 0.2 * 2 / 30)
    assert float(elastic["reward_at_equal_kl"]) == pytest.approx(0.8)


def test_resets_seeds_and_names(runs):
    found, left_out = collect([runs, runs / "ppo"])
    assert [(run.method, run.seed) for run in found] == [("elastic", 1), ("elastic", 2), ("ppo", 1), ("ppo", 2)]
    assert [run.resets for run in found] == [[10], [10], [], []]
    assert left_out == [runs / "language_model" / "seed_1"]


def test_a_count_logged_at_every_step_marks_its_rises_only():
    assert reset_steps({0: 0, 10: 1, 20: 1, 30: 2}) == [10, 30]
    assert reset_steps({}) == []


def test_a_step_written_twice_keeps_the_last(tmp_path):
    write_run(tmp_path / "ppo", {"val/reward": {0: 0.1, 10: 0.2}, "val/kl": {0: 0.0, 10: 1.0}})
    with SummaryWriter(str(tmp_path / "ppo"), filename_suffix=".resumed") as writer:
        writer.add_scalar("val/reward", 0.7, 10)
    (run,), _ = collect([tmp_path / "ppo"])
    assert (run.method, run.seed) == ("ppo", 0)
    assert run.metrics["reward"] == pytest.approx({0: 0.1, 10: 0.7})


def test_one_name_in_two_places_is_two_methods(tmp_path):
    for place in "ab":
        write_run(tmp_path / place / "ppo" / "seed_1", path([0.5, 0.6], [0, 1]))
    assert [run.method for run in collect([tmp_path])[0]] == ["a/ppo", "b/ppo"]


def test_a_frozen_method_sets_no_level(runs, capsys):
    write_run(runs / "frozen" / "seed_1", path([0.5, 0.502, 0.499], [0, 0, 0]))
    assert report.main([str(runs)]) == 0
    frozen = next(row for row in rows_of(runs / "report" / "summary.csv") if row["method"] == "frozen")
    assert float(frozen["equal_reward"]) == pytest.approx(0.8)
    assert frozen["kl_at_equal_reward"] == ""
    assert float(frozen["reward_at_equal_kl"]) == pytest.approx(0.502)


def test_frozen_alone_and_a_single_checkpoint(tmp_path, capsys):
    write_run(tmp_path / "frozen" / "seed_1", path([0.5], [0.0]))
    assert report.main([str(tmp_path)]) == 0
    assert rows_of(tmp_path / "report" / "summary.csv")[0]["equal_reward"] == ""


def test_a_shorter_seed_is_told(tmp_path, capsys):
    write_run(tmp_path / "ppo" / "seed_1", path([0.5, 0.6, 0.7], [0, 1, 2]))
    write_run(tmp_path / "ppo" / "seed_2", path([0.5, math.nan], [0, 1]))
    write_run(tmp_path / "ppo" / "seed_3", path([0.5, 0.6], [0, 1]))
    report.main([str(tmp_path)])
    assert "ppo: its seeds end at steps [20, 10, 10]; the means stop at 0." in capsys.readouterr().out


def test_other_tags(tmp_path, capsys):
    write_run(tmp_path / "ppo", {"train/reward": {1: 0.1, 2: 0.2}, "val/perplexity": {1: 5.0, 2: 6.0}})
    assert report.main([str(tmp_path), "--reward", "train/reward", "--drift", "val/perplexity"]) == 0
    assert list(rows_of(tmp_path / "report" / "table.csv")[0])[3:] == ["train/reward", "perplexity"]


def test_errors_name_tag_and_folder(runs):
    with pytest.raises(UserError, match=r"'val/rewrad'.*--reward"):
        report.main([str(runs), "--reward", "val/rewrad"])
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        report.main([str(runs / "nowhere")])


def test_seeds_without_a_common_step(tmp_path):
    write_run(tmp_path / "ppo" / "seed_1", {"val/reward": {0: 0.1}, "val/kl": {0: 0.0}})
    write_run(tmp_path / "ppo" / "seed_2", {"val/reward": {5: 0.1}, "val/kl": {5: 0.0}})
    with pytest.raises(UserError, match="every seed of 'ppo'"):
        report.main([str(tmp_path)])


def test_levels_on_a_path():
    reward, drift = np.array([0.5, 0.7, 0.6, 0.9]), np.array([0.0, 4.0, 1.0, 7.0])
    assert drift_at(0.6, reward, drift) == pytest.approx(2.0)  # the first crossing, before the dip
    assert drift_at(0.4, reward, drift) == 0.0
    assert math.isnan(drift_at(0.95, reward, drift))
    assert reward_at(4.0, reward, drift) == pytest.approx(0.75)  # halfway along the last stretch
    assert math.isnan(reward_at(-1.0, reward, drift))


def test_the_drift_may_be_what_is_lost_of_a_score(tmp_path):
    """BLEU falls: the drift is how far below its start it is. Both of two callbacks' resets are marked."""
    scalars = path([0.1, 0.5, 0.9], [0, 1, 2], **{"val/bleu": [50.0, 30.0, 55.0]})
    scalars |= {"reset[sender.*]/count": {10: 1}, "reset[receiver.*]/count": {20: 1}}
    write_run(tmp_path / "game" / "seed_1", scalars)
    (run,), left_out = collect([tmp_path], "val/reward", "lost:val/bleu")
    assert not left_out and run.resets == [10, 20]
    assert run.metrics["bleu_lost"] == {0: 0.0, 10: 20.0, 20: -5.0}
    assert collect([tmp_path], "val/reward", "lost:val/other")[0] == []
