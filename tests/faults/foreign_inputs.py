"""More that a user can get wrong: what other libraries find out, and what would replace somebody's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.input_world import REVIEWS, World, another_model, lines, row
from safetensors.torch import load_file, save_file

PPO = "--model.init_args.ppo"
CSV = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: %s, name: csv, version: seed_1}}"


def stage(world: World, config: str, *arguments: str) -> list[str]:
    """A fit of another toy configuration."""
    save = [f"--trainer.logger.init_args.save_dir={world.folder}", "--trainer.logger.init_args.name=run"]
    return ["fit", f"--config=configs/toy/{config}.yaml", *save, *arguments]


def architecture(world: World, **fields: Any) -> str:
    source = {"path": None, "architecture": {"model_type": "gpt2", **fields}, "tokenizer": f"{world.toy}/tokenizer"}
    return f"--model.init_args.policy={json.dumps(source)}"


def added(name: str, **arguments: Any) -> list[str]:
    """A callback beside those of the configuration."""
    flags = [f"--trainer.callbacks.{field}={value}" for field, value in arguments.items()]
    return [f"--trainer.callbacks+={name}", *flags]


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"payload": World(folder.parent, folder, list).payload}, folder / "pytorch_model.bin")


def set_in_config(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, folder / "model.safetensors")


def adapter(world: World, text: str) -> str:
    world.file("adapter/adapter_config.json", text)
    return str(world.folder / "adapter")


def questions(world: World, **row_of: Any) -> Path:
    return world.file("texts.jsonl", lines([row_of] * 3))


COMMANDS = {
    "generate: unknown flag": row(lambda w: w.generate("--prompt=a", "--temp=0.7"), "--temp", "--help"),
    "generate: no model": row(lambda w: ["generate", "--prompt=a"], "--model"),
    "generate over its prompts": row(
        lambda w: w.generate(f"--prompts_file={w.file('p.txt', 'a film')}", f"--output={w.folder}/p.txt"), "p.txt"
    ),
    "report of nothing": row(lambda w: ["report"], "RUN"),
    "merge: no such type": row(lambda w: ["merge", str(w.toy), "--output=x", "--dtype=fp16"], "--dtype", "fp16"),
    "merge: an adapter that is cut off": row(
        lambda w: ["merge", adapter(w, '{"peft_type": "LO'), f"--output={w.folder}/out"], "adapter"
    ),
    "merge: an adapter of no type": row(
        lambda w: ["merge", adapter(w, '{"r": 4}'), f"--output={w.folder}/out"], "adapter"
    ),
    "pipeline: jobs in words": row(lambda w: [*w.pipeline("stages: {}"), "--jobs=two"], "--jobs", "two"),
    "evaluate: windows by 0": row(
        lambda w: [
            "evaluate",
            f"--model={w.toy}/policy",
            f"--texts.path={questions(w, text='a')}",
            "--texts.batch_size=0",
        ],
        "texts.batch_size",
    ),
    "evaluate: texts that are numbers": row(
        lambda w: [
            "evaluate",
            f"--model={shutil.copytree(w.toy / 'policy', w.folder / 'policy')}",
            f"--texts.path={questions(w, text=5)}",
        ],
        "'text'",
        "5",
    ),
    "tokenizer over a model's": row(
        lambda w: [
            "tokenizer",
            "--data=IMDBDataModule",
            f"--data.init_args.path={w.file('data/train.jsonl', lines(REVIEWS)).parent}",
            "--vocabulary=300",
            f"--output={shutil.copytree(w.toy / 'policy', w.folder / 'policy')}",
        ],
        "policy",
        "holds a model",
    ),
}

CONFIGS = {
    "a validation later than the epoch's end": row(
        lambda w: w.fit("--trainer.limit_train_batches=1"), "val_check_interval"
    ),
    "a validation every 0 batches": row(lambda w: w.fit("--trainer.val_check_interval=0"), "val_check_interval"),
    "a validation every 0 epochs": row(lambda w: w.fit("--trainer.check_val_every_n_epoch=0"), "must not be 0"),
    "a strategy that is none": row(lambda w: w.fit("--trainer.strategy=ddpp"), "ddpp"),
    "devices in words": row(lambda w: w.fit("--trainer.devices=two"), "devices"),
    "no epochs": row(lambda w: w.fit("--trainer.max_epochs=0"), "trainer.max_epochs must not be 0"),
    "no batches": row(lambda w: w.fit("--trainer.limit_train_batches=0"), "trainer.limit_train_batches must not be 0"),
    "the best checkpoint of a prediction": row(lambda w: [*w.toy_fit(command="predict"), "--ckpt_path=best"], "best"),
    "a mode of early stopping that is none": row(
        lambda w: w.fit(*added("EarlyStopping", monitor="val/reward", mode="maximum")),
        "`mode` can be",
        "got maximum",
    ),
    "a mode of checkpoints that is none": row(
        lambda w: w.fit(*added("ModelCheckpoint", monitor="val/reward", mode="maxx")), "mode", "maxx"
    ),
    "a logger that is not installed": row(lambda w: w.fit("--trainer.logger=WandbLogger"), "wandb"),
    "two exports into one folder": row(lambda w: w.fit(*added("SavePretrained", monitor="val/kl")), "SavePretrained"),
    "a width in words": row(lambda w: w.fit(architecture(w, n_embd="wide")), "n_embd"),
    "a width below 0": row(lambda w: w.fit(architecture(w, n_embd=-64)), "gpt2"),
    "a metric that does not exist": row(
        lambda w: w.fit("--model.init_args.metrics=[ToyAcceptence]"), "PPO: metrics: there is no class 'ToyAcceptence'"
    ),
    "a metric without brackets": row(
        lambda w: w.fit("--model.init_args.metrics=ToyAcceptance"), "PPO: metrics: cannot be ToyAcceptance", "list"
    ),
    "a task for another model": row(
        lambda w: w.fit("--data.init_args.task=language_model"), "language_model", "prompts"
    ),
    "a task of rewards for a policy": row(lambda w: w.fit("--data.init_args.task=reward_model"), "reward_model"),
    "a task of prompts for a language model": row(
        lambda w: stage(w, "language_model", architecture(w, n_embd=16, n_head=2), "--data.init_args.task=prompts"),
        "prompts",
        "language_model",
    ),
    "texts that are longer than a classifier": row(
        lambda w: stage(
            w,
            "reward_model",
            f"--model.init_args.classifier={{path: {w.toy}/reward, architecture: null, tokenizer: null}}",
            "--data.init_args.max_tokens=100000",
        ),
        "max_tokens",
        "128",
    ),
    "an eps of 0": row(lambda w: w.fit(f"{PPO}.adam_eps=0"), "eps", "above 0"),
    "a rate without end": row(lambda w: w.fit(f"{PPO}.learning_rate=.inf"), "learning_rate", "inf"),
    "betas above 1": row(lambda w: w.fit(f"{PPO}.adam_betas=[1.5, 0.9]"), "betas", "1.5"),
    "a weight decay below 0": row(lambda w: w.fit(f"{PPO}.weight_decay=-0.1"), "weight_decay", "-0.1"),
}

MODELS = {
    "a pickle payload as weights": row(lambda w: w.policy(pickled_weights), "pickle", "never loaded"),
    "a pickle payload to generate from": row(
        lambda w: (
            [pickled_weights(Path(shutil.copytree(w.toy / "policy", w.folder / "policy")))]
            and w.generate("--prompt=a", model=f"{w.folder}/policy")
        ),
        "pickle",
        "never loaded",
    ),
    "a billion layers": row(lambda w: w.policy(set_in_config(n_layer=10**9)), "n_layer: 1000000000", "16 tensors"),
    "layers in words": row(lambda w: w.policy(set_in_config(n_layer="two")), "n_layer"),
    "an activation that is none": row(lambda w: w.policy(set_in_config(activation_function="geluu")), "geluu"),
    "a type that is none": row(lambda w: w.policy(set_in_config(dtype="float23")), "float23"),
    "an empty tokenizer.json": row(lambda w: w.policy(lambda p: (p / "tokenizer.json").write_text("{}")), "tokenizer"),
    "weights of NaN": row(lambda w: w.policy(not_finite), "NaN"),
    "a reward that ends python": row(lambda w: w.reward("raise SystemExit(0)"), "SystemExit"),
}

CHECKPOINTS = {
    "of weights alone": row(
        lambda w: w.resume({name: value for name, value in another_model().items() if name != "optimizer_states"}),
        "optimizer_states",
    ),
    "of another project": row(
        lambda w: w.generate("--prompt=a", model=w.checkpoint(another_model(hyper_parameters={"policy": "gpt2"}))),
        "wrong.ckpt",
        "policy",
    ),
    "of unknown settings": row(
        lambda w: w.generate("--prompt=a", model=w.checkpoint(another_model(hyper_parameters={"policy": {"x": 1}}))),
        "wrong.ckpt",
        "'x'",
    ),
    "a folder of shards to generate from": row(
        lambda w: [w.file("x.ckpt/meta.pt", b"")] and w.generate("--prompt=a", model=f"{w.folder}/x.ckpt"),
        "is a folder",
    ),
}

OUTPUTS = {
    "somebody's config.yaml is there": row(
        lambda w: [w.file("run/seed_1/config.yaml", "mine")] and w.fit(), "seed_1", "config.yaml"
    ),
    "somebody's final is there": row(
        lambda w: [w.file("run/seed_1/final/precious.txt", "mine")] and w.fit(), "seed_1", "final"
    ),
    "an export that is there": row(
        lambda w: (
            [w.file("models/final/precious.txt", "mine")]
            and w.fit(*added("SavePretrained", folder=w.folder / "models"))
        ),
        "models/final",
    ),
    "a run with another logger": row(
        lambda w: [w.file("csv/seed_1/metrics.csv", "step\n1\n")] and w.fit(CSV % w.folder), "metrics.csv"
    ),
    "a name of 300 letters": row(lambda w: w.fit(f"--trainer.logger.init_args.name={'a' * 300}"), "name too long"),
    "evaluate: the output is a file": row(
        lambda w: ["evaluate", f"--model={w.toy}/policy", "--texts.path=x", f"--output={w.file('taken', 'mine')}"],
        "taken",
    ),
}

TABLES = {
    "command": COMMANDS,
    "config": CONFIGS,
    "model": MODELS,
    "checkpoint": CHECKPOINTS,
    "output": OUTPUTS,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}
