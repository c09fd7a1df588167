import itertools
import logging

import pytest
import torch
from lightning import Trainer
from question_rows import PAIRED, RANKED
from tokenizers.processors import TemplateProcessing

from elastic_lightning.algorithms import PPO, LanguageModel, PPOConfig
from elastic_lightning.cli import main
from elastic_lightning.data import StackExchangeDataModule
from elastic_lightning.data.questions import Shares, key_of
from elastic_lightning.data.tokenizers import main as tokenizer_main
from elastic_lightning.data.tokenizers import train_bpe
from elastic_lightning.errors import UserError
from elastic_lightning.policies import ModelSource, Sampling, load_tokenizer
from elastic_lightning.rewards import Reward

TASKS = ("supervised", "pairs", "prompts")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("bpe"))
    texts = [f"Question: {row['question']}\n\nAnswer: {answer}" for row in RANKED for answer in row["answers"]]
    train_bpe(texts, 400).save_pretrained(folder)
    return folder


def module(path, task="prompts", tokenizer=None, **options):
    sizes = {"batch_size": 4, "eval_batch_size": 4, "block_size": 32, "max_tokens": 60, "max_prompt_tokens": 60}
    return StackExchangeDataModule(path, task=task, tokenizer=tokenizer, **sizes | options)


def keys(questions):
    return {key_of(question.text) for question in questions}


# Which question goes where ------------------------------------------------------------------------------------------


def test_no_question_is_in_two_stages(write_rows):
    again = [{**row, "question_id": 1000 + row["question_id"], "answers": row["answers"][::-1]} for row in RANKED]
    shouted = [{**row, "question": f"  {row['question'].upper()} "} for row in RANKED]
    path = write_rows(RANKED + again + shouted)
    splits = {task: module(path, task, seed=seed).load() for seed, task in enumerate(TASKS)}
    train = [keys(splits[task]["train"]) for task in TASKS]
    held_out = [keys(splits["pairs"][name]) for name in ("validation", "test")]
    parts = [*train, *held_out]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 200  # each question once: disjoint, and none is lost
    for task in TASKS:  # the same held-out questions, whatever the stage and the seed
        assert [keys(splits[task][name]) for name in ("validation", "test")] == held_out
        assert all(len(split) == len(keys(split)) for split in splits[task].values())  # equal questions are one


def test_a_stage_may_use_another_ones_part(write_rows):
    path = write_rows(RANKED)
    assert module(path, "prompts", part="reward").load() == module(path, "pairs").load()
    shares = Shares(supervised=0.0, reward=0.0, rl=0.5, evaluation=0.5)
    assert len(module(path, "prompts", shares=shares).load()["train"]) > 70
    with pytest.raises(UserError, match=r"no question for train in .*part reward"):
        module(path, "pairs", shares=shares).load()


def test_limits_keep_the_first_questions(write_rows):
    path = write_rows(RANKED)
    everything, some = module(path).load(), module(path, limit_questions=7, eval_questions=3).load()
    assert some == {"train": everything["train"][:7], **{k: everything[k][:3] for k in ("validation", "test")}}


# The three tasks ----------------------------------------------------------------------------------------------------


def test_supervised_text_is_packed(write_rows, bpe):
    data = module(write_rows(RANKED), "supervised", bpe)
    data.setup("fit")
    tokenizer, stream = load_tokenizer(bpe), []
    for question in data.splits["train"]:
        best = next(row["answers"][0] for row in RANKED if row["question"] == question.text)
        stream += tokenizer(f"Question: {question.text}\n\nAnswer: {best}")["input_ids"] + [tokenizer.eos_token_id]
    assert data.packed("train").flatten().tolist() == stream[: len(stream) // 32 * 32]
    assert next(iter(data.train_dataloader())).shape == (4, 32)
    assert next(iter(data.val_dataloader())).shape == (4, 32)


def test_supervised_answers_are_all_the_better_ones(write_rows, bpe):
    rows = [
        {"question": "q", "response_j": better, "response_k": "no"} for better in ("first answer", "second answer")
    ] + PAIRED
    for per_question, expected in ((None, 2), (1, 1)):
        data = module(write_rows(rows), "supervised", bpe, shares=Shares(0.8, 0, 0, 0.2), per_question=per_question)
        data.setup("fit")
        assert load_tokenizer(bpe).decode(data.packed("train").flatten()).count("Question: q\n") == expected


def test_pairs(write_rows, bpe):
    data = module(write_rows(RANKED), "pairs", bpe, max_tokens=100)
    data.setup("fit")
    tokenizer, expected = load_tokenizer(bpe), []
    for question in data.splits["train"]:
        row = next(row for row in RANKED if row["question"] == question.text)
        for worse in row["answers"][1:]:
            expected.append(
                tuple(f"Question: {row['question']}\n\nAnswer: {answer}" for answer in (row["answers"][0], worse))
            )
    batches = list(data.train_dataloader())
    found = [
        tuple(tokenizer.decode(tokens[row][mask[row]]) for tokens, mask in (batch[:2], batch[2:4]))
        for batch in batches
        for row in range(4)
    ]
    assert set(found) <= set(expected) and len(set(found)) == len(expected) // 4 * 4
    assert all(batch.margin.tolist() == [0.0] * 4 for batch in batches)
    assert len(list(data.val_dataloader())) == -(-len(data.pairs("validation")) // 4)


def test_one_random_pair_of_each_question(write_rows, bpe):
    data = module(write_rows(RANKED), "pairs", bpe, max_tokens=100, per_question=1)
    data.setup("fit")
    assert len(data.pairs("train")) == len(data.splits["train"])


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_overlong_pairs_are_dropped_or_cut_and_told_of_once(overlong, write_rows, bpe, caplog):
    path = write_rows(RANKED)
    whole = module(path, "pairs", bpe, max_tokens=1000)
    whole.setup("fit")
    rows = whole.pairs("train")
    long = sum(max(len(row.chosen), len(row.rejected)) > 28 for row in rows)
    assert 0 < long < len(rows)
    data = module(path, "pairs", bpe, max_tokens=28, overlong=overlong)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        kept = data.pairs("train")
    said = "left out" if overlong == "drop" else "cut at the beginning"
    assert caplog.text.count(f"{long} train pairs with a text longer than 28 tokens, {said}") == 1
    if overlong == "drop":
        assert kept == [row for row in rows if max(len(row.chosen), len(row.rejected)) <= 28]
    else:
        assert [row.chosen for row in kept] == [row.chosen[-28:] for row in rows]


def test_prompts_are_short_enough_and_begin_the_supervised_text(write_rows, bpe, caplog):
    path, tokenizer = write_rows(RANKED), load_tokenizer(bpe)
    data = module(path, "prompts", bpe, max_prompt_tokens=22, eval_prompts=5)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    expected = [f"Question: {question.text}\n\nAnswer:" for question in data.splits["train"]]
    expected = [ids for ids in tokenizer(expected)["input_ids"] if len(ids) <= 22]
    assert 0 < len(expected) < len(data.splits["train"])
    dropped = len(data.splits["train"]) - len(expected)
    assert f"{dropped} train questions longer than 22 tokens, left out ({len(expected)} remain)" in caplog.text
    assert data.prompts("train") == expected
    batch, rows = next(iter(data.train_dataloader())), list(data.train_dataloader().sampler)[:4]
    assert [tokens[mask].tolist() for tokens, mask in zip(*batch, strict=True)] == [expected[row] for row in rows]
    assert all(mask.tolist() == sorted(mask.tolist()) for mask in batch.mask)  # padding stands on the left
    prompts, human = data.val_dataloader()
    assert sum(len(batch.tokens) for batch in prompts) == 5
    assert next(iter(human)).shape == (4, 32)
    supervised = module(path, "supervised", bpe, part="rl")
    supervised.setup("fit")
    stream = supervised.packed("train").flatten().tolist()
    assert stream[: len(data.prompts("train")[0])] == data.prompts("train")[0]


def test_the_chat_template_is_that_of_the_tokenizer(write_rows, bpe, tmp_path):
    tokenizer = load_tokenizer(bpe)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    path = write_rows(RANKED)
    data = module(path, "prompts", str(tmp_path / "chat"), prompt_format="chat")
    data.setup("fit")
    first = data.splits["train"][0].text
    assert tokenizer.decode(data.prompts("train")[0]) == f"user: {first}<eos>\nassistant:"
    packed = module(path, "supervised", str(tmp_path / "chat"), prompt_format="chat", part="rl", block_size=64)
    packed.setup("fit")
    assert packed.packed("train")[0].tolist()[: len(data.prompts("train")[0])] == data.prompts("train")[0]
    pairs = module(path, "pairs", str(tmp_path / "chat"), prompt_format="chat", max_tokens=100, part="rl")
    pairs.setup("fit")  # a reward reads no special tokens
    assert tokenizer.decode(pairs.pairs("train")[0].chosen).startswith(f"user: {first}\nassistant: Use sorted")
    with pytest.raises(UserError, match="no chat template"):
        module(path, "prompts", bpe, prompt_format="chat").setup("fit")


def test_what_stands_before_a_text_stands_before_all_of_them(write_rows, bpe, tmp_path):
    """As the plain tokenizer puts it, once, where the chat template spells it out too."""
    plain = load_tokenizer(bpe)
    plain.add_special_tokens({"bos_token": "<s>"})
    one = [("<s>", plain.bos_token_id)]
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=one)
    plain.chat_template = "<s>{{ messages[0]['content'] }}:{% for m in messages[1:] %} {{ m['content'] }}{% endfor %}"
    plain.save_pretrained(tmp_path)
    path, sizes = write_rows(RANKED), {"max_prompt_tokens": 1000, "max_tokens": 12, "overlong": "truncate"}
    for prompt_format, begin in (("question_answer", "Question: {}\n\nAnswer:"), ("chat", "{}:")):
        made = {t: module(path, t, str(tmp_path), prompt_format=prompt_format, **sizes) for t in TASKS}
        for data in made.values():
            data.setup("validate")
        questions = [begin.format(question.text) for question in made["prompts"].splits["validation"]]
        assert made["prompts"].prompts("validation") == plain(questions)["input_ids"]
        pairs = made["pairs"].pairs("validation")
        rows = [row for pair in pairs for row in pair[:2]]
        assert all(row[0] == plain.bos_token_id and row.count(row[0]) == 1 and len(row) <= 12 for row in rows)
        stream = made["supervised"].packed("validation").flatten().tolist()
        after = [b for a, b in itertools.pairwise(stream) if a == plain.eos_token_id]
        assert stream[0] == plain.bos_token_id and set(after) == {plain.bos_token_id}
        assert stream.count(plain.bos_token_id) - stream.count(plain.eos_token_id) in (0, 1)


def test_a_tokenizer_for_this_text(write_rows, tmp_path):
    path = write_rows(RANKED)
    options = ["--data=StackExchangeDataModule", f"--data.path={path}", "--data.task=supervised", "--vocabulary=300"]
    assert tokenizer_main([*options, f"--output={tmp_path / 'bpe'}"]) == 0
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    assert len(tokenizer) == 300
    assert len(tokenizer("\n\nAnswer:")["input_ids"]) < 6  # the format's words were in the text


# In a run -----------------------------------------------------------------------------------------------------------


class Shortness(Reward):
    def forward(self, prompts, responses):
        return torch.tensor([-float(len(response)) for response in responses])


def trainer(tmp_path, **options):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, **quiet | options)


def test_language_model_and_ppo_take_their_batches(write_rows, llama_folder, tmp_path):
    words = [{"question": f"w{3 + i % 20} w{3 + i % 7}", "answers": [f"w{3 + i % 9}", "w4 w5"]} for i in range(200)]
    path = write_rows(words)
    model = LanguageModel(ModelSource(llama_folder))
    fit = trainer(tmp_path, limit_train_batches=2)
    fit.fit(model, datamodule=module(path, "supervised", block_size=8, batch_size=2))
    assert fit.callback_metrics["val/perplexity"] > 1
    ppo = PPO(ModelSource(llama_folder), Shortness(), PPOConfig(epochs=1, mini_batches=1), Sampling(4))
    fit = trainer(tmp_path, limit_train_batches=2, use_distributed_sampler=False)
    fit.fit(
        ppo, datamodule=module(path, batch_size=2, block_size=8, max_prompt_tokens=20, shares=Shares(0, 0, 0.5, 0.5))
    )
    assert ppo.ppo_step == 2
    assert {"val/reward", "val/perplexity"} <= set(fit.callback_metrics)
    with pytest.raises(UserError, match="max_prompt_tokens"):
        trainer(tmp_path).fit(ppo, datamodule=module(path, max_prompt_tokens=64))


# Mistakes -----------------------------------------------------------------------------------------------------------


def test_nothing_is_left(write_rows, bpe):
    path = write_rows(RANKED)
    with pytest.raises(UserError, match=r"all \d+ train questions longer than 3 tokens.* raise data's max_prompt_t"):
        module(path, "prompts", bpe, max_prompt_tokens=3).setup("fit")
    with pytest.raises(UserError, match=r"all \d+ train pairs with a text longer than 3 tokens.* raise data's max_t"):
        module(path, "pairs", bpe, max_tokens=3).setup("fit")
    with pytest.raises(UserError, match="less than one batch of 500"):
        module(path, "prompts", bpe, batch_size=500).setup("fit")
    with pytest.raises(UserError, match="needs a `tokenizer`"):
        module(path).setup("fit")
    alone = write_rows([{"question": row["question"], "answers": row["answers"][:1]} for row in RANKED], "alone.jsonl")
    with pytest.raises(UserError, match="no train question has two different answers"):
        module(alone, "pairs", bpe).setup("fit")


@pytest.mark.parametrize("name", ["batch_size", "max_tokens", "per_question", "limit_questions", "eval_questions"])
def test_impossible_sizes(name):
    with pytest.raises(UserError, match=f"data's {name} must be 1 or more, got 0"):
        StackExchangeDataModule(**{name: 0})


@pytest.mark.parametrize("name", ["task", "part", "prompt_format", "overlong"])
def test_impossible_choices(name):
    with pytest.raises(UserError, match=f"data's {name} must be one of .*, got evaluation"):
        StackExchangeDataModule(**{name: "evaluation"})


def test_a_configuration_file_can_say_it_all(write_rows, llama_folder, tmp_path, capsys):
    path = write_rows([{"question": f"w{3 + i % 20} w{3 + i // 20}", "answers": ["w5", "w6"]} for i in range(200)])
    status = main(
        [
            "fit",
            "--model=LanguageModel",
            f"--model.init_args.policy.path={llama_folder}",
            "--data=StackExchangeDataModule",
            f"--data.init_args.path={path}",
            "--data.init_args.task=supervised",
            "--data.init_args.shares={supervised: 0.7, reward: 0.1, rl: 0.1, evaluation: 0.1}",
            "--data.init_args.block_size=8",
            "--data.init_args.batch_size=2",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
        ]
    )
    assert status == 0, capsys.readouterr().err
