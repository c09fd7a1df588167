"""LightningCLI as this project uses it."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from elastic_lightning import __version__, algorithms, callbacks, data, rewards
from elastic_lightning.bounded_yaml import bound_command_lines
from elastic_lightning.callbacks import BatchCheckpoint, Preemption, ResponseWriter, RunProgress
from elastic_lightning.callbacks.preemption import Preempted
from elastic_lightning.callbacks.run_config import RunConfig, machine_of, method_of, replaced_callbacks
from elastic_lightning.callbacks.run_log import logged_in
from elastic_lightning.endings import end_launched, restoring
from elastic_lightning.errors import UserError
from elastic_lightning.locks import locked
from elastic_lightning.mistakes import CALLBACK_FIELDS, as_line, foreign_errors_as_lines, foreign_line
from elastic_lightning.outputs import UNSAVED, check_absent, check_writable, write_whole
from elastic_lightning.policies.checkpoints import read_checkpoint
from elastic_lightning.processes import child_environment
from elastic_lightning.resume import (
    check_fixed_folder,
    check_loggers,
    check_same_run,
    check_whole,
    checkpoint_for,
    differences,
    other_machine,
    resume_line,
)
from elastic_lightning.run_folder import RunFolder, SaveConfig, begin, leave_nothing, what_is_lost
from elastic_lightning.signals import Interrupted, working
from elastic_lightning.terminal import plain

PACKAGES = (algorithms, callbacks, data, rewards)  # imported so that their classes are known by their short names
NOT_ZERO = ("max_epochs", "max_steps", "limit_train_batches", "val_check_interval", "check_val_every_n_epoch")
LAST_WORDS = 60.0  # seconds in which launched processes end when this one is through
PARTS = ("model", "data", "trainer")  # of a configuration, which a checkpoint keeps


class ElasticCLI(LightningCLI):
    """fit, validate, test and predict over any of our modules.

    Other than LightningCLI: no abbreviated flags; nothing is written over an earlier run; what is given on the command
    line or in a file wins over a checkpoint's hyper-parameters (differences are printed, and a run does not resume with
    another seed, model or data). Every run can be resumed: a `BatchCheckpoint` is added where none is configured, and a
    `Preemption` beside it.
    """

    def __init__(self, args: ArgsType = None) -> None:
        self.argv = list(sys.argv[1:] if args is None else args)
        self.run_config = RunConfig(__version__)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},  # a folder that is not resumed holds no run, see `fit`
            trainer_defaults={"use_distributed_sampler": False, "log_every_n_steps": 1},
            seed_everything_default=1,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--force",
            action="store_true",
            help="write where something stands: fit moves another run aside, predict and test replace their file",
        )
        parser.add_argument(
            "--another_method",
            type=bool,
            default=False,
            help="resume although a callback that moves weights (Elastic Reset and its relatives) was added, taken out "
            "or set otherwise",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        check_callback_fields(self.argv)
        self.config = parser.parse_args(args)  # without Lightning's warning that sys.argv is there too
        settings = self.config[self.config["subcommand"]]
        callbacks = settings.trainer.callbacks or []
        if not isinstance(callbacks, list):  # one of them, given without a list
            callbacks = settings.trainer.callbacks = [callbacks]
        files = [Path(str(file)) for file in settings.get("config") or [] if hasattr(file, "absolute")]
        for line in replaced_callbacks(files, callbacks):
            rank_zero_only(print)(plain(f"note: {line}"), flush=True)
        seed = settings.get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything must be from 0 to {2**32 - 1}, got {seed}")

    def _parse_ckpt_path(self) -> None:
        """Lightning lets the checkpoint's hyper-parameters win over explicit ones; here they are only compared."""
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path and path not in ("none", "last", "best", "hpc"):
            read_checkpoint(path)  # before models are loaded

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        given = arguments.get("ckpt_path")
        if given not in (None, "none") and subcommand == "fit":
            check_fixed_folder(self._get(self.config_dump, "trainer").get("logger"))
        if given not in ("best", "hpc"):
            files = [Path(str(file)) for file in self._get(self.config, "config") or []]
            path = arguments["ckpt_path"] = checkpoint_for(subcommand, given, self.trainer, files)
            if path is not None and subcommand != "fit":
                self._say_what_is_measured(path, given is None)
        arguments["weights_only"] = True  # never run code from a checkpoint
        return arguments

    def _say_what_is_measured(self, path: Path, chosen: bool) -> None:
        lines = [f"measuring {path} (--ckpt_path none for the start)"] if chosen else []
        self._say([*lines, *self._changed(read_checkpoint(path))])

    def _say(self, lines: list[str]) -> None:
        if self.trainer.is_global_zero:
            print("".join(f"{plain(line)}\n" for line in lines), end="", flush=True)

    def _changed(self, checkpoint: dict[str, Any]) -> list[str]:
        """Hyper-parameters that are not those that a checkpoint was written with, a line each."""
        given = self.config_dump["model"].get("init_args", {})
        changed = differences(checkpoint.get("hyper_parameters", {}), given).items()
        return [
            f"note: {name} is {now!r} here, and was {before!r} when the checkpoint was written"
            for name, (before, now) in changed
        ]

    def after_instantiate_classes(self) -> None:
        """Keep all of the model's configuration in its checkpoints, also what stands for objects such as the reward:
        `load_from_checkpoint` then builds the whole module."""
        self._dump_config()
        self.model.hparams.update(self.config_dump["model"].get("init_args", {}))
        self.run_config.config = {name: self.config_dump.get(name) for name in ("seed_everything", *PARTS)}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        callbacks = self._get(self.config_init, "trainer").get("callbacks") or []
        extra = [ResponseWriter(), self.run_config]
        for writer in [callback for callback in (*callbacks, *extra) if isinstance(callback, ResponseWriter)]:
            writer.replace |= self._get(self.config, "force")
        if self._get(self.config_init, "trainer").get("enable_progress_bar") is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            extra.append(RunProgress())
        if self.subcommand == "fit" and self._get(self.config_init, "trainer").get("enable_checkpointing") is not False:
            extra += _saving(callbacks)
        if not any(isinstance(callback, Checkpoint) for callback in (*callbacks, *extra)):
            kwargs.setdefault("enable_checkpointing", False)  # no ModelCheckpoint of Lightning's
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": extra}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ModuleNotFoundError as error:
            raise UserError(f"the trainer needs a package that is not here: {' '.join(str(error).split())}") from error
        if trainer.log_dir:
            check_writable(Path(trainer.log_dir), "the run")
        if self.subcommand != "fit":
            own = (TensorBoardLogger, CSVLogger)
            trainer.loggers = [RunFolder(log.log_dir) if isinstance(log, own) else log for log in trainer.loggers]
        return trainer

    def instantiate_classes(self) -> None:
        with foreign_errors_as_lines():
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        launcher = self.trainer.strategy.launcher
        launches = isinstance(launcher, _SubprocessScriptLauncher)
        if launches:  # these processes end with this one, which lets them come to their end
            os.environ.update(child_environment())
            atexit.register(lambda: end_launched(launcher.procs, LAST_WORDS))
        try:
            lines = foreign_errors_as_lines(lambda: self.trainer.global_step == 0)
            with working(), self._one_writer(subcommand), lines:
                super()._run_subcommand(subcommand)
        except BaseException as error:
            if launches:  # Lightning ends the others on Ctrl-C alone
                atexit.register(lambda: end_launched(launcher.procs))  # when this process has said why
            if isinstance(error, Exception) and as_line(error, []) is None and restoring(error):
                raise UserError(
                    f"cannot go on from the checkpoint {self.trainer.ckpt_path}: it is not built as those that are "
                    f"written here ({foreign_line(error)})"
                ) from error
            raise

    @contextmanager
    def _one_writer(self, subcommand: str) -> Iterator[None]:
        """Let nobody else train in the run's folder; the first rank holds it for all."""
        trainer = self.trainer
        folder = Path(trainer.log_dir) if trainer.log_dir and not trainer.fast_dev_run else None
        self.made = [path for path in (folder, *folder.parents) if not path.exists()] if folder else []
        held = subcommand == "fit" and folder and trainer.is_global_zero
        with locked(folder, "elastic-lightning fit") if held else nullcontext():
            yield

    def fit(self, **arguments: Any) -> None:
        trainer = self.trainer
        zero = next((name for name in NOT_ZERO if getattr(trainer, name) == 0), None)
        if zero is not None:
            raise UserError(f"trainer.{zero} must not be 0")
        folder = Path(trainer.log_dir) if trainer.log_dir and not trainer.fast_dev_run else None
        path = arguments.get("ckpt_path")
        first = trainer.is_global_zero  # which may have begun to write when another rank comes here
        own = path is not None and self._check_resume(path, folder)
        if first and folder and not own:
            saves = any(isinstance(callback, BatchCheckpoint) for callback in trainer.callbacks)
            self._say(begin(folder, self._get(self.config, "force"), saves))
        try:
            self.trainer.fit(**arguments)
            if first and folder and trainer.global_step > 0:  # of another run's end none is saved here
                (folder / UNSAVED).unlink(missing_ok=True)
        except Preempted as stop:
            if first:
                print(f"{stop}\nresume with: {resume_line(self.argv)}", flush=True)
        except BaseException as error:
            if first and folder and not own and trainer.global_step == 0:
                leave_nothing(trainer, folder, self.made)
            elif first and folder and isinstance(error, Exception) and not folder.is_dir():
                # Whoever wrote first met it: a checkpoint, or a logger, whose own message says nothing of it.
                raise UserError(f"the run's folder is gone: {folder}/checkpoints and all beside it") from error
            if isinstance(error, Interrupted):
                error.text = what_is_lost(error, folder, trainer.global_step > 0, self.argv) if first else ""
            if isinstance(error, SIGTERMException) and trainer.global_step == 0:  # later ones are for `Preemption`
                raise UserError("stopped by SIGTERM before a batch was trained: nothing was saved") from None
            raise

    def _check_resume(self, path: Path, folder: Path | None) -> bool:
        """Refuse a checkpoint that the run cannot go on from, and say what of its settings is different.

        Returns:
            Whether it is of the run in this folder: it lies there, or what it says was logged does.
        """
        trainer, checkpoint = self.trainer, read_checkpoint(path)
        check_whole(checkpoint, path)
        check_loggers(trainer.loggers)
        same_version = checkpoint.get("elastic_lightning_version") == __version__
        allowed = self._get(self.config, "another_method")
        run = self.run_config.config, path, trainer.world_size, same_version, method_of(trainer), allowed
        notes = [f"note: {note}" for note in check_same_run(checkpoint, *run)]
        notes += [f"note: {note}" for note in other_machine(checkpoint, machine_of(trainer))]
        notes += [] if "config" in checkpoint else self._changed(checkpoint)  # else all of it is compared
        self.run_config.resumed_from = path
        self._say(notes)
        inside = folder is not None and folder.resolve() in path.resolve().parents
        return inside or (folder is not None and logged_in(folder, checkpoint.get("run_log", {})))

    def before_test(self) -> None:
        folder = self.trainer.log_dir  # asked for on every rank: the first one tells the others
        if self.trainer.is_global_zero and folder:
            check_absent(Path(folder) / "test.json", self._get(self.config, "force"))

    def after_test(self) -> None:
        values = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        folder = self.trainer.log_dir  # asked for on every rank: the first one tells the others
        if self.trainer.is_global_zero and folder:
            path = Path(folder) / "test.json"
            write_whole(path, json.dumps(values, indent=2) + "\n")
            print(f"wrote {plain(path)}")


def run_lightning(argv: list[str]) -> None:
    """Parse, build and run one of LightningCLI's commands.

    Raises:
        UserError: the run folder is taken, or a checkpoint does not fit.
        jsonargparse.ArgumentError: the configuration is wrong.
    """
    bound_command_lines()
    ElasticCLI(args=argv)


def check_callback_fields(argv: list[str]) -> None:
    """Refuse ``--trainer.callbacks.FIELD`` where no callback was given before it: it would be of the last one that a
    configuration file happens to have."""
    for index, argument in enumerate(argv):
        given = any(earlier.startswith(("--trainer.callbacks+", "--trainer.callbacks=")) for earlier in argv[:index])
        if argument.startswith("--trainer.callbacks.") and not given and "--trainer.callbacks" not in argv[:index]:
            raise UserError(f"{plain(argument.split('=')[0])}: of which callback?{CALLBACK_FIELDS}")


def _saving(callbacks: list[Callback]) -> list[Callback]:
    """What a run that can be resumed has beside the callbacks that are configured."""
    added: list[Callback] = []
    if not any(isinstance(callback, BatchCheckpoint) for callback in callbacks):
        added.append(BatchCheckpoint())
    if not any(isinstance(callback, Preemption) for callback in callbacks):
        added.append(Preemption())
    return added
