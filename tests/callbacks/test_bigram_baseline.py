import pytest
import torch
from lightning import Trainer

from elastic_lightning.algorithms import LanguageModel
from elastic_lightning.callbacks import BigramBaseline
from elastic_lightning.data import ToyReviewsDataModule
from elastic_lightning.data.tokenizers import main as tokenizer_main
from elastic_lightning.errors import UserError
from elastic_lightning.functional import bigram_perplexity
from elastic_lightning.policies import ModelSource


@pytest.fixture
def trainer():
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", callbacks=[BigramBaseline()], **quiet)


def model(folder):
    tokenizer_main(["--data=ToyReviewsDataModule", f"--output={folder}"])
    shape = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    return LanguageModel(ModelSource(architecture=shape, tokenizer=str(folder)))


def test_it_is_measured_on_the_tokens_that_the_model_is_tested_on(trainer, tmp_path):
    data = ToyReviewsDataModule(task="language_model", train_texts=50, eval_texts=20, block_size=32)
    module = model(tmp_path)
    (results,) = trainer.test(module, data, verbose=False)
    tested = torch.cat(list(data.test_dataloader()))
    assert len(tested) < len(data.packed("test"))
    expected = bigram_perplexity(data.packed("train"), tested, 250)
    assert results["test/bigram_perplexity"] == pytest.approx(expected.item(), rel=1e-5)
    assert results["test/perplexity"] > 0


def test_without_packed_data_it_says_so(trainer, tmp_path):
    with pytest.raises(UserError, match="packed"):
        blocks = torch.zeros(2, 8, dtype=torch.int64)
        trainer.test(model(tmp_path), torch.utils.data.DataLoader(blocks, batch_size=2), verbose=False)
