"""A backend in forty lines of numpy: a model is a table of logits by the token before, trained by plain gradient descent.

It speaks `backends/protocol.py` and takes values and gradients from `objective.py`, so a test of the loop can know every number.
"""

import json
from pathlib import Path

import numpy as np

from mlx_distill import objective as definition
from mlx_distill.backends.protocol import DeviceInfo, LossSums, Memory

WORDS = 7


def table(seed: int) -> np.ndarray:
    """Logits `[WORDS, WORDS]` of the next token by the one before."""
    return np.random.default_rng(seed).normal(size=(WORDS, WORDS))


class ToyTeacher:
    vocabulary_rows, parameters = WORDS, WORDS * WORDS

    def __init__(self, weights: np.ndarray):
        self.weights = weights

    def targets(self, batch) -> np.ndarray:
        return self.weights[batch.tokens.ravel()[batch.positions]]


class ToyStudent(ToyTeacher):
    """`poison` is called with what is about to happen ("accumulate", "apply", "score") and may return a number to report instead."""

    trainable = WORDS * WORDS

    def __init__(self, weights: np.ndarray):
        super().__init__(weights)
        self.gradient = np.zeros_like(weights)
        self.poison = lambda what, batch=None: None
        self.rates: list[float] = []

    def rows(self, batch, targets, objective) -> LossSums:
        logits, weight = self.targets(batch), batch.weight.astype(np.float64)
        teaches = targets is not None and objective.needs_teacher
        kd = definition.divergence(logits, targets, objective) if teaches else np.zeros(len(logits))
        ce = definition.cross_entropy(logits, batch.targets)
        agree = logits.argmax(-1) == targets.argmax(-1) if targets is not None else np.zeros(len(logits))
        return LossSums(*(np.bincount(batch.segment, weight * row, 3) for row in (kd, ce, agree, np.ones(len(weight)))))

    def accumulate(self, batch, targets, objective, loss_tokens) -> LossSums:
        gradient = definition.grad(self.targets(batch), targets, batch.targets, objective) * batch.weight[:, None] / loss_tokens
        np.add.at(self.gradient, batch.tokens.ravel()[batch.positions], gradient)
        return self.poisoned(self.rows(batch, targets, objective), "accumulate", batch)

    def score(self, batch, targets, objective) -> LossSums:
        return self.poisoned(self.rows(batch, targets, objective), "score", batch)

    def poisoned(self, sums: LossSums, what: str, batch) -> LossSums:
        value = self.poison(what, batch)
        return sums if value is None else LossSums(sums.kd, np.full(3, value), sums.agree, sums.tokens)

    def apply(self, learning_rate: float) -> float:
        self.rates.append(learning_rate)
        norm = self.poison("apply")
        if norm is None:
            norm = float(np.sqrt((self.gradient**2).sum()))
            self.weights = self.weights - learning_rate * self.gradient
        self.gradient = np.zeros_like(self.weights)
        return norm

    def save_state(self, folder: Path) -> None:
        np.save(folder / "weights.npy", self.weights)

    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        self.weights = np.load(folder / "weights.npy")

    def state_bytes(self) -> int:
        return self.weights.nbytes

    export_bytes = state_bytes

    def export(self, folder: Path, stop_ids: list[int]) -> None:
        np.save(folder / "weights.npy", self.weights)
        (folder / "config.json").write_text(json.dumps({"stop_ids": stop_ids}))


class ToyBackend:
    name = "toy"

    def device(self) -> DeviceInfo:
        return DeviceInfo("toy", "numpy", "float64", "a test asked for it", "")

    def memory(self) -> Memory:
        return Memory(1, 2, 3)

    def reset_peak_memory(self) -> None: ...

    def release(self) -> None: ...
