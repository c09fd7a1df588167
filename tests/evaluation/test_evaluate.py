"""The alignment tax of a tiny model, part by part, against plain transformers and hand-made numbers."""

import gzip
import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM
from trials import SMALL

from elastic_lightning.cli import main
from elastic_lightning.data.questions import Shares, evaluation_half
from elastic_lightning.errors import UserError
from elastic_lightning.evaluation import evaluate as module
from elastic_lightning.evaluation.evaluate import QuestionOptions, TextOptions, evaluate
from elastic_lightning.evaluation.generate import generate, load
from elastic_lightning.evaluation.held_out import read_documents, read_prompts
from elastic_lightning.evaluation.humaneval import HumanEvalOptions, Problem
from elastic_lightning.policies import Sampling, load_tokenizer
from elastic_lightning.rewards import FunctionReward, Reward

TEXTS = ["w5 w9 w20 w7", "w3 w4 w6 w8 w11 w29 w3", "w12 w13"]
QUESTIONS = ["w5 w9", "w7", "w3 w4 w6", "w20 w21", "w8"]


def jsonl(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def count_words(prompts, responses):
    return [
        len(response.split()) + 10.0 * len(prompt.split()) for prompt, response in zip(prompts, responses, strict=True)
    ]


@pytest.fixture
def model(tmp_path, gpt2_folder):
    """A copy: the results lie in the model's folder."""
    return shutil.copytree(gpt2_folder, tmp_path / "ppo" / "seed_3" / "final")


@pytest.fixture
def texts(tmp_path):
    return jsonl(tmp_path / "texts.jsonl.gz", [{"text": text} for text in TEXTS])


@pytest.fixture
def questions(tmp_path):
    return jsonl(tmp_path / "questions.jsonl", [{"question": question} for question in QUESTIONS])


@pytest.fixture
def problems(tmp_path):
    test = "def check(candidate):\n    assert candidate(2) == 3\n"
    problem = Problem(
        "Test/0", '\ndef add_one(x):\n    """The next number."""\n', "add_one", "    return x + 1\n", test
    )
    return jsonl(tmp_path / "problems.jsonl", [asdict(problem)])


def saved(model):
    return json.loads((model / "evaluation.json").read_text())


def expected_perplexity(folder):
    network, tokenizer, nll, count = AutoModelForCausalLM.from_pretrained(folder).double(), load_tokenizer(folder), 0, 0
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        nll += network(input_ids=tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    return math.exp(nll / count), count


def test_the_command_measures_every_part(model, texts, questions, problems, tmp_path, monkeypatch, capsys, fences):
    (tmp_path / "my_reward.py").write_text(
        "def count_words(prompts, responses):\n    return [len(response.split()) for response in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"texts: {{path: {texts}, length: 16, stride: 8}}\n"
        "reward: {class_path: FunctionReward, init_args: {function: my_reward.count_words}}\n"
        f"questions: {{path: {questions}, template: '{{}}', sampling: {{max_new_tokens: 6}}, batch_size: 2}}\n"
        f"humaneval: {{path: {problems}, max_new_tokens: 4, limits: {json.dumps(asdict(SMALL))}}}\n"
    )
    command = ["evaluate", f"--config={config}", f"--model={model}"]
    assert main(command) == 1  # programs are not run unless allowed
    assert "--allow-code-execution" in capsys.readouterr().err and not (model / "evaluation.json").exists()
    assert main([*command, "--allow-code-execution"]) == 0
    results = saved(model)
    assert results["model"] == str(model)
    perplexity, count = expected_perplexity(model)
    assert results["perplexity"]["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert (results["perplexity"]["tokens"], results["perplexity"]["documents"]) == (count, 3)
    assert results["perplexity"]["options"]["stride"] == 8
    assert results["humaneval"]["pass@1"] == 0 and results["humaneval"]["problems"] == 1
    assert len((model / "humaneval.jsonl").read_text().splitlines()) == 1
    rows = generate(*load(str(model)), QUESTIONS, Sampling(6))
    lengths = torch.tensor([float(len(row["response"].split())) for row in rows])
    assert results["reward"]["mean"] == pytest.approx(lengths.mean().item())
    assert results["reward"]["standard_error"] == pytest.approx((lengths.std() / 5**0.5).item())
    assert results["reward"]["complete"] == pytest.approx(sum(row["complete"] for row in rows) / 5)
    printed = capsys.readouterr().out
    assert f"perplexity {perplexity:.4g}" in printed and "pass@1 0.0%" in printed and "evaluation.json" in printed


def test_parts_that_were_measured_survive_one_that_fails(model, texts, questions, monkeypatch):
    def fail(prompts, responses):
        raise RuntimeError("no GPU left")

    asked = QuestionOptions(questions, template="{}", sampling=Sampling(3))
    with pytest.raises(UserError, match="no GPU left"):
        evaluate(str(model), texts=TextOptions(texts), questions=asked, reward=FunctionReward(fail))
    assert set(saved(model)) == {"model", "perplexity"}
    evaluate(str(model), questions=asked, reward=FunctionReward(count_words))
    assert set(saved(model)) == {"model", "perplexity", "reward"}  # a later call adds what is missing
    assert list(model.glob("*.writing")) == []
    with pytest.raises(UserError, match="no GPU left"):
        evaluate(str(model), questions=asked, reward=FunctionReward(fail))
    assert "reward" in saved(model), "what was measured before stays until there is something new"

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure_reward", killed)
    before = saved(model)
    with pytest.raises(KeyboardInterrupt):  # after a part of this call was written
        evaluate(
            str(model), texts=TextOptions(texts, length=16, stride=8), questions=asked, reward=FunctionReward(fail)
        )
    assert saved(model)["reward"] == before["reward"] and saved(model)["perplexity"] != before["perplexity"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", '{"model": "another", "perplexity": {"perplexity": 3.0}}'),
        ("evaluation.json", '{"my": "own"}'),
        ("evaluation.json", "not JSON"),
        ("humaneval.jsonl", "mine"),
        ("a link", "mine"),
    ],
)
def test_nothing_of_another_model_or_hand_is_written_over(name, content, model, texts, tmp_path, monkeypatch):
    if name == "a link":
        (tmp_path / "mine").write_text(content)
        file = model / "evaluation.json"
        file.symlink_to(tmp_path / "mine")
    else:
        file = model / name
        file.write_text(content)
    options = {"texts": TextOptions(texts)}
    if name == "humaneval.jsonl":
        options["humaneval"] = HumanEvalOptions("problems.jsonl", allow_code_execution=True)
    with pytest.raises(UserError, match=rf"{file} is there already.*--force"), monkeypatch.context() as patched:
        patched.setattr(module, "load", lambda path: pytest.fail("it loaded the model"))
        evaluate(str(model), **options)
    assert file.read_text() == content
    if name != "humaneval.jsonl":
        evaluate(str(model), **options, force=True)
        assert set(saved(model)) == {"model", "perplexity"} and saved(model)["model"] == str(model)
        monkeypatch.chdir(model.parent)
        assert not file.is_symlink() and "perplexity" in evaluate(model.name, **options)  # the same by another name
        assert not (tmp_path / "mine").exists() or (tmp_path / "mine").read_text() == content


def test_the_reward_does_not_depend_on_the_batches(model, questions, tmp_path):
    means = set()
    for batch_size in (1, 2, 100):
        options = QuestionOptions(questions, template="{} w9", sampling=Sampling(6), batch_size=batch_size, seed=5)
        means.add(
            evaluate(str(model), tmp_path / "out", questions=options, reward=FunctionReward(count_words))["reward"][
                "mean"
            ]
        )
    assert len(means) == 1


def test_long_questions_are_left_out_and_counted(model, questions):
    options = QuestionOptions(questions, template="{}", max_prompt_tokens=1, sampling=Sampling(3))
    part = evaluate(str(model), questions=options, reward=FunctionReward(count_words))["reward"]
    assert (part["samples"], part["left_out"]) == (2, 3)


def test_questions_with_answers_score_the_answer(tmp_path, word_tokenizer):
    tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")
    rows = [{"question": "w3 w4", "answers": ["w5 w6 w7", "w8"]}, {"question": "w9", "answers": []}]
    (document,) = read_documents(jsonl(tmp_path / "ranked.jsonl", rows), tokenizer)
    assert document.tokens[document.first :] == tokenizer.convert_tokens_to_ids(["w5", "w6", "w7"])
    assert document.first == len(["Question:", "w3", "w4", "Answer:"])
    pairs = [{"question": "w3", "response_j": "w20 w21", "response_k": "w8"}]
    (document,) = read_documents(jsonl(tmp_path / "pairs.jsonl", pairs), tokenizer)
    assert document.tokens[document.first :] == tokenizer.convert_tokens_to_ids(["w20", "w21"])
    (tmp_path / "plain.txt").write_text("w3 w4\nw5")
    assert read_documents(tmp_path / "plain.txt", tokenizer)[0].tokens == tokenizer("w3 w4 w5")["input_ids"]


def test_wrong_input_is_refused_before_the_model_is_loaded(model, texts, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", lambda path: pytest.fail("it loaded the model"))
    for options, message in [
        ({}, "nothing to measure"),
        ({"questions": QuestionOptions(questions)}, "go together"),
        ({"humaneval": HumanEvalOptions("no.jsonl")}, "allow-code-execution"),
        ({"questions": QuestionOptions("no.jsonl"), "reward": FunctionReward(count_words)}, "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(str(model), **options)
    with pytest.raises(UserError, match="no such folder"):
        evaluate("some/hub-id", texts=TextOptions(texts))
    with pytest.raises(UserError, match="once"):
        read_prompts(questions, template="{} and {}")
    with pytest.raises(UserError, match="windows need"):
        TextOptions(texts, length=8, stride=8)


def test_of_questions_that_stages_share_those_held_out_for_a_test_are_read(tmp_path, gpt2_folder):
    tokenizer = load_tokenizer(str(gpt2_folder))
    asked = [f"w{i} w{j}" for i in range(3, 12) for j in range(3, 12)]
    rows = [{"question": text, "answers": ["w5 w6", "w7"]} for text in asked]
    path = jsonl(tmp_path / "shared.jsonl", rows)
    (tmp_path / "folder").mkdir()
    for name, part in (("one", rows[:40]), ("two", rows[40:])):
        jsonl(tmp_path / "folder" / f"{name}.jsonl", part)
    shares = Shares(supervised=0.3, reward=0.2, rl=0.1, evaluation=0.4)
    held_out = [q for q in asked if shares.part_of(q) == "evaluation" and evaluation_half(q) == "test"]
    assert 4 < len(held_out) < 40
    assert read_prompts(path, shares=shares) == [f"Question: {text}\n\nAnswer:" for text in held_out]
    assert read_prompts(tmp_path / "folder", shares=shares) == read_prompts(path, shares=shares)
    assert read_prompts(path, limit=3, shares=shares) == [f"Question: {text}\n\nAnswer:" for text in held_out[:3]]
    documents = read_documents(path, tokenizer, limit=3, shares=shares)
    whole = [tokenizer(f"Question: {text}\n\nAnswer: w5 w6")["input_ids"] for text in held_out[:3]]
    assert [document.tokens for document in documents] == whole
    with pytest.raises(UserError, match="no question for a test"):
        read_prompts(path, shares=Shares(supervised=0.5, reward=0.25, rl=0.25 - 1e-9, evaluation=1e-9))


def test_rows_of_pairs_ask_each_question_once(tmp_path, gpt2_folder):
    tokenizer = load_tokenizer(str(gpt2_folder))
    rows = [
        {"question": question, "response_j": better, "response_k": "w9"}
        for question, better in (("w3", " "), ("w3", "w5"), ("w3", "w6"), ("w4", "w7"), ("w5", "w8"))
    ]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    assert read_prompts(path, limit=2) == [f"Question: {text}\n\nAnswer:" for text in ("w3", "w4")]
    whole = [tokenizer(f"Question: {text}")["input_ids"] for text in ("w3\n\nAnswer: w5", "w4\n\nAnswer: w7")]
    assert [document.tokens for document in read_documents(path, tokenizer, limit=2)] == whole


def test_of_a_folder_the_test_is_read_in_all_its_parts(tmp_path):
    for name, question in (
        ("train-00000-of-00001", "w3"),
        ("test-00000-of-00002", "w4"),
        ("test-00001-of-00002", "w5"),
    ):
        jsonl(tmp_path / f"{name}.jsonl", [{"question": question, "answers": ["w6", "w7"]}])
    assert read_prompts(tmp_path) == [f"Question: {text}\n\nAnswer:" for text in ("w4", "w5")]
    (tmp_path / "hub" / "data" / "evaluation").mkdir(parents=True)
    jsonl(tmp_path / "hub" / "data" / "evaluation" / "a.jsonl", [{"question": "w8", "answers": ["w6", "w7"]}])
    assert read_prompts(tmp_path / "hub") == ["Question: w8\n\nAnswer:"]


def test_the_reward_leaves_masked_answers_out_and_keeps_parts_apart(model, questions):
    class Parts(Reward):
        on_error = "mask"

        def components(self, prompts, responses):
            if any("w7" in prompt for prompt in prompts):
                raise KeyError("no score for this one")
            return {"reward": torch.full((len(prompts),), 2.0), "mean": torch.full((len(prompts),), 3.0)}

    asked, masked = len(QUESTIONS), 1
    options = QuestionOptions(questions, sampling=Sampling(max_new_tokens=3), batch_size=asked)
    with pytest.warns(UserWarning, match="masked"):
        part = evaluate(str(model), questions=options, reward=Parts())["reward"]
    assert (part["mean"], part["components"]) == (5.0, {"reward": 2.0, "mean": 3.0})
    assert (part["samples"], part["without_reward"]) == (asked - masked, masked)
    assert 1 <= part["length"] <= 3
