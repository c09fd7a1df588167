"""Runs whose results must not depend on the number of processes; as a program, one process of several.

A case takes the number of rows of one rank's batch and a `Setup`, and returns what is compared, by name.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from algorithms.conftest import PAD, Recording, Toy, WordShare, save_policy, save_tokenizer
from lightning import Callback, Trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from elastic_lightning import ElasticReset
from elastic_lightning.algorithms import PPOConfig, TranslationGame, TranslationModel
from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.callbacks import IteratedLearning, SampleLogger, SavePretrained
from elastic_lightning.callbacks.weight_sets import WeightSets
from elastic_lightning.data import ToyTranslationDataModule, ToyTranslationGameDataModule
from elastic_lightning.data.module import TextDataModule
from elastic_lightning.functional import distance
from elastic_lightning.policies import ModelSource, Prompts, Sampling, load_policy
from elastic_lightning.policies.sharding import layers_of
from elastic_lightning.rewards import ClassifierReward

ROWS = 8  # of a PPO batch on all ranks
BATCHES = 3
TRANSLATOR = {"model_type": "marian", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
TRANSLATOR |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.3}
TRANSLATOR |= {"max_position_embeddings": 48, "dropout": 0.0}


@dataclass
class Setup:
    """Where the models are (see `save_models`), where runs may write, and what a trainer is given."""

    models: Path
    root: Path
    ranks: int
    trainer: Callable[[], dict[str, Any]]
    resume_from: Path | None = None
    save_to: Path | None = None


def save_models(folder: Path) -> None:
    """A policy, a classifier, a sender and a receiver."""
    (folder / "policy").mkdir(parents=True)
    save_policy(folder / "policy")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"vocab_size": save_tokenizer(folder / "classifier"), "pad_token_id": PAD}
    torch.manual_seed(3)
    config = BertConfig(**size, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder / "classifier")
    ToyTranslationDataModule().train_tokenizer(0).save_pretrained(folder / "words")
    for seed, name in enumerate(("sender", "receiver")):
        torch.manual_seed(seed)
        loaded = load_policy(architecture=TRANSLATOR, tokenizer=str(folder / "words"))
        loaded.model.save_pretrained(folder / name)
        loaded.tokenizer.save_pretrained(folder / name)


class Lists(TextDataModule):
    """Prompts of one to six tokens, BATCHES of them for training and some for validation; and 5 human texts."""

    def __init__(self, batch_size: int, eval_prompts: int) -> None:
        super().__init__(None, seed=3)
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(4)
        lengths = torch.randint(1, 7, (BATCHES * ROWS + eval_prompts,), generator=generator).tolist()
        self.rows = [torch.randint(0, 27, (length,), generator=generator) for length in lengths]
        self.texts = [torch.randint(0, 27, (5,), generator=generator) for _ in range(5)]

    def train_dataloader(self) -> DataLoader:
        return self.dataloader(self.rows[: BATCHES * ROWS], self.batch_size, True, collate)

    def val_dataloader(self) -> list[DataLoader]:
        return [
            self.dataloader(self.rows[BATCHES * ROWS :], self.batch_size // 2, False, collate),
            self.dataloader(self.texts, 2, False, torch.stack),
        ]


def collate(rows: list[torch.Tensor]) -> Prompts:
    longest = max(map(len, rows))
    padded = [torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows]
    masks = [torch.arange(longest) >= longest - len(row) for row in rows]
    return Prompts(torch.stack(padded), torch.stack(masks))


def keep_gradients(module: Any) -> dict[str, torch.Tensor]:
    """Before clipping, those of every optimizer step, by step and name."""
    gradients: dict[str, torch.Tensor] = {}
    own = module.on_before_optimizer_step

    def hook(optimizer: torch.optim.Optimizer) -> None:
        step = len({name.split(":")[0] for name in gradients})
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                gradients[f"{step}:{name}"] = whole(parameter.grad).clone()
        own(optimizer)

    module.on_before_optimizer_step = hook
    return gradients


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of one that is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(module: Any, data: Any, setup: Setup, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    """What a run of BATCHES, with a validation before and after, made of the module."""
    module.double()  # rounding in float32 would be as large as what is looked for
    gradients = keep_gradients(module)
    layers = [WholeLayers()] if isinstance(module.reference, torch.nn.Module) else []
    trainer = make_trainer(setup, callbacks + layers, **options)
    trainer.fit(module, datamodule=data, ckpt_path=setup.resume_from, weights_only=True)
    if setup.save_to is not None:
        trainer.save_checkpoint(setup.save_to)
    trainer.strategy.barrier()  # the first rank has written its files
    metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("time/")}
    elastic = callbacks[0]
    seen = getattr(module, "seen", [])
    counted = {"whole_layers": torch.tensor(layers[0].most)} if layers and setup.ranks > 1 else {}
    return counted | {
        "parameters": {n: whole(p).clone() for n, p in module.named_parameters() if p.requires_grad},
        "gradients": gradients,
        "metrics": metrics,
        "average": {name: whole(tensor) for name, tensor in elastic.ema.items()},
        "distance": distance(elastic.online, elastic.initial) if elastic.initial else torch.zeros(()),
        "samples": [batch.rollout.tokens.masked_fill(~batch.rollout.mask, PAD) for batch in seen],
        "advantages": [batch.experience.advantages for batch in seen],
        "coefficient": torch.tensor(module.kl_controller.coefficient),
        "folder": written(setup.root),
        "texts": texts(setup.root),
    }


def make_trainer(setup: Setup, callbacks: list[Any], **options: Any) -> Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults |= {"enable_checkpointing": False, "max_epochs": 1, "use_distributed_sampler": False}
    return Trainer(default_root_dir=setup.root, callbacks=callbacks, **defaults | setup.trainer() | options)


def texts(folder: Path) -> str:
    """What `SampleLogger` left behind, without rewards, which are rounded."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return "\n".join(str({name: value for name, value in row.items() if name != "reward"}) for row in rows)


class WholeLayers(Callback):
    """Counts the policy's and the reference's layers whose weights are whole while one of them runs."""

    def __init__(self) -> None:
        self.most = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        layers = [*layers_of(pl_module.actor), *layers_of(pl_module.reference)]

        def count(*args: Any) -> None:
            whole = [any(not hasattr(p, "to_local") for p in layer.parameters()) for layer in layers]
            self.most = max(self.most, sum(whole))

        for layer in layers:
            layer.register_forward_pre_hook(count)


def written(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `SavePretrained` left behind."""
    files = sorted((folder / "final").rglob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def ppo(setup: Setup, eval_prompts: int = 6, resets: WeightSets | None = None, **options: Any) -> dict[str, Any]:
    """PPO with everything that looks at more than one row, on prompts and responses of many lengths."""
    toy = Toy(setup.models / "policy")
    epochs = options.pop("max_epochs", 1)
    defaults = {"adam_eps": 1e-5, "max_grad_norm": 0.5, "whiten_rewards": True, "entropy_coefficient": 0.01}
    defaults |= {"kl_penalty": "adaptive", "kl_horizon": 100, "kl_target": 0.5, "reward": WordShare()}
    module: Recording = toy.ppo(**defaults | options)
    callbacks = [resets or ElasticReset(every=2, decay=0.9), SampleLogger(4), SavePretrained(folder=str(setup.root))]
    return run(module, Lists(ROWS // setup.ranks, eval_prompts), setup, callbacks, max_epochs=epochs)


def game(setup: Setup) -> dict[str, Any]:
    """The translation game, both players learning, with supervised pairs beside."""
    size = {"train_pairs": 64, "batch_size": 8 // setup.ranks, "eval_pairs": 8}
    pairs = {
        "fr_en": ToyTranslationDataModule(source="fr", target="en", **size),
        "en_de": ToyTranslationDataModule(source="en", target="de", **size),
    }
    limits = {"max_prompt_tokens": 40, "max_target_tokens": 40}
    sizes = {"batch_size": ROWS // setup.ranks, "eval_batch_size": 6 // setup.ranks, "eval_pairs": 11}
    data = ToyTranslationGameDataModule(train_pairs=BATCHES * ROWS + 2, **sizes, **limits, **pairs)
    module = TranslationGame(
        ModelSource(str(setup.models / "sender")),
        ModelSource(str(setup.models / "receiver")),
        PPOConfig(epochs=1, mini_batches=2, learning_rate=1e-3, adam_eps=1e-5),
        Sampling(max_new_tokens=8),
        receiver_learning_rate=1e-3,
        seed=0,
    )
    elastic = ElasticReset(every=2, decay=0.9, parameters=["sender.*"])
    return run(module, data, setup, [elastic, SampleLogger(3), SavePretrained(folder=str(setup.root))])


def supervised(setup: Setup) -> dict[str, Any]:
    """A translator on pairs whose targets are of many lengths, so that one rank has more tokens than the other."""
    size = {"train_pairs": 2 * ROWS, "batch_size": ROWS // setup.ranks, "eval_pairs": 7}
    data = ToyTranslationDataModule(source="fr", target="en", max_prompt_tokens=40, max_target_tokens=40, **size)
    model = TranslationModel(ModelSource(str(setup.models / "sender")), label_smoothing=0.1, max_new_tokens=8)
    gradients, trainer = keep_gradients(model), make_trainer(setup, [])
    trainer.fit(model, datamodule=data)
    return {"gradients": gradients, "metrics": dict(trainer.callback_metrics)}


def classified(setup: Setup, **options: Any) -> dict[str, Any]:
    """PPO against a classifier."""
    reward = ClassifierReward(str(setup.models / "classifier"), batch_size=3)
    reward.model.double()  # by itself: the reward keeps its precision where the module changes its own
    return ppo(setup, reward=reward, **options)


CASES: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "plain": ppo,
    "uneven": lambda setup: ppo(setup, eval_prompts=7),
    "early_stop": lambda setup: classified(setup, epochs=4, target_kl=0.01, learning_rate=5e-3),
    "lora": lambda setup: ppo(setup, lora=True, sampling={"temperature": 0.7}),
    "random_length": lambda setup: ppo(setup, sampling={"random_length": (1, 6), "max_new_tokens": 6, "eos": False}),
    "micro_batches": lambda setup: ppo(setup, micro_batch_size=2, execution=Execution(trainable_layers=1)),
    "rloo": lambda setup: ppo(setup, advantage="rloo", samples_per_prompt=2, mini_batches=2),
    "game": game,
    "supervised": supervised,
    "iterated": lambda setup: ppo(setup, resets=IteratedLearning(2, steps=2)),
}


SHARDED = {name: CASES[name] for name in ("plain", "early_stop", "lora", "random_length", "rloo")}


def ddp() -> dict[str, Any]:
    from lightning.pytorch.strategies import DDPStrategy

    return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}


def fsdp() -> dict[str, Any]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    strategy = ModelParallelStrategy(**sizes, save_distributed_checkpoint=False, process_group_backend="gloo")
    return {"strategy": strategy, "devices": 2}


STRATEGIES = {"ddp": (ddp, {n: case for n, case in CASES.items() if n != "plain"}), "fsdp": (fsdp, SHARDED)}

# A run of two epochs, cut in two: the second half may run on another number of processes than the first.
HALVES = {"full": dict, "lora": lambda: {"lora": True}, "iterated": lambda: {"resets": IteratedLearning(2, steps=2)}}
RESUMED = {"ddp": ("full", "iterated"), "fsdp": ("full", "lora")}
SAME_RANKS = ("iterated",)  # what goes on with as many processes as it was saved with, and says so


def first_half(name: str, setup: Setup) -> dict[str, Any]:
    return ppo(setup, **HALVES[name]())


def both_halves(name: str, setup: Setup) -> dict[str, Any]:
    """The whole run; its second half where `setup` resumes the first."""
    return ppo(setup, max_epochs=2, **HALVES[name]())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, results = int(os.environ["RANK"]), {}
    for strategy, (options, cases) in STRATEGIES.items():
        for name, case in cases.items():
            results[f"{strategy}:{name}"] = case(Setup(folder / "models", folder / strategy / name, 2, options))
        for name in RESUMED[strategy]:
            root, saved = folder / strategy / f"half_{name}", folder / f"{strategy}_{name}.ckpt"
            first_half(name, Setup(folder / "models", root, 2, options, save_to=saved))
            begun = saved if name in SAME_RANKS else folder / f"{name}.ckpt"
            resumed = Setup(folder / "models", folder / strategy / f"rest_{name}", 2, options, begun)
            results[f"{strategy}:resumed_{name}"] = both_halves(name, resumed)
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
