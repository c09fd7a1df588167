"""What the README shows works."""

import re
from pathlib import Path

import torch
from lightning import Trainer

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_snippet_with_one_callback():
    snippet = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ElasticReset(" in block)
    names = {}
    exec(snippet, names)
    callback = names["ElasticReset"](every=3, decay=0.9)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(7)]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.fit(names["Regression"](), torch.utils.data.DataLoader(data, batch_size=None))
    assert callback.resets == 2 and callback.updates == 7
    assert any(isinstance(c, names["ElasticReset"]) for c in names["trainer"].callbacks)


def test_the_imports_it_shows():
    for line in re.findall(r"^from elastic_lightning[^\n]*", README, re.MULTILINE):
        exec(line, {})


def test_its_links_lead_somewhere():
    root = Path(__file__).parents[2]
    links = re.findall(r"\]\(((?!http)[^)#]+)", README)
    assert links and all((root / link).exists() for link in links), links


def test_the_commands_it_shows_name_files_that_exist():
    root = Path(__file__).parents[2]
    for path in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (root / path).exists(), path
