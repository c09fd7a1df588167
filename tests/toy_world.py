"""A finished toy stage 0 (tokenizer, untrained policy, untrained reward model) and the command line of a run on it."""

from pathlib import Path

import pytest
import torch

from elastic_lightning.data.toy_grammar import review_grammar, toy_tokenizer
from elastic_lightning.policies import ModelSource, load_source
from elastic_lightning.policies.loading import from_architecture

POLICY = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 128}
CLASSIFIER = {
    "model_type": "bert",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}


def make_toy(folder: Path) -> Path:
    """Write tokenizer/, policy/ and reward/ into the folder."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = toy_tokenizer(review_grammar().words)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    source = ModelSource(architecture=POLICY, tokenizer=str(folder / "tokenizer"))
    policy = load_source(source)
    policy.model.save_pretrained(folder / "policy")
    policy.tokenizer.save_pretrained(folder / "policy")
    source = ModelSource(architecture=CLASSIFIER, tokenizer=str(folder / "tokenizer"))
    labels = {"num_labels": 2, "id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    from_architecture(AutoModelForSequenceClassification, source, tokenizer, **labels).save_pretrained(
        folder / "reward"
    )
    tokenizer.save_pretrained(folder / "reward")
    return folder


def fit_arguments(
    toy: Path, root: Path, config: str = "configs/toy/elastic_reset.yaml", command: str = "fit", version: str = "seed_1"
) -> list[str]:
    """A short run with a toy method's configuration file, in ``<root>/run/<version>``."""
    return [
        command,
        f"--config={config}",
        f"--model.init_args.policy.path={toy}/policy",
        f"--model.init_args.reward.init_args.path={toy}/reward",
        "--model.init_args.sampling.max_new_tokens=6",
        "--data.init_args.train_texts=40",
        "--data.init_args.batch_size=8",
        "--data.init_args.eval_prompts=8",
        "--data.init_args.eval_texts=8",
        "--trainer.limit_train_batches=4",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={root}",
        "--trainer.logger.init_args.name=run",
        f"--trainer.logger.init_args.version={version}",
        "--trainer.enable_model_summary=false",
    ]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder with tokenizer/, policy/ and reward/."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def toy_fit(toy, tmp_path):
    """Arguments of a short `fit` with a toy method's configuration file, in a folder of its own."""

    def arguments(config="configs/toy/elastic_reset.yaml", command="fit", version="seed_1"):
        return fit_arguments(toy, tmp_path, config, command, version)

    return arguments
