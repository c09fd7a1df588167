"""A pipeline file, read and checked whole before anything runs: every mistake in it is one `UserError`.

    output: tb_logs/toy                # default of --output
    data: null                         # default of --data, the folder that {data} stands for
    model: null                        # default of --model, the folder or hub id that {model} stands for
    jobs: 2                            # runs at once, each with cores // jobs threads
    stages:
      language_model:
        command: fit                   # any subcommand of elastic-lightning
        config: language_model.yaml    # relative to this file; a list overlays
        arguments: []                  # added to the command line as they are
        set: {trainer.max_epochs: 2}   # added as --trainer.max_epochs=2
        needs: [tokenizer]             # stages that must be complete before
        seeds: [1]                     # one run a seed
        produces: ["{run}/final"]      # complete when these exist
        report: true                   # the closing report is over such stages, or over all that log the reward
    report: {reward: val/reward, drift: val/kl}

`arguments`, `set` and `produces` may hold {output}, {data}, {model}, {seed} and {run}, the last of which is
{output}/<stage>/seed_<seed>.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from elastic_lightning.bounded_yaml import check_bounds
from elastic_lightning.errors import UserError

SCALARS = (str, int, float)
FILE_KEYS = {"output": str, "data": str, "model": str, "jobs": int, "stages": dict, "report": dict}
REPORT_KEYS = {"reward": str, "drift": str}
STAGE_KEYS = {
    "command": str,
    "config": (str, list),
    "arguments": list,
    "set": dict,
    "needs": (str, list),
    "seeds": list,
    "produces": (str, list),
    "report": bool,
}
LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
PLACEHOLDERS = ("output", "data", "model", "run", "seed")


class Run(NamedTuple):
    """One stage with one seed, ready to start.

    `arguments` follow the program's name, `needs` are names of runs, and `reads` the folders of other pipelines' runs.
    """

    stage: str
    seed: int
    folder: Path
    arguments: list[str]
    produces: list[Path]
    needs: list[str]
    reads: list[Path]
    fingerprint: str
    report: bool

    @property
    def name(self) -> str:
        return f"{self.stage}/seed_{self.seed}"


class Pipeline(NamedTuple):
    """The runs by name, every one after those it needs; `report` holds the tags of the closing report."""

    output: Path
    jobs: int
    runs: dict[str, Run]
    report: dict[str, str]


def read_pipeline(
    file: Path,
    data: Path | None = None,
    output: Path | None = None,
    jobs: int | None = None,
    model: str | None = None,
) -> Pipeline:
    """The pipeline in a YAML file; arguments that are given win over the file.

    Raises:
        UserError: anything at all is wrong in the file, or a folder or configuration file it names is missing.
    """
    content = read_yaml(file)
    check(content, FILE_KEYS, str(file))
    content = {key: value for key, value in content.items() if value is not None}
    check(content.get("report", {}), REPORT_KEYS, f"{file}: report")
    output = output or Path(content.get("output") or missing(f"{file}: no 'output': set it there or give --output"))
    if output.exists() and not output.is_dir():
        raise UserError(f"{file}: output is a folder to write, and {output} is a file")
    data = data or (Path(content["data"]) if "data" in content else None)
    if data is not None and not data.is_dir():
        raise UserError(f"--data: no such folder: {data}")
    inputs = {"data": data, "model": model or content.get("model")}
    jobs = jobs if jobs is not None else content.get("jobs", 1)
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {jobs}")
    stages = content.get("stages") or missing(f"{file}: no stages: add at least one under 'stages'")
    for name, stage in stages.items():
        check_stage(name, stage, stages, f"{file}: stage {name!r}")
    runs: dict[str, Run] = {}
    for name in in_order(stages, file):
        runs |= {run.name: run for run in stage_runs(name, stages, file, output, inputs)}
    return Pipeline(output, jobs, runs, content.get("report", {}))


# ---- the file -------------------------------------------------------------------------------------------------------


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, which PyYAML would take for its last value. Merge keys (``<<``) work."""

    def construct_mapping(self, node, deep=False):
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        seen = set()
        for key in (key for key in keys if isinstance(key, Hashable)):
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """The content of a YAML file, as plain Python."""
    if not file.is_file():
        raise UserError(f"no such pipeline file: {file}")
    try:
        text = file.read_text(encoding="utf-8")
        check_bounds(text)
        return yaml.load(text, UniqueKeys)  # a SafeLoader
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: this is not UTF-8; convert the file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error


def missing(message: str):
    """Raise; made to stand behind an `or`."""
    raise UserError(message)


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' or, if nothing is near, the list of what is known."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"


def check(content: Any, keys: dict[str, Any], where: str) -> None:
    """Is it a mapping with these keys and types? None stands for "not given"."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping of {', '.join(keys)}")
    for key, value in content.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, keys)}")
        kinds = keys[key] if isinstance(keys[key], tuple) else (keys[key],)
        # Python takes true for an int; a YAML author does not.
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise UserError(f"{where}: {key} must be {' or '.join(kind.__name__ for kind in kinds)}, not {value!r}")


def check_stage(name: Any, stage: Any, stages: dict, where: str) -> None:
    """One stage's name, keys, lists and upstream names."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name == "report":
        raise UserError(f"{where}: a stage is named by letters, digits, '_', '-' and '.', and not 'report'")
    check(stage, STAGE_KEYS, where)
    if not stage.get("command"):
        raise UserError(f"{where}: no 'command': name a subcommand such as fit")
    if stage["command"] == "pipeline":
        raise UserError(f"{where}: a stage cannot be a pipeline: name that one's stages here")
    for key in ("config", "needs", "produces"):
        if not all(isinstance(item, str) for item in listed(stage, key)):
            raise UserError(f"{where}: {key} must hold strings only, not {stage[key]!r}")
    if not all(isinstance(item, SCALARS) for item in listed(stage, "arguments")):
        raise UserError(f"{where}: arguments must be strings or numbers, not {stage['arguments']!r}")
    if not all(isinstance(key, str) for key in stage.get("set") or {}):
        raise UserError(f"{where}: the keys of set must be strings")
    seeds = listed(stage, "seeds", [1])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds must be different whole numbers, at least one, not {seeds!r}")
    for need in listed(stage, "needs"):
        if need not in stages:
            raise UserError(f"{where}: needs an unknown stage {need!r}{nearest(need, stages)}")


def listed(stage: dict, key: str, default: list | None = None) -> list:
    """The value of a key as a list; a lone string is a list of one."""
    value = stage.get(key)
    if value is None:
        return default or []
    return [value] if isinstance(value, str) else value


def in_order(stages: dict, file: Path) -> list[str]:
    """Stage names, each after what it needs; else as in the file."""
    try:
        return list(TopologicalSorter({name: listed(stage, "needs") for name, stage in stages.items()}).static_order())
    except CycleError as error:
        raise UserError(f"{file}: stages need each other in a circle: {' -> '.join(error.args[1])}") from error


# ---- from a stage to its runs ---------------------------------------------------------------------------------------


def stage_runs(name: str, stages: dict, file: Path, output: Path, inputs: dict[str, Any]) -> list[Run]:
    """The runs of a stage, one a seed, with every placeholder filled in; `inputs` holds data and model."""
    stage, where = stages[name], f"{file}: stage {name!r}"
    needs = [f"{need}/seed_{seed}" for need in listed(stage, "needs") for seed in listed(stages[need], "seeds", [1])]
    configs = [file.parent / config for config in listed(stage, "config")]
    for config in configs:
        if not config.is_file():
            raise UserError(f"{where}: no such config file: {config}")
    runs = []
    for seed in listed(stage, "seeds", [1]):
        folder = output / name / f"seed_{seed}"
        values = {"output": output, **inputs, "run": folder, "seed": seed}
        arguments = command_line(fill(stage, values, where), configs, output, name, seed)
        runs.append(
            Run(
                stage=name,
                seed=seed,
                folder=folder,
                arguments=arguments,
                produces=[Path(path) for path in fill(listed(stage, "produces", ["{run}/final"]), values, where)],
                needs=needs,
                reads=read_folders(arguments, output, stages),
                fingerprint=fingerprint(stage, configs, seed, inputs),
                report=bool(stage.get("report")),
            )
        )
    return runs


def read_folders(arguments: list[str], output: Path, stages: dict) -> list[Path]:
    """Folders of runs below `output` that arguments name and no stage of this file writes."""
    pattern = re.compile(re.escape(str(output)) + r"/(\w[\w.-]*)/seed_\d+")
    found = [match for argument in arguments for match in pattern.finditer(argument)]
    return [Path(match[0]) for match in found if match[1] not in stages]


def fill(value: Any, values: dict[str, Any], where: str) -> Any:
    """Replace {name} in every string of a nested value; other braces, as in JSON, stay."""

    def replace(match: re.Match) -> str:
        name = match[1]
        if name not in PLACEHOLDERS:
            raise UserError(f"{where}: unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}")
        if values[name] is None:
            raise UserError(f"{where} reads {{{name}}}: give the folder with --{name} DIR")
        return str(values[name])

    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", replace, value)
    if isinstance(value, list):
        return [fill(item, values, where) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, values, where) for key, item in value.items()}
    return value


def command_line(stage: dict, configs: list[Path], output: Path, name: str, seed: int) -> list[str]:
    """What follows `elastic-lightning`: the subcommand, its configs, seed and run folder, `set`, `arguments`."""
    line = [stage["command"], *(f"--config={config}" for config in configs)]
    line += run_flags(output, name, seed) if stage["command"] in LIGHTNING_COMMANDS else []
    line += [f"--{key}={flag(value)}" for key, value in (stage.get("set") or {}).items()]
    return line + [flag(argument) for argument in listed(stage, "arguments")]


def run_flags(output: Path, name: str, seed: int) -> list[str]:
    """Seed and run folder of a command that LightningCLI runs."""
    logger = {"save_dir": output, "name": name, "version": f"seed_{seed}"}
    return [
        f"--seed_everything={seed}",
        "--trainer.logger=TensorBoardLogger",
        *(f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()),
    ]


def flag(value: Any) -> str:
    """A value as jsonargparse reads it: strings as they are, everything else as YAML on one line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).removesuffix("\n").removesuffix("\n...")


def fingerprint(stage: dict, configs: list[Path], seed: int, inputs: dict[str, Any]) -> str:
    """Changes with everything that decides a run's result; not with {output}, so that a folder of runs may move, nor
    with how a configuration is written: comments, quotes, empty lines."""
    recipe = {key: stage.get(key) for key in ("command", "arguments", "set")}
    text = json.dumps(recipe, sort_keys=True, default=str)
    where = [str(value).encode() for name, value in inputs.items() if f"{{{name}}}" in text]
    contents = [repr(read_yaml(config)).encode() for config in configs]  # in their order, which flags go by
    parts = [text.encode(), *where, str(seed).encode(), *contents]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
