"""Memory and traffic against numbers worked out by hand on a tiny model, and the table against the document."""

from pathlib import Path

import pytest
from sharding import COLUMNS, Batch, Sizes, memory, rows, sizes, traffic
from transformers import GPT2Config, LlamaConfig

BATCH = Batch(rows=2, prompt=3, response=5, epochs=2, mini_batches=2)
HAND = Sizes(total=100, layer=40, layers=2, adapter=6, cache_columns=8)


def test_weights_are_counted():
    # 7 words and 5 positions of width 4; a layer: attention 4x12+12+4x4+4, MLP 4x16+16+16x4+4, two norms of 8
    assert sizes(GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2)) == Sizes(
        total=7 * 4 + 5 * 4 + 8 + 2 * 244, layer=244, layers=2, adapter=2 * 16 * (4 + 12), cache_columns=2 * 4 * 2
    )
    # width 4, MLP of 6; two heads of 2 share one of keys; an output layer of its own
    llama = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    layer = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 6 + 2 * 4
    assert sizes(LlamaConfig(**llama)) == Sizes(
        total=2 * 7 * 4 + 4 + layer, layer=layer, layers=1, adapter=16 * (8 + 6), cache_columns=2 * 2
    )


def test_the_adapter_is_that_of_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for config in (
        GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=2, n_head=2),
        LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=6, num_attention_heads=4, num_key_value_heads=2),
    ):
        expected = sizes(config).adapter
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=16, task_type="CAUSAL_LM"))
        assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == expected


@pytest.mark.parametrize(
    ("lora", "state", "passing"),
    [
        (False, 24 * 100 + 200, 2 * 2 * 40 + 4 * 20 + 6 * 40 + 4 * 20),
        (True, 24 * 6 + 200 + 200, 2 * 2 * 40 + 2 * 20),
    ],
)
def test_memory_by_hand(lora, state, passing):
    cache = 2 * 8 * 2 * 8
    assert memory(HAND, lora, 4, False, BATCH) == state + cache
    assert memory(HAND, lora, 4, True, BATCH) == state / 4 + passing + cache


def test_traffic_by_hand():
    assert traffic(HAND, False, 4, False, BATCH) == {"sampling": 0, "scoring": 0, "update": 2 * 0.75 * 400 * 4}
    assert traffic(HAND, True, 4, False, BATCH)["update"] == 2 * 0.75 * 24 * 4
    assert traffic(HAND, False, 4, True, BATCH) == {
        "sampling": 0.75 * (160 * 5 + 2 * 80),
        "scoring": 0.75 * (160 + 2 * 80 + 200),
        "update": 0.75 * (2 * 160 + 2 * 80) * 4 + 0.75 * 400 * 4,
    }
    assert traffic(HAND, True, 4, True, BATCH)["sampling"] == 0.75 * (160 * 5 + 40)


def test_the_document_holds_the_table():
    lines = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    start = cells.index(COLUMNS)
    assert cells[start + 2 : start + 2 + len(rows(Batch()))] == rows(Batch())
