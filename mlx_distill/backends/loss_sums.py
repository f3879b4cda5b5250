"""What a backend says of a batch's loss: sums by term and segment, from which all shown means come.

In: rows of a batch, by term. Out: `LossSums`, which add up over batches and ranks. Decided here: at
which positions a term counts, and what its sum is divided by.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mlx_distill.data.batches import Batch
from mlx_distill.objective import ENDING


@dataclass(frozen=True)
class LossSums:
    """Sums over the weighted positions of one or more batches, by segment (index `Segment`), as
    float64[3].

    terms by name, kd: divergence in nats (temperature scaling included), ce: cross-entropy in nats,
    agree: positions of `objective.same_choice`, each where the teacher is asked; `ENDING`:
    cross-entropy at the other positions, in runs that have some. Those that `Objective.weights_of`
    names make the loss. tokens: sum of weights, by which terms are divided; ending_tokens divide
    `ENDING`.
    """

    terms: dict[str, np.ndarray]
    tokens: np.ndarray
    ending_tokens: np.ndarray = field(default_factory=lambda: np.zeros(3))

    @classmethod
    def of(cls, batch: Batch, rows: Mapping[str, np.ndarray]) -> "LossSums":
        """From rows [N] of any float type by name; rows of weight 0 do not count."""

        def sums(weight: np.ndarray, row: np.ndarray | float) -> np.ndarray:
            return np.bincount(batch.segment, weight * np.asarray(row, np.float64), 3)

        weight = batch.weight.astype(np.float64)
        if batch.endings is None:
            return cls({name: sums(weight, row) for name, row in rows.items()}, sums(weight, 1.0))
        taught = np.arange(len(weight)) < batch.taught
        asked, alone = weight * taught, weight * ~taught
        terms = {name: sums(asked, row) for name, row in rows.items()}
        terms[ENDING] = sums(alone, rows["ce"])
        return cls(terms, sums(asked, 1.0), sums(alone, 1.0))

    def tokens_of(self, term: str) -> np.ndarray:
        """What a term's sums are divided by, float64[3]."""
        return self.ending_tokens if term == ENDING else self.tokens

    @property
    def loss_tokens(self) -> float:
        """Positions that make the loss."""
        return float(self.tokens.sum() + self.ending_tokens.sum())

    def stacked(self) -> np.ndarray:
        """The terms in their order, then the tokens of both kinds: float64[terms + 2, 3]."""
        return np.stack([*self.terms.values(), self.tokens, self.ending_tokens])

    def over_ranks(self, all_sum: Callable[[np.ndarray], np.ndarray]) -> "LossSums":
        """The sums over all ranks, which name the same terms, by one `Backend.all_sum`."""
        *terms, tokens, ending_tokens = all_sum(self.stacked())
        return LossSums(dict(zip(self.terms, terms, strict=True)), tokens, ending_tokens)

    def __add__(self, other: "LossSums") -> "LossSums":
        terms = {name: values + other.terms[name] for name, values in self.terms.items()}
        tokens, ending_tokens = self.tokens + other.tokens, self.ending_tokens + other.ending_tokens
        return LossSums(terms, tokens, ending_tokens)
