"""Which checkpoint a command goes on from, and whether it is of this run."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from elastic_lightning.errors import UserError
from elastic_lightning.outputs import RUN_FILES, ended_unsaved, named

DECISIVE = ("seed_everything", "model", "data")  # the parts of a configuration that a resumed run must share
HARMLESS = ("offload", "save")  # settings of callbacks that change weights, and that may change themselves
PLACES = ("path", "tokenizer", "receiver_tokenizer", "root", "folder")  # where things lie, which may move
KINDS = {  # of what a checkpoint holds
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "config": dict,
    "world_size": int,
    "machine": dict,
    "method": list,
    "run_log": dict,
}
SHOWN = 3  # differences that an error lists


def last_checkpoint(folder: str | Path) -> Path:
    """The checkpoint of a run's folder that was written last: not the highest number, which may be of a continuation
    that was given up for another one, from an earlier checkpoint.

    Raises:
        UserError: there is none.
    """
    path = newest(folder)
    if path is None:
        raise UserError(
            f"--ckpt_path last: no checkpoint in {folder}/checkpoints; remove {folder} and start without it"
        )
    return path


def newest(folder: str | Path) -> Path | None:
    """As `last_checkpoint`; None where there is none."""
    checkpoints = (Path(folder) / "checkpoints").glob("*.ckpt")
    others = sorted(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path.name))
    ours = [path for path in others if path.name.startswith("batch_")]
    return (ours or others or [None])[-1]


def differences(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Names of the settings that both have and that differ, with their values then and now."""
    before, now = flat(saved), flat(given)
    return {name: (before[name], now[name]) for name in sorted(before.keys() & now.keys()) if before[name] != now[name]}


def changes(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """As `differences`, and names that only one of them has, with None for the other's value."""
    before, now = flat(saved), flat(given)
    either = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in either if before.get(name) != now.get(name)}


def check_same_run(
    checkpoint: dict[str, Any],
    config: dict[str, Any],
    path: Path,
    world_size: int,
    same_version: bool = True,
    method: Collection[str] = (),
    another_method: bool = False,
) -> list[str]:
    """Refuse a checkpoint of another seed, model, data or method; returns what else was different, a line each.

    Rows a batch are those of all processes together: a run may go on with another number of them. Options that only one
    of two versions of this package has say nothing.

    Args:
        checkpoint: with the configuration of its run.
        config: of this run.
        path: of the checkpoint, for the message.
        world_size: processes of this run.
        same_version: whether the checkpoint was written by this version of the package.
        method: classes of this run's callbacks that move weights, such as Elastic Reset; the checkpoint has its own.
        another_method: such callbacks may be added, taken out or set otherwise.

    Raises:
        UserError: with what differs.
    """
    saved = checkpoint.get("config")
    if saved is None:
        return []  # of a run that the command line did not start
    either = changes(saved, config)
    changed = either if same_version else differences(saved, config)
    method = {*method, *checkpoint.get("method", ())}
    changed |= {name: values for name, values in either.items() if name.endswith(".class_path") and _of(name, method)}
    for name, (before, now) in _rows_of_a_batch(saved, config).items():
        changed.pop(name, None)
        if before * checkpoint["world_size"] != now * world_size:
            changed[name] = _Rows(before, checkpoint["world_size"]), _Rows(now, world_size)
    decisive = {
        name: values
        for name, values in changed.items()
        if name.split(".")[0] in DECISIVE and name.split(".")[-1] not in PLACES and "eval_" not in name
    }
    moved = {name: values for name, values in changed.items() if _of(name, method)}
    decisive |= {} if another_method else moved
    if decisive:
        listed = [f"{name} was {before!r} and is {now!r}" for name, (before, now) in decisive.items()]
        more = f", and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        instead = (
            " (or give --another_method=true to go on with these callbacks)" if decisive.keys() <= moved.keys() else ""
        )
        raise UserError(
            f"the checkpoint {path} is of another run: {'; '.join(listed[:SHOWN])}{more}; "
            f"resume with the configuration it was written with{instead}"
        )
    return [
        f"{name} is {now!r} here, and was {before!r} when the checkpoint was written"
        for name, (before, now) in changed.items()
        if not name.startswith("trainer.logger")
    ]


def other_machine(checkpoint: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """Lines on what rounds sums otherwise than where a checkpoint was written, so that the run that goes on is not the
    unbroken one bit for bit."""
    saved = checkpoint.get("machine", {})
    return [
        f"{name}: {now} here, and {saved[name]} when the checkpoint was written: sums are rounded otherwise, so the "
        "run goes on, but not bit for bit as the unbroken one"
        for name, now in machine.items()
        if name in saved and saved[name] != now
    ]


def check_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that holds weights alone.

    Raises:
        UserError: it has no optimizer state or no position in the data, or these are not what Lightning writes.
    """
    for name, kind in KINDS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise UserError(
                f"cannot resume from {path}: its {name} is a {type(checkpoint[name]).__name__}, where a checkpoint of "
                f"Lightning holds a {kind.__name__}; was it written by another program?"
            )
    missing = [name for name in ("optimizer_states", "lr_schedulers", "loops") if name not in checkpoint]
    if missing:
        raise UserError(
            f"cannot resume from {path}: it holds no {missing[0]} (by a ModelCheckpoint of weights only?); start "
            "a new run from its weights"
        )


def check_loggers(loggers: list[Logger]) -> None:
    """Refuse to resume with a logger that would lose what was logged.

    Raises:
        UserError: a CSVLogger's file is there, which Lightning begins anew.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger) and (file := Path(logger.log_dir) / "metrics.csv").exists():
            raise UserError(
                f"a CSVLogger begins its file anew, and {file} would be lost: give it another version, or leave it out"
            )


def check_fixed_folder(logger: Any) -> None:
    """Refuse to resume where the configuration leaves it to the logger to number the run's folder.

    Raises:
        UserError: the logger has no version.
    """
    settings = logger[0] if isinstance(logger, list) and logger else logger
    if settings is False:
        return
    if settings in (None, True) or settings.get("init_args", {}).get("version") is None:
        raise UserError(
            "cannot resume: without trainer.logger.init_args.version each start gets a folder of its own; "
            "name the run's, e.g. --trainer.logger.init_args.version=seed_1"
        )


def resume_line(argv: list[str]) -> str:
    """The command that goes on with what `argv` started."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument == "--ckpt_path":
            next(rest, None)
        elif not argument.startswith("--ckpt_path=") and argument != "--force":
            kept.append(argument)
    return shlex.join(["elastic-lightning", *kept, "--ckpt_path=last"])


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict of dotted names; items of a list go by their class or their index."""
    if hasattr(values, "as_dict"):
        values = values.as_dict()
    if isinstance(values, dict):
        named = values.items()
    elif isinstance(values, (list, tuple)) and any(isinstance(value, dict) for value in values):
        kinds = [_short_class(value) for value in values]
        named = [
            (kind if kind and kinds.count(kind) == 1 else f"{kind}{index}", value)
            for index, (kind, value) in enumerate(zip(kinds, values, strict=True))
        ]
    else:
        return {prefix: list(values) if isinstance(values, tuple) else values}
    parts = (flat(value, f"{prefix}.{name}" if prefix else str(name)) for name, value in named)
    return {name: value for part in parts for name, value in part.items()}


def checkpoint_for(command: str, ckpt_path: str | None, trainer: Trainer, configs: list[Path]) -> Path | None:
    """The file that `ckpt_path` means; None for the start.

    A run that saved nothing begins, where it is to go on from its last checkpoint. What only measures, in a run's
    folder or with the config.yaml that lies there, measures that run's last checkpoint.

    Args:
        command: fit, validate, test or predict.
        ckpt_path: a file, ``last``, ``none`` for the start, or nothing.
        trainer: its folder is the run's.
        configs: the configuration files that were given.

    Raises:
        UserError: there is no such file, or it is not clear which is meant.
    """
    folder = trainer.log_dir  # asked on every rank, for the first one tells the others
    if ckpt_path == "none" or (ckpt_path is None and command == "fit"):
        return None
    if ckpt_path is None:
        return _measured(folder, configs)
    if ckpt_path != "last":
        return Path(ckpt_path)
    if not folder:
        raise UserError(f"{command} --ckpt_path last needs a run folder: give the trainer a logger")
    nothing = newest(folder) is None and (ended_unsaved(Path(folder)) or not named(Path(folder), RUN_FILES))
    if command == "fit" and nothing:
        if trainer.is_global_zero:
            print(f"note: no checkpoint in {folder} yet: the run begins", flush=True)
        return None
    return last_checkpoint(folder)


def _measured(folder: str | None, configs: list[Path]) -> Path | None:
    """The last checkpoint of the run in `folder`, or beside its configuration file; None where there is no run."""
    places = [file.parent for file in configs if file.name == "config.yaml"] + ([Path(folder)] if folder else [])
    places = list({place.resolve(): place for place in places}.values())
    found = {place: path for place in places if (path := newest(place))}
    if len(found) > 1:
        raise UserError(f"which of these runs is meant: {' or '.join(map(str, found))}? Name a checkpoint: --ckpt_path")
    if not found:
        run = next((place for place in places if set(named(place, RUN_FILES)) - {place / "config.yaml"}), None)
        if run is not None:
            raise UserError(f"{run} holds a run and no checkpoint of it; --ckpt_path none measures the start")
        return None
    return next(iter(found.values()))


def _of(name: str, method: Collection[str]) -> bool:
    """Whether a setting is one of a callback of these classes, and says what the callback does to the weights."""
    trainer, callbacks, kind, *rest = [*name.split("."), "", ""]
    return (
        (trainer, callbacks) == ("trainer", "callbacks")
        and (kind in method or kind.rstrip("0123456789") in method)
        and not set(rest) & set(HARMLESS)
    )


def _rows_of_a_batch(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows or tokens of a training batch on one process, by the names of the data's settings, then and now."""
    before, now = flat({"data": saved.get("data")}), flat({"data": given.get("data")})
    names = [name for name in before.keys() & now.keys() if name.split(".")[-1] in ("batch_size", "batch_tokens")]
    return {name: (before[name], now[name]) for name in names if None not in (before[name], now[name])}


class _Rows(NamedTuple):
    """Rows of a batch on each of so many processes."""

    rows: int
    processes: int

    def __repr__(self) -> str:
        return str(self.rows) if self.processes == 1 else f"{self.rows} on each of {self.processes} processes"


def _short_class(value: Any) -> str:
    return value.get("class_path", "").rsplit(".", 1)[-1] if isinstance(value, dict) else ""
