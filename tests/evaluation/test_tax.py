"""What was evaluated, read back and put into tables; the numbers are worked out by hand."""

import csv
import json

import pytest
from test_report import path, write_run

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import report
from elastic_lightning.evaluation.tax import describe, find, tax_rows, tax_table
from elastic_lightning.evaluation.tested import find_tests, tables


def evaluation(folder, perplexity=None, reward=None, **rates):
    results = {"model": "m"}
    if perplexity is not None:
        results["perplexity"] = {"perplexity": perplexity, "tokens": 12345, "documents": 9}
    if reward is not None:
        results["reward"] = {"mean": reward, "standard_error": 0.05, "samples": 8, "length": 20.0}
    if rates:
        results["humaneval"] = {
            "problems": 164,
            "samples": 10,
            **{name.replace("_", "@"): v for name, v in rates.items()},
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(results))
    return results


@pytest.fixture
def runs(tmp_path):
    for seed, shift in ((1, -1), (2, 1)):
        run = tmp_path / "ppo" / f"seed_{seed}"
        write_run(run, path([0.5, 0.8], [0, 10]))
        evaluation(run / "final", 20 + shift, 0.8 + shift / 10, pass_10=0.25, pass_1=0.125)
    evaluation(tmp_path / "ppo" / "seed_1" / "best", 18.0)
    evaluation(tmp_path / "language_model" / "seed_1" / "final", 12.5)
    return tmp_path


def cells(table):
    return [[column.header, *column.cells] for column in table.columns]


def test_evaluations_are_found_and_averaged_over_seeds(runs):
    evaluated = find([runs, runs / "ppo"])
    assert [(one.method, one.seed) for one in evaluated] == [
        ("language_model", 1),
        ("ppo (best)", 1),
        ("ppo", 1),
        ("ppo", 2),
    ]
    assert cells(tax_table(evaluated)) == [
        ["evaluated", "language_model", "ppo (best)", "ppo"],
        ["seeds", "1", "1", "2"],
        ["perplexity", "12.5", "18.0", "20.0 ± 1.0"],  # of 19 and 21
        ["pass@1", "-", "-", "0.125 ± 0.000"],
        ["pass@10", "-", "-", "0.250 ± 0.000"],
        ["reward", "-", "-", "0.800 ± 0.100"],
        ["length", "-", "-", "20.0 ± 0.0"],
    ]
    assert tax_rows(evaluated[:1]) == (["method", "seed", "perplexity"], [["language_model", 1, 12.5]])


def test_the_report_shows_it_beside_the_curves(runs, capsys):
    assert report.main([str(runs)]) == 0
    printed = capsys.readouterr().out
    assert "20.0 ± 1.0" in printed and "language_model" in printed and "evaluation.csv" in printed
    with (runs / "report" / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["perplexity"] for row in rows] == ["12.5", "18.0", "19", "21"] and rows[0]["pass@1"] == ""


def test_a_report_without_evaluations_is_as_it_was(tmp_path, capsys):
    write_run(tmp_path / "ppo" / "seed_1", path([0.5, 0.8], [0, 10]))
    assert report.main([str(tmp_path)]) == 0
    assert "evaluation.csv" not in capsys.readouterr().out
    assert not (tmp_path / "report" / "evaluation.csv").exists()


def test_in_words(tmp_path):
    assert describe(evaluation(tmp_path, 12.3456, 0.5, pass_1=0.125)) == [
        "perplexity 12.35 (12,345 tokens of 9 texts)",
        "reward 0.5 ± 0.05 (8 answers)",
        "HumanEval pass@1 12.5% (164 problems, 10 samples each)",
    ]
    assert describe({"model": "m"}) == []


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "evaluation.json").write_text("[1,")
    with pytest.raises(UserError, match=r"evaluation\.json"):
        find([tmp_path])


def test_what_two_stages_measured_of_a_model_is_one_row(tmp_path):
    evaluation(tmp_path / "ppo_evaluation" / "seed_1", 20.0, 0.5)
    evaluation(tmp_path / "ppo_humaneval" / "seed_1", pass_1=0.125)
    (one,) = find([tmp_path])
    assert (one.method, one.seed) == ("ppo", 1)
    assert one.numbers == {"perplexity": 20.0, "reward": 0.5, "length": 20.0, "pass@1": 0.125}


def test_methods_of_one_name_in_two_places_are_two(tmp_path):
    for place, value in (("a", 20.0), ("b", 30.0)):
        evaluation(tmp_path / place / "ppo_evaluation" / "seed_1", value)
    evaluation(tmp_path / "b" / "sft" / "seed_1" / "best", 10.0)
    found = find([tmp_path / "a", tmp_path / "b"])
    assert {one.method: one.numbers["perplexity"] for one in found} == {
        "a/ppo": 20.0,
        "b/ppo": 30.0,
        "sft (best)": 10.0,
    }


# What test measured


def measured(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.json").write_text(json.dumps({f"test/{name}": value for name, value in values.items()}))


def test_tests_are_averaged_over_seeds_one_table_a_kind(tmp_path, capsys):
    write_run(tmp_path / "ppo" / "seed_1", path([0.5, 0.8], [0, 10]))
    for seed, shift in ((1, -1), (2, 1)):
        measured(tmp_path / "ppo_test" / f"seed_{seed}", reward=0.8 + shift / 10, kl=5.0 + shift)
    measured(tmp_path / "reward_model_test" / "seed_1", accuracy=0.75)
    found = find_tests([tmp_path])
    assert [(one.method, one.seed) for one in found] == [("ppo", 1), ("ppo", 2), ("reward_model", 1)]
    assert [cells(table) for table in tables(found)] == [
        [["tested", "ppo"], ["seeds", "2"], ["reward", "0.800 ± 0.100"], ["kl", "5.00 ± 1.00"]],
        [["tested", "reward_model"], ["seeds", "1"], ["accuracy", "0.750"]],
    ]
    assert report.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "5.00 ± 1.00" in printed and "0.750" in printed and "test.csv" in printed
    with (tmp_path / "report" / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["kl"], row["accuracy"]) for row in rows] == [("4.0", ""), ("6.0", ""), ("", "0.75")]
