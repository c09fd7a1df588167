"""Sampling from a folder, of either kind of model."""

import json
import os
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from elastic_lightning.errors import UserError
from elastic_lightning.evaluation.generate import _parser, generate, load, main
from elastic_lightning.policies import Sampling

GREEDY = Sampling(max_new_tokens=6, top_k=1)


def text(tokens):
    return " ".join(f"w{token}" for token in tokens if token > 2)


@pytest.mark.parametrize("folder", ["marian_folder", "bart_folder", "t5_folder"])
def test_an_encoder_decoder_reads_a_prompt_with_its_end(folder, request):
    folder = request.getfixturevalue(folder)
    rows = generate(*load(folder), ["w5 w9 w20", "w7", "w3 w4"], GREEDY, batch_size=2)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    for row, prompt in zip(rows, [[5, 9, 20], [7], [3, 4]], strict=True):
        options = {"num_beams": 1, "do_sample": False, "use_cache": False, "max_new_tokens": 6}
        generated = model.generate(torch.tensor([[*prompt, 1]]), **options)[0, 1:].tolist()
        length = generated.index(1) + 1 if 1 in generated else len(generated)
        said = {"prompt": text(prompt), "response": text(generated), "complete": 1 in generated, "tokens": length}
        assert row == said


def test_a_causal_model_continues_its_prompt(gpt2_folder):
    rows = generate(*load(gpt2_folder), ["w5 w9 w20", "w7"], GREEDY)
    model = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    for row, prompt in zip(rows, [[5, 9, 20], [7]], strict=True):
        generated = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0].tolist()
        assert row["prompt"] + row["response"] == text(generated)


def test_what_is_printed(t5_folder, gpt2_folder, capsys):
    flags = ["--prompt=w5 w9", "--max_new_tokens=3", "--min_new_tokens=3"]
    assert main([f"--model={t5_folder}", *flags]) == 0
    prompt, response = capsys.readouterr().out.rstrip("\n").split("\t")
    assert prompt == "w5 w9" and set(response.split()) <= {f"w{number}" for number in range(3, 30)}
    assert main([f"--model={gpt2_folder}", *flags]) == 0
    assert capsys.readouterr().out.startswith("w5 w9 w")


def test_help_says_what_each_flag_does_and_its_default():
    text = " ".join(_parser().format_help().split()).split("options: ")[1]
    said = {" ".join(part.split()[:1]): part.split()[2:] for part in re.split(r" (?=--\w+ [A-Z])", text)[1:]}
    assert len(said) >= 13 and all(len(words) >= 2 and words[0] != "(default:" for words in said.values())
    defaults = {"samples": "1", "max_new_tokens": "48", "min_new_tokens": "0", "temperature": "1.0", "top_k": "0"}
    defaults |= {"top_p": "1.0", "seed": "1", "batch_size": "32"}
    assert all(said[f"--{name}"][-2:] == ["(default:", f"{value})"] for name, value in defaults.items())
    assert all("default" in said[name] for name in ("--device", "--output"))


def test_prompts_that_cannot_be_read_are_refused(gpt2_folder, marian_folder):
    with pytest.raises(UserError, match="'' has no tokens"):
        generate(*load(gpt2_folder), ["w5", ""], GREEDY)
    with pytest.raises(UserError, match="context is 64"):
        generate(*load(gpt2_folder), ["w5 " * 60], GREEDY)
    with pytest.raises(UserError, match="context is 40"):
        generate(*load(marian_folder), ["w5 " * 40], GREEDY)


@pytest.mark.parametrize("link", [False, True])
def test_what_is_there_is_not_written_over(link, gpt2_folder, tmp_path, capsys):
    file, mine = tmp_path / "out.jsonl", tmp_path / "mine"
    mine.write_text("mine")
    file.symlink_to(mine) if link else file.write_text("mine")
    command = [f"--model={gpt2_folder}", "--prompt=w5 w9", "--max_new_tokens=3", f"--output={file}"]
    with pytest.raises(UserError, match=r"out.jsonl is there already.*--force"):
        main(command)
    assert file.read_text() == "mine" and file.is_symlink() is link
    assert main([*command, "--force"]) == 0
    assert json.loads(file.read_text())["prompt"] == "w5 w9" and mine.read_text() == "mine"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="what is there is not a file"):
        main([*command, "--force"])
