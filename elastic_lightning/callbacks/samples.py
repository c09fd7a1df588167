"""Samples of a policy, written where people look: TensorBoard text and JSONL."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from elastic_lightning.outputs import check_absent
from elastic_lightning.ranks import alike, objects_of_ranks
from elastic_lightning.terminal import json_line, plain


class SampleLogger(Callback):
    """At each validation, writes the responses to the first prompts: always the same ones, drawn with the same luck.

    Into TensorBoard as a table under "samples", and into ``<run folder>/samples.jsonl`` with ppo_step, prompt,
    response, reward and complete (whether the response ended by itself); outside of a fit ``samples_validate.jsonl``.

    Args:
        samples: how many prompts.
    """

    def __init__(self, samples: int = 8) -> None:
        self.samples = samples
        self._rows: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if isinstance(outputs, list) and len(self._rows) < self.samples:
            rows = [row for of_rank in objects_of_ranks(outputs) for row in of_rank]
            self._rows += rows[: self.samples - len(self._rows)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows, self._rows = self._rows, []
        folder = trainer.log_dir  # asked for on every rank: the first one tells the others
        name = "samples.jsonl" if trainer.state.fn == "fit" else f"samples_{trainer.state.fn.value}.jsonl"
        if rows and folder and not trainer.fast_dev_run:
            alike(lambda: self._write(trainer, Path(folder) / name, rows, pl_module.ppo_step))

    def _write(self, trainer: Trainer, path: Path, rows: list[dict[str, Any]], step: int) -> None:
        if not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json_line({"ppo_step": step, **row}) for row in rows)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text"):
                logger.experiment.add_text("samples", _markdown(rows), step)


class ResponseWriter(BasePredictionWriter):
    """Writes what ``predict`` returns as JSONL, one line a response; other ranks than the first add their number.

    The file has its name when it is whole; until then ``<name>.writing``.

    Args:
        path: of the file; ``<run folder>/predictions.jsonl`` by default.
        replace: a file that is there already; else it is refused before anything is generated.
    """

    def __init__(self, path: str | None = None, replace: bool = False) -> None:
        super().__init__("batch")
        self.path, self.replace = path, replace
        self._started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            path = self._file(trainer)
            alike(lambda: check_absent(path, self.replace))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = False

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        path = self._file(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unfinished(path).open("a" if self._started else "w", encoding="utf-8") as file:
            file.writelines(json_line(row) for row in prediction)
        if not self._started:
            trainer.print(f"writing responses to {plain(path)}")
        self._started = True

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started:
            os.replace(_unfinished(self._file(trainer)), self._file(trainer))

    def _file(self, trainer: Trainer) -> Path:
        path = Path(self.path or f"{trainer.log_dir or trainer.default_root_dir}/predictions.jsonl")
        return path.with_suffix(f".rank{trainer.global_rank}{path.suffix}") if trainer.global_rank > 0 else path


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.writing")


def _markdown(rows: list[dict[str, Any]]) -> str:
    def cell(text: str) -> str:
        """Text as it is: no tags, no links or pictures, no other columns."""
        return re.sub(r"[\\`*_{}\[\]()#+!|~>]", r"\\\g<0>", html.escape(plain(text.replace("\n", " ")), quote=False))

    texts = [name for name, value in rows[0].items() if isinstance(value, str)]

    def line(row: dict[str, Any]) -> str:
        reward = "none" if row["reward"] is None else f"{row['reward']:.3f}"  # of a response that is masked
        return " | ".join([*(cell(row[name]) for name in texts), reward])

    lines = [line(row) for row in rows]
    return "\n".join(
        f"| {line} |" for line in [" | ".join([*texts, "reward"]), "|".join(["---"] * (len(texts) + 1)), *lines]
    )
