"""What is measured of a translation game at validation."""

from __future__ import annotations

from torchmetrics import Metric

from elastic_lightning.algorithms.policy_metrics import PolicyMetrics
from elastic_lightning.metrics import CorpusBLEU, TokenFrequencyDivergence
from elastic_lightning.policies import Responses


class GameMetrics(PolicyMetrics):
    """`PolicyMetrics` of sampled messages, and what greedy decoding of the whole chain is worth:

    - bleu_task: of the receiver's translations of the sender's messages (the game's score);
    - bleu_message: of the messages against human ones (drift);
    - frequency_divergence: of the messages' tokens from those of human ones, Jensen-Shannon, nats (drift).

    BLEU is sacrebleu's, see `CorpusBLEU`. Text metrics read the greedy messages.

    Args:
        vocabulary: of the sender.
        text_metrics: see `PolicyMetrics`.
    """

    def __init__(self, vocabulary: int, text_metrics: list[Metric] | None = None) -> None:
        super().__init__(text_metrics)
        self.bleu_task, self.bleu_message = CorpusBLEU(), CorpusBLEU()
        self.frequency_divergence = TokenFrequencyDivergence(vocabulary)

    def update_messages(
        self, messages: list[str], human: list[str], tokens: Responses, human_tokens: Responses
    ) -> None:
        """Add B greedy messages and B human ones, as texts and as tokens."""
        self.bleu_message.update(messages, human)
        self.frequency_divergence.update(*tokens, *human_tokens)

    def update_translations(self, translations: list[str], references: list[str]) -> None:
        """Add the receiver's translations of B greedy messages, and the B references."""
        self.bleu_task.update(translations, references)
