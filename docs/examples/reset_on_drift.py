"""A reset schedule of one's own: reset when the policy has drifted too far, and not by the clock.

python docs/examples/reset_on_drift.py
"""

from elastic_lightning import ElasticReset
from elastic_lightning.callbacks.weight_sets import ResetState


class ResetOnDrift(ElasticReset):
    """Elastic Reset at the end of each batch whose KL to the reference is above `limit` (nats per response)."""

    def __init__(self, limit: float, decay: float = 0.995) -> None:
        super().__init__(every=None, decay=decay)  # no clock
        self.limit = limit

    def should_reset(self, state: ResetState) -> bool:
        return state.kl is not None and state.kl > self.limit


if __name__ == "__main__":
    for kl in (1.0, 6.0, 3.0):
        print(kl, ResetOnDrift(limit=5.0).should_reset(ResetState(batches=1, updates=16, resets=0, kl=kl)))
