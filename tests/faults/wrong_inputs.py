"""What a user can get wrong, one row each: the command line that does it, and words that the message must hold."""

from __future__ import annotations

import gzip
import pickle

from faults.input_world import REVIEWS, another_model, callback, lines, one_stage, row, truncate

LAUGHS = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)

COMMANDS = {
    "unknown command": row(lambda w: ["fitt"], "unknown command 'fitt'", "pipeline"),
    "fit of nothing": row(lambda w: ["fit"], "model"),
    "abbreviated flag": row(lambda w: w.fit("--seed_every=3"), "seed_every"),
    "generate without prompt": row(lambda w: w.generate(), "--prompt"),
    "generate: an empty prompt": row(lambda w: w.generate("--prompt="), "no tokens"),
    "generate: a prompt at the context limit": row(
        lambda w: w.generate("--prompt=" + "film " * 126), "context is 128", "126"
    ),
    "generate: prompts that are not UTF-8": row(
        lambda w: w.generate(f"--prompts_file={w.file('prompts.txt', b'caf' + bytes([233]))}"), "prompts.txt", "UTF-8"
    ),
    "generate: no such prompts": row(lambda w: w.generate("--prompts_file=nowhere.txt"), "nowhere.txt"),
    "generate: batches of 0": row(lambda w: w.generate("--prompt=a", "--batch_size=0"), "batch_size", "0"),
    "generate: -1 samples": row(lambda w: w.generate("--prompt=a", "--samples=-1"), "samples", "-1"),
    "generate: no such device": row(lambda w: w.generate("--prompt=a", "--device=gpu7"), "device", "gpu7"),
    "generate: the output is a folder": row(lambda w: w.generate("--prompt=a", f"--output={w.folder}"), "output"),
    "report of a missing folder": row(lambda w: ["report", f"{w.folder}/nowhere"], "no such folder", "nowhere"),
    "report of no run": row(lambda w: ["report", str(w.toy)], "val/reward", "val/kl"),
    "tokenizer too small": row(
        lambda w: [
            "tokenizer",
            "--data=IMDBDataModule",
            f"--data.init_args.path={w.file('data/train.jsonl', lines(REVIEWS)).parent}",
            "--vocabulary=10",
            f"--output={w.folder}/out",
        ],
        "256",
        "10",
    ),
    "tokenizer: the output is a file": row(
        lambda w: ["tokenizer", "--data=ToyReviewsDataModule", f"--output={w.file('taken', 'mine')}"], "taken"
    ),
}

CONFIGS = {
    "missing file": row(lambda w: ["fit", "--config=nowhere.yaml"], "nowhere.yaml"),
    "a folder as file": row(lambda w: w.fit(f"--config={w.folder}"), "config"),
    "not YAML": row(lambda w: w.config("model: [1, 2\ndata: {"), "config.yaml"),
    "not UTF-8": row(lambda w: w.config(b"model:\n  caf\xe9: 1\n"), "config.yaml", "UTF-8"),
    "no mapping": row(lambda w: w.config("- 1\n- 2\n"), "config.yaml"),
    "nothing but comments": row(lambda w: w.config("# lr: 1\n"), "config.yaml", "comments"),
    "an empty file for evaluate": row(
        lambda w: ["evaluate", f"--model={w.toy}/policy", f"--config={w.file('empty.yaml', '')}"],
        "empty.yaml",
        "leave it out",
    ),
    "a key given twice": row(
        lambda w: w.config("trainer:\n  max_epochs: 1\n  max_epochs: 2\n"), "config.yaml", "'max_epochs'", "twice"
    ),
    "a pipeline's key given twice": row(
        lambda w: w.pipeline("output: a\noutput: b\nstages: {}\n"), "'output'", "twice"
    ),
    "3,000 lists in one another": row(lambda w: w.config(f"model: {'[' * 3000}{']' * 3000}"), "config.yaml", "levels"),
    "3,000 mappings in one another": row(
        lambda w: w.pipeline("".join(f"{' ' * level}x:\n" for level in range(3000))), "pipeline.yaml", "levels"
    ),
    "a billion laughs": row(lambda w: w.config(LAUGHS), "config.yaml", "aliases"),
    "a billion laughs in a model's file": row(
        lambda w: w.fit(f"--model={w.file('model.yaml', LAUGHS)}"), "model.yaml", "aliases"
    ),
    "a billion laughs to evaluate": row(
        lambda w: ["evaluate", f"--config={w.file('evaluate.yaml', LAUGHS)}"], "evaluate.yaml", "aliases"
    ),
    "a mapping in itself": row(lambda w: w.config("model: &m {init_args: {ppo: *m}}"), "config.yaml", "part of itself"),
    "a stage in itself": row(lambda w: w.pipeline("stages: &s {one: *s}"), "pipeline.yaml", "part of itself"),
    "a pipeline's stage that needs itself": row(lambda w: w.pipeline(one_stage(needs=["one"])), "circle"),
    "a pipeline that is missing": row(lambda w: ["pipeline", f"{w.folder}/nowhere.yaml"], "nowhere.yaml"),
    "a typo in a key": row(lambda w: w.config("model:\n  init_args:\n    ppo: {clipp: 0.1}\n"), "clipp"),
    "a typo in a trainer's key": row(lambda w: w.fit("--trainer.max_epoch=3"), "trainer.max_epoch"),
    "a typo in a callback's key": row(lambda w: w.fit(callback(evry=3)), "evry"),
    "a class that does not exist": row(lambda w: w.fit("--model=PPOO"), "PPOO"),
    "a class that is not ours": row(lambda w: w.config("model:\n  class_path: subprocess.Popen\n"), "subprocess.Popen"),
    "a function for a class": row(lambda w: w.config("model:\n  class_path: os.system\n"), "os.system"),
    "a number in words": row(lambda w: w.fit("--model.init_args.ppo.clip=high"), "ppo.clip", "float", "high"),
    "a negative batch size": row(lambda w: w.fit("--data.init_args.batch_size=-8"), "batch_size", "-8"),
    "more mini-batches than rows": row(lambda w: w.fit("--model.init_args.ppo.mini_batches=9"), "9 mini-batches", "8"),
    "a rate of 0": row(lambda w: w.fit("--model.init_args.ppo.learning_rate=0"), "learning_rate", "above 0"),
    "a context that is too short": row(
        lambda w: w.fit("--model.init_args.sampling.max_new_tokens=97", "--data.init_args.max_prompt_tokens=32"),
        "context is 128",
        "max_prompt_tokens",
    ),
    "a reset every 0 batches": row(lambda w: w.fit(callback(every=0)), "every", "got 0"),
    "a decay of 1.5": row(lambda w: w.fit(callback(decay=1.5)), "decay", "got 1.5"),
    "half a callback": row(lambda w: w.fit("--trainer.callbacks.every=3"), "callbacks"),
    "a precision that is none": row(lambda w: w.fit("--trainer.precision=24"), "precision", "24"),
    "an accelerator that is not here": row(lambda w: w.fit("--trainer.accelerator=tpu"), "torch_xla"),
    "a seed below 0": row(lambda w: w.fit("--seed_everything=-5"), "seed", "-5"),
}

DATA = {
    "missing path": row(
        lambda w: w.fit("--data=IMDBDataModule", f"--data.init_args.path={w.folder}/nowhere"), "does not exist"
    ),
    "no train file": row(lambda w: w.data(lines(REVIEWS), "reviews.jsonl"), "train.jsonl", "reviews.jsonl"),
    "truncated gzip": row(
        lambda w: w.data(gzip.compress(lines(REVIEWS * 50).encode())[:200], "train.jsonl.gz"), "train.jsonl.gz"
    ),
    "gzip in name alone": row(lambda w: w.data(lines(REVIEWS), "train.jsonl.gz"), "train.jsonl.gz"),
    "invalid UTF-8": row(lambda w: w.data(b'{"text": "caf\xe9", "label": 1}\n' * 40), "'text'", "UTF-8"),
    "a line that is no JSON": row(lambda w: w.data(lines(REVIEWS) + '{"text": "cut off'), "train.jsonl"),
    "a key given twice in a line": row(
        lambda w: w.data('{"text": "good", "text": "bad", "label": 1}\n' * 40), "train.jsonl", "text"
    ),
    "an empty file": row(lambda w: w.data(""), "train.jsonl", "empty"),
    "a header alone": row(lambda w: w.data("text,label\n", "train.csv"), "train.csv", "empty"),
    "truncated parquet": row(lambda w: w.data(b"PAR1" + bytes(20), "train.parquet"), "train.parquet"),
    "missing column": row(lambda w: w.rows([{"review": "good", "label": 1}] * 40), "no column 'text'", "text_column"),
    "empty column": row(lambda w: w.rows([{"text": None, "label": 1}] * 40), "'text'", "empty"),
    "a column of empty texts": row(lambda w: w.rows([{"text": " ", "label": 1}] * 40), "no texts"),
    "texts that are numbers": row(lambda w: w.rows([{"text": 5, "label": 1}] * 40), "'text'", "5"),
    "label 7": row(lambda w: w.rows([{"text": "good", "label": 7}] * 40), "must hold 0 and 1", "7"),
    "labels in words": row(lambda w: w.rows([{"text": "good", "label": "pos"}] * 40), "must hold 0 and 1", "pos"),
    "labels with a gap": row(
        lambda w: w.rows([{"text": "good", "label": 1}, {"text": "bad", "label": None}] * 20), "'label'", "0 and 1"
    ),
    "less than a batch": row(lambda w: w.rows(REVIEWS[:5]), "less than one batch", "batch_size"),
    "prompts of no tokens": row(
        lambda w: w.rows(
            [{"text": "zzz zzz zzz the film was good", "label": 1}] * 80,
            f"--model.init_args.policy.tokenizer={w.tokenizer_that_drops('zzz')}",
            "--data.init_args.block_size=8",
        ),
        "prompt of no tokens",
    ),
    "the hub cannot be reached": row(
        lambda w: w.fit("--data=IMDBDataModule"), "stanfordnlp/imdb", "data.init_args.path"
    ),
    "aligned files of unlike length": row(
        lambda w: w.translation(fr=b"un\ndeux\n", en=b"one\n"), "train.fr has 2 lines", "train.en 1"
    ),
    "aligned text: truncated gzip": row(
        lambda w: w.translation(fr_gz=gzip.compress(b"un\n" * 999)[:-9], en=b"one\n" * 999), "train.fr.gz", "gzip"
    ),
    "aligned text: invalid UTF-8": row(
        lambda w: w.translation(fr=b"un\n\xff\n", en=b"one\ntwo\n"), "train.fr, line 2", "UTF-8"
    ),
    "aligned text: one side missing": row(lambda w: w.translation(fr=b"un\n"), "train.en"),
}

MODELS = {
    "missing folder": row(lambda w: w.fit("--model.init_args.policy.path=./nowhere"), "no such folder", "nowhere"),
    "a hub id, offline": row(
        lambda w: w.fit("--model.init_args.policy.path=nobody/no-such-model"),
        "nobody/no-such-model",
        "save_pretrained folder",
    ),
    "a folder without config.json": row(lambda w: w.policy(lambda p: (p / "config.json").unlink()), "config.json"),
    "a config.json that is cut off": row(lambda w: w.policy(lambda p: truncate(p / "config.json")), "config.json"),
    "a config.json of an unknown model": row(
        lambda w: w.policy(lambda p: (p / "config.json").write_text('{"model_type": "gpt9"}')), "gpt9"
    ),
    "a folder without weights": row(lambda w: w.policy(lambda p: (p / "model.safetensors").unlink()), "safetensors"),
    "weights that are cut off": row(lambda w: w.policy(lambda p: truncate(p / "model.safetensors")), "policy"),
    "weights of another shape": row(
        lambda w: w.policy(
            lambda p: (p / "config.json").write_text(
                (p / "config.json").read_text().replace('"n_embd": 16', '"n_embd": 32')
            )
        ),
        "policy",
    ),
    "a folder without tokenizer": row(
        lambda w: w.policy(lambda p: [file.unlink() for file in p.glob("tokenizer*")]), "tokenizer"
    ),
    "a tokenizer that is cut off": row(lambda w: w.policy(lambda p: truncate(p / "tokenizer.json")), "tokenizer"),
    "a vocabulary that does not fit the model": row(
        lambda w: w.fit(f"--model.init_args.policy.tokenizer={w.larger_tokenizer()}"), "tokens", "vocabulary"
    ),
    "a vocabulary that does not fit the reward": row(
        lambda w: w.fit(f"--model.init_args.reward.init_args.path={w.reward_with(w.larger_tokenizer())}"),
        "tokens",
        "vocabulary",
    ),
    "a classifier as policy": row(lambda w: w.fit(f"--model.init_args.policy.path={w.toy}/reward"), "reward"),
    "a policy as classifier": row(
        lambda w: w.fit(
            f"--model.init_args.reward.init_args.path={w.toy}/policy", "--model.init_args.reward.init_args.label=1"
        ),
        "policy",
        "score",
    ),
    "a label the classifier does not have": row(
        lambda w: w.fit("--model.init_args.reward.init_args.label=HAPPY"), "HAPPY", "POSITIVE"
    ),
    "adapters of no layer": row(
        lambda w: w.fit("--model.init_args.policy.lora={targets: [nowhere]}"), "lora.targets", "nowhere"
    ),
    "an architecture that is none": row(
        lambda w: [
            "fit",
            "--config=configs/toy/language_model.yaml",
            f"--model.init_args.policy={{architecture: {{model_type: gpt9}}, tokenizer: {w.toy}/tokenizer}}",
            f"--trainer.logger.init_args.save_dir={w.folder}",
            "--trainer.logger.init_args.name=run",
        ],
        "gpt9",
    ),
    "a reward that raises": row(lambda w: w.reward("raise KeyError('stars')"), "KeyError", "stars"),
    "a reward of NaN": row(lambda w: w.reward("return [float('nan')] * len(responses)"), "returned nan for"),
    "a reward of another length": row(lambda w: w.reward("return [0.0]"), "one score a response"),
    "a reward that is not there": row(
        lambda w: w.fit(
            "--model.init_args.reward=FunctionReward",
            "--model.init_args.reward.init_args.function=no_such_module.reward",
        ),
        "no_such_module",
    ),
}

CHECKPOINTS = {
    "missing": row(lambda w: w.fit("--ckpt_path=nowhere.ckpt"), "no checkpoint at nowhere.ckpt"),
    "a pickle payload": row(lambda w: w.resume(another_model(payload=w.payload)), "wrong.ckpt", "never loaded"),
    "a bare pickle payload": row(lambda w: w.resume(pickle.dumps(w.payload)), "wrong.ckpt", "never loaded"),
    "a pickle payload to generate from": row(
        lambda w: w.generate("--prompt=a", model=w.checkpoint({"payload": w.payload})), "wrong.ckpt", "never loaded"
    ),
    "truncated": row(lambda w: w.resume(another_model(), share=0.6), "wrong.ckpt", "cut off"),
    "a text file": row(lambda w: w.resume(b"hello"), "wrong.ckpt", "damaged"),
    "an empty file": row(lambda w: w.resume(b""), "wrong.ckpt"),
    "a folder": row(lambda w: w.fit(f"--ckpt_path={w.folder}"), "is a folder", "a checkpoint is a file"),
    "not a mapping": row(lambda w: w.resume([1, 2]), "wrong.ckpt", "not a checkpoint"),
    "of another model": row(lambda w: w.resume(another_model()), "another model"),
    "of nothing to generate from": row(
        lambda w: w.generate("--prompt=a", model=w.checkpoint({"state_dict": {}})), "wrong.ckpt", "policy"
    ),
}

OUTPUTS = {
    "the folder is a file": row(
        lambda w: w.fit(f"--trainer.logger.init_args.save_dir={w.file('taken', 'mine')}"), "taken"
    ),
    "the folder cannot be made": row(
        lambda w: w.fit("--trainer.logger.init_args.save_dir=/dev/null/runs"), "/dev/null"
    ),
    "pipeline: the folder is a file": row(
        lambda w: [*w.pipeline(one_stage()), f"--output={w.file('taken', 'mine')}"], "taken", "is a file"
    ),
    "report: the folder is a file": row(
        lambda w: ["report", str(w.toy), f"--output={w.file('taken', 'mine')}"], "taken", "is not a folder"
    ),
}

TABLES = {
    "command": COMMANDS,
    "config": CONFIGS,
    "data": DATA,
    "model": MODELS,
    "checkpoint": CHECKPOINTS,
    "output": OUTPUTS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}
