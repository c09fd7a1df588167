"""Every file under configs/ parses; those that need no hub run."""

from pathlib import Path

import pytest
import yaml

from elastic_lightning.cli import main
from elastic_lightning.data import ToyTranslationDataModule
from elastic_lightning.evaluation import evaluate
from elastic_lightning.evaluation.stages import read_pipeline
from elastic_lightning.lightning_cli import ElasticCLI
from elastic_lightning.policies import ModelSource, load_policy

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
EVALUATIONS = [path for path in FILES if path.name == "evaluation.yaml"]
METHODS = [
    path
    for path in FILES
    if path.name not in ("pipeline.yaml", "humaneval.yaml", "evaluation.yaml", "eight_gpus.yaml")
    and path.parts[1] != "trainer"
]
GAMES = ("policy_gradient", "frozen", "kl", "s2p", "sil", "elastic_reset")
OVERLAYS = [path for path in FILES if path.parts[1] == "trainer"]
SEVERAL_GPUS = Path("configs/stack_exchange/llama-7b/eight_gpus.yaml")  # an overlay over the methods beside it
PIPELINES = [path for path in FILES if path.name in ("pipeline.yaml", "humaneval.yaml")]


class Parsed(Exception):
    """Carries a configuration out of a command line that stops before it builds anything."""


class ParseOnly(ElasticCLI):
    def before_instantiate_classes(self):
        raise Parsed(self.config[self.config.subcommand])


def parse(*arguments, command="fit"):
    """The configuration of a command, parsed and checked."""
    with pytest.raises(Parsed) as parsed:
        ParseOnly(args=[command, *map(str, arguments)])
    (config,) = parsed.value.args
    return config


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_a_method_parses(path):
    parse("--config", path)


@pytest.mark.parametrize("path", METHODS, ids=str)
def test_a_method_saves_often_enough_to_be_resumed(path):
    trainer = yaml.safe_load(path.read_text())["trainer"]
    every = [c["init_args"]["every"] for c in trainer["callbacks"] if c["class_path"] == "BatchCheckpoint"] or [50]
    batches = [trainer[limit] for limit in ("limit_train_batches", "max_steps") if limit in trainer]
    assert not batches or every[0] * 3 <= batches[0]


@pytest.mark.parametrize("path", OVERLAYS, ids=str)
def test_an_overlay_parses_over_a_method(path):
    parse("--config", METHODS[0], "--config", path)


def test_eight_gpus_share_the_batch_of_one():
    whole = parse("--config", SEVERAL_GPUS.with_name("ppo.yaml"))
    shared = parse("--config", SEVERAL_GPUS.with_name("ppo.yaml"), "--config", SEVERAL_GPUS)
    assert shared.data.init_args.batch_size * shared.trainer.devices == whole.data.init_args.batch_size == 16


@pytest.mark.parametrize("path", EVALUATIONS, ids=str)
def test_an_evaluation_parses(path):
    given = evaluate.make_parser().parse_args(["--config", str(path), "--model=MODEL"])
    assert given.texts.path and given.questions.path and given.reward.class_path


@pytest.mark.parametrize("path", PIPELINES, ids=str)
def test_a_pipeline_is_sound(path, tmp_path):
    pipeline = read_pipeline(path, data=tmp_path, output=tmp_path)
    for run in pipeline.runs.values():
        command, *arguments = run.arguments
        if command in ("fit", "test"):
            init = parse(*arguments, command=command).model.init_args
            source = init.get("policy") or init.get("classifier") or init["sender"]
            ModelSource(**{field: source[field] for field in ("path", "architecture", "tokenizer")})
        elif command == "evaluate":
            given = evaluate.make_parser().parse_args(arguments)
            assert given.allow_code_execution == (path.name == "humaneval.yaml")


def test_the_saved_config_parses_again(toy_fit, tmp_path):
    assert main([*toy_fit(), "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]) == 0
    parse("--config", tmp_path / "run" / "seed_1" / "config.yaml")


@pytest.mark.parametrize("stage", ["language_model", "reward_model"])
def test_a_toy_supervised_stage_runs(stage, toy, tmp_path):
    source = {"language_model": "policy", "reward_model": "classifier"}[stage]
    arguments = [
        "fit",
        f"--config=configs/toy/{stage}.yaml",
        f"--model.init_args.{source}.tokenizer={toy}/tokenizer",
        "--data.init_args.train_texts=300",
        "--data.init_args.batch_size=32",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=3",
        "--trainer.limit_val_batches=1",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    assert main(arguments) == 0
    assert (tmp_path / stage / "seed_1" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["ppo", "ppo_kl", "elastic_reset"])
def test_a_toy_method_runs(method, toy_fit, tmp_path):
    assert main([*toy_fit(f"configs/toy/{method}.yaml"), "--trainer.fast_dev_run=true"]) == 0
    assert not (tmp_path / "run" / "seed_1" / "final").exists()


@pytest.fixture(scope="module")
def translators(tmp_path_factory):
    """Folder of random translators over the toy languages, both the same."""
    folder = tmp_path_factory.mktemp("translators")
    ToyTranslationDataModule().train_tokenizer(0).save_pretrained(folder)
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    size |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    load_policy(architecture={"model_type": "marian", **size}, tokenizer=str(folder)).model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", GAMES)
def test_a_toy_game_runs(method, translators, tmp_path):
    arguments = [
        "fit",
        f"--config=configs/translation/toy/{method}.yaml",
        f"--model.init_args.sender.path={translators}",
        f"--model.init_args.receiver.path={translators}",
        "--data.init_args.train_pairs=200",
        "--data.init_args.batch_size=8",
        "--data.init_args.eval_pairs=8",
        "--trainer.fast_dev_run=2",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    assert main(arguments) == 0


@pytest.mark.parametrize("name", ["sender", "receiver"])
def test_a_toy_translator_is_pretrained(name, translators, tmp_path):
    arguments = [
        "fit",
        f"--config=configs/translation/toy/{name}.yaml",
        f"--model.init_args.policy.tokenizer={translators}",
        "--data.init_args.train_pairs=300",
        "--data.init_args.eval_pairs=8",
        "--trainer.max_epochs=1",
        "--trainer.check_val_every_n_epoch=1",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    assert main(arguments) == 0
    assert (tmp_path / name / "seed_1" / "final" / "model.safetensors").exists()


def test_configs_of_the_games_have_the_same_names():
    for task in ("toy", "scratch"):
        names = {path.stem for path in (ROOT / "configs" / "translation" / task).glob("*.yaml")}
        assert names - {"english"} == {*GAMES, "sender", "receiver", "pipeline"}


def test_games_differ_in_their_method_alone():
    """The comparison is fair: same data, sampling, learning rates and steps."""
    for task in ("toy", "scratch"):
        found = []
        for method in GAMES:
            config = yaml.safe_load((ROOT / "configs" / "translation" / task / f"{method}.yaml").read_text())
            for option in ("kl_penalty", "kl_coefficient"):
                config["model"]["init_args"]["ppo"].pop(option, None)
            for option in ("freeze_sender", "supervised_weight"):
                config["model"]["init_args"].pop(option, None)
            for option in ("fr_en", "en_de"):
                config["data"]["init_args"].pop(option, None)
            config["trainer"]["logger"]["init_args"].pop("name")
            method_callbacks = ("ElasticReset", "IteratedLearning")
            callbacks = config["trainer"]["callbacks"]
            config["trainer"]["callbacks"] = [c for c in callbacks if c["class_path"] not in method_callbacks]
            found.append(config)
        assert all(config == found[0] for config in found)


def test_configs_of_a_task_have_the_same_names():
    for task in ("toy", "imdb", "imdb/scratch"):
        names = {path.name for path in (ROOT / "configs" / task).glob("*.yaml")}
        expected = {"language_model", "reward_model", "ppo", "ppo_kl", "elastic_reset", "pipeline"}
        assert names == {f"{name}.yaml" for name in expected}


def test_methods_of_a_task_differ_in_their_method_alone():
    """The comparison is fair: same data, sampling, learning rates and steps."""
    for task in ("toy", "imdb", "imdb/scratch"):
        configs = [
            yaml.safe_load((ROOT / "configs" / task / f"{m}.yaml").read_text()) for m in ("ppo", "elastic_reset")
        ]
        ppo, elastic = configs
        assert ppo["model"] == elastic["model"] and ppo["data"] == elastic["data"]
        callbacks = [c for c in elastic["trainer"].pop("callbacks") if c["class_path"] != "ElasticReset"]
        assert ppo["trainer"].pop("callbacks") == callbacks
        for config in configs:
            config["trainer"]["logger"]["init_args"].pop("name")
        assert ppo["trainer"] == elastic["trainer"]
