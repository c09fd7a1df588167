"""Builders of wrong inputs, and what a row about one says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

REVIEWS = [{"text": f"a film number {i} that i saw with my brother", "label": i % 2} for i in range(40)]


class Payload:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


class World:
    """Builders of wrong inputs in a folder of their own.

    Args:
        folder: empty.
        toy: folder with tokenizer/, policy/ and reward/ that are right.
        toy_fit: makes the command line of a fit that is right, too.
    """

    def __init__(self, folder: Path, toy: Path, toy_fit: Callable[..., list[str]]) -> None:
        self.folder, self.toy, self.toy_fit = folder, toy, toy_fit

    def fit(self, *arguments: str) -> list[str]:
        return [*self.toy_fit(), *arguments]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def config(self, content: str | bytes) -> list[str]:
        """A fit with one more configuration file, with this content."""
        return self.fit(f"--config={self.file('config.yaml', content)}")

    def data(self, content: str | bytes, name: str = "train.jsonl", *arguments: str) -> list[str]:
        """A fit on a folder of reviews with one file, with this content."""
        folder = self.file(f"data/{name}", content).parent
        return self.fit(
            "--data=IMDBDataModule",
            f"--data.init_args.path={folder}",
            "--data.init_args.batch_size=8",
            "--data.init_args.eval_texts=8",
            *arguments,
        )

    def rows(self, rows: list[dict[str, Any]], *arguments: str) -> list[str]:
        return self.data(lines(rows), "train.jsonl", *arguments)

    def translation(self, *arguments: str, **files: bytes) -> list[str]:
        """A fit of a translation model on aligned files ``train.<language>``."""
        for language, content in files.items():
            self.file(f"text/train.{language.replace('_', '.')}", content)
        return [
            "fit",
            "--config=configs/translation/toy/sender.yaml",
            f"--model.init_args.policy.tokenizer={self.toy}/tokenizer",
            "--data=TranslationDataModule",
            f"--data.init_args.corpora.train.path={self.folder}/text/train",
            "--data.init_args.source=fr",
            "--data.init_args.target=en",
            f"--trainer.logger.init_args.save_dir={self.folder}",
            "--trainer.logger.init_args.name=run",
            *arguments,
        ]

    def policy(self, damage: Callable[[Path], Any], *arguments: str) -> list[str]:
        """A fit of a copy of the policy that was damaged."""
        path = self.folder / "policy"
        shutil.copytree(self.toy / "policy", path)
        damage(path)
        return self.fit(f"--model.init_args.policy.path={path}", *arguments)

    def checkpoint(self, content: Any, share: float = 1.0) -> str:
        """A file of these bytes, or of what torch saves of anything else; or the first share of it."""
        if isinstance(content, bytes):
            return str(self.file("wrong.ckpt", content))
        torch.save(content, self.folder / "wrong.ckpt")
        truncate(self.folder / "wrong.ckpt", share)
        return str(self.folder / "wrong.ckpt")

    def resume(self, content: Any, share: float = 1.0) -> list[str]:
        """A fit that goes on from such a checkpoint."""
        return self.fit(f"--ckpt_path={self.checkpoint(content, share)}")

    @property
    def payload(self) -> Payload:
        return Payload(self.folder / "executed")

    def generate(self, *arguments: str, model: str | None = None) -> list[str]:
        return ["generate", f"--model={model or self.toy / 'policy'}", "--max_new_tokens=3", *arguments]

    def reward(self, body: str) -> list[str]:
        """A fit whose reward is a python function with this body."""
        name = f"reward_of_{self.folder.name.replace('-', '_')}"
        self.file(f"{name}.py", f"def reward(prompts, responses):\n    {body}\n")
        return self.fit(
            "--model.init_args.reward=FunctionReward", f"--model.init_args.reward.init_args.function={name}.reward"
        )

    def tokenizer_that_drops(self, word: str) -> str:
        """A tokenizer for which a text of this word alone has no tokens."""
        from tokenizers.normalizers import Replace
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.toy / "tokenizer")
        tokenizer.backend_tokenizer.normalizer = Replace(word, "")
        tokenizer.save_pretrained(self.folder / "tokenizer")
        return str(self.folder / "tokenizer")

    def larger_tokenizer(self) -> str:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.toy / "tokenizer")
        tokenizer.add_tokens([f"unheard{number}" for number in range(5)])
        tokenizer.save_pretrained(self.folder / "tokenizer")
        return str(self.folder / "tokenizer")

    def reward_with(self, tokenizer: str) -> Path:
        """A copy of the reward with another tokenizer."""
        shutil.copytree(self.toy / "reward", self.folder / "reward")
        shutil.copy(f"{tokenizer}/tokenizer.json", self.folder / "reward")
        return self.folder / "reward"

    def pipeline(self, content: str) -> list[str]:
        return ["pipeline", str(self.file("pipeline.yaml", content))]


class Row(NamedTuple):
    """A wrong input: `arguments` builds the command line, `words` are in the message."""

    arguments: Callable[[World], list[str]]
    words: tuple[str, ...]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def truncate(path: Path, share: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def another_model(**more: Any) -> dict[str, Any]:
    """What Lightning looks for in a checkpoint, with weights of something else."""
    state = {"actor.lm.model.transformer.wte.weight": torch.zeros(3, 3)}
    loops = {"callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {}, "epoch": 0, "global_step": 0}
    return {"state_dict": state, "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}, **loops, **more}


def one_stage(**fields: Any) -> str:
    return yaml.safe_dump({"output": "out", "stages": {"one": {"command": "fit", **fields}}})


def callback(**arguments: Any) -> str:
    return "--trainer.callbacks=" + yaml.safe_dump(
        [{"class_path": "ElasticReset", "init_args": {"every": 2, **arguments}}], default_flow_style=True
    )


def row(arguments: Callable[[World], list[str]], *words: str) -> Row:
    return Row(arguments, words)
