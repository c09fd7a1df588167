from elastic_lightning.data import ParallelText, SentencesDataModule


def test_one_language_is_packed(tmp_path, word_tokenizer):
    tokenizer = word_tokenizer(eos_token="<eos>", pad_token="<pad>")  # w3 is 3, eos 1
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "train.en").write_text("W3 w4\nw5 w6 w7\n")
    (tmp_path / "train.fr").write_text("w20 w20\nw20 w20\n")
    text = ParallelText(str(tmp_path / "train"))
    data = SentencesDataModule(text, text, tokenizer=str(tmp_path / "tokenizer"), batch_size=1, block_size=3)
    data.setup("fit")
    assert data.packed("train").tolist() == [[3, 4, 1], [5, 6, 7]]  # in lower case, eos after each, the rest dropped
    assert [batch.shape for batch in data.val_dataloader()] == [(2, 3)]
