"""Strategies that cannot work are refused before anything runs."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from elastic_lightning import ElasticReset
from elastic_lightning.algorithms import TranslationGame
from elastic_lightning.algorithms.execution import Execution
from elastic_lightning.algorithms.strategies import check_sharding, check_strategy, layer_dtype
from elastic_lightning.callbacks import IteratedLearning
from elastic_lightning.errors import UserError


def trainer(tensor_parallel=1, distributed_checkpoint=False, precision="32-true"):
    strategy = ModelParallelStrategy(save_distributed_checkpoint=distributed_checkpoint)
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel)}
    return SimpleNamespace(strategy=strategy, precision=precision, world_size=2)


def test_flat_parameters_are_refused():
    with pytest.raises(UserError, match=r"FSDPStrategy keeps weights in flat parameters .* use ddp, or .*fsdp\.yaml"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()))
    deep_speed = type("DeepSpeedStrategy", (), {})()  # the package is not needed to be told
    with pytest.raises(UserError, match="DeepSpeedStrategy keeps weights in flat buffers"):
        check_strategy(SimpleNamespace(strategy=deep_speed))
    check_strategy(trainer())


@pytest.mark.parametrize(
    ("options", "execution", "message"),
    [
        ({"tensor_parallel": 2}, {}, "tensor_parallel_size must be 1"),
        ({"distributed_checkpoint": True}, {}, "save_distributed_checkpoint: false"),
        ({"precision": "16-mixed"}, {}, "trainer.precision must be one of .* got '16-mixed'"),
        ({}, {"trainable_layers": 1}, "execution.trainable_layers does not work with sharded weights"),
        ({}, {"rollout_dtype": "bfloat16"}, "execution.rollout_dtype does not work"),
        ({}, {"compile": True}, "execution.compile does not work"),
    ],
)
def test_what_sharding_excludes(options, execution, message):
    with pytest.raises(UserError, match=message):
        check_sharding(trainer(**options), Execution(**execution))


def test_what_sharding_allows():
    check_sharding(trainer(), Execution(gradient_checkpointing=True, scoring_batch_size=4))
    assert layer_dtype(trainer()) is None
    assert str(layer_dtype(trainer(precision="bf16-mixed"))) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("callback", "strategy", "message"),
    [
        (ElasticReset(every=2), FSDPStrategy(), "ElasticReset does not work with FSDPStrategy.*use ddp or Model"),
        (ElasticReset(every=2, offload=True), ModelParallelStrategy(), "ElasticReset with offload does not work"),
        (IteratedLearning(every=2, steps=1), ModelParallelStrategy(), "IteratedLearning does not work with Model"),
    ],
)
def test_callbacks_that_cannot_work_on_shards(callback, strategy, message):
    with pytest.raises(UserError, match=message):
        callback.setup(SimpleNamespace(strategy=strategy), SimpleNamespace(imitation_losses=None), "fit")


def test_the_game_is_not_sharded():
    with pytest.raises(UserError, match="TranslationGame is not sharded"):
        TranslationGame.configure_model(SimpleNamespace(device_mesh="a mesh"))
