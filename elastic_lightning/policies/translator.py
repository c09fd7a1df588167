"""An encoder-decoder with its tokenizer: reads texts, scores translations, writes them."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from elastic_lightning.errors import UserError
from elastic_lightning.policies.batches import PairedTexts, Prompts, Responses
from elastic_lightning.policies.encoding import encode_target, pad, truncated
from elastic_lightning.policies.loading import as_policy, disable_dropout, load_source
from elastic_lightning.policies.sampling import greedy
from elastic_lightning.policies.seq2seq import Seq2SeqLM
from elastic_lightning.policies.sources import ModelSource


class Translator(nn.Module):
    """One direction of translation, in eval mode: the model, and the tokenizer of its two sides."""

    def __init__(self, lm: Seq2SeqLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.lm, self.tokenizer = lm, tokenizer

    def read(self, texts: list[str]) -> Prompts:
        """B texts as sources."""
        rows = self.lm.encode_rows(self.tokenizer, texts)
        if self.lm.longest_source is not None:
            rows = truncated(rows, self.lm.longest_source)
        return Prompts(*self._placed(pad(rows, self.tokenizer.pad_token_id, left=True)))

    def write(self, texts: list[str]) -> Responses:
        """B texts as what this model would have written."""
        rows = encode_target(self.tokenizer, texts)
        return Responses(*self._placed(pad(rows, self.tokenizer.pad_token_id, left=False)))

    def logprobs(self, pairs: PairedTexts) -> Tensor:
        """Log-probabilities [B, T] of the targets, in nats, 0 at padding."""
        return self.lm.pair_statistics(pairs).logprobs

    def nll(self, pairs: PairedTexts) -> Tensor:
        """`PolicyLM.pair_nll` of the targets."""
        return self.lm.pair_nll(pairs)

    def greedy(self, sources: Prompts, max_new_tokens: int) -> Responses:
        """The most likely token at each step, up to the end."""
        return greedy(self.lm, sources, max_new_tokens, **self.lm.drawn_tokens(self.tokenizer)._asdict())

    def translate(self, sources: Prompts, max_new_tokens: int) -> list[str]:
        """`greedy` as texts [B]."""
        return self.lm.decode(self.tokenizer, sources, self.greedy(sources, max_new_tokens)).responses

    def _placed(self, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        device = next(self.lm.parameters()).device
        return [tensor.to(device) for tensor in tensors]


def load_translator(source: ModelSource) -> Translator:
    """The translator that `source` names, dropout switched off.

    Raises:
        UserError: it cannot be loaded, or is no encoder-decoder.
    """
    loaded = load_source(source)
    disable_dropout(loaded.model)
    lm = as_policy(loaded.model)
    if not isinstance(lm, Seq2SeqLM):
        raise UserError(f"{type(loaded.model).__name__} is no encoder-decoder: it cannot be a translator")
    return Translator(lm, loaded.tokenizer).eval()
