"""A backend in a few lines of numpy: a model is a table of logits by the token before, trained by
plain gradient descent.

It speaks `backends/protocol.py` and takes values and gradients from `objective.py`, so a test of
the loop can know every number. A student loaded for a recipe follows AdamW's rule without memory
instead, lr g / (|g| + eps), clipped: what the contract looks at.
"""

import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_distill import objective as definition
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.protocol import DeviceInfo, Memory, Ranks, check_indices
from mlx_distill.recipe.training_tables import OptimTable

WORDS = 7


def table(seed: int, words: int = WORDS) -> np.ndarray:
    """Logits `[words, words]` of the next token by the one before."""
    return np.random.default_rng(seed).normal(size=(words, words))


class ToyTeacher:
    def __init__(self, weights: np.ndarray):
        self.weights, self.notes = weights, ()
        self.vocabulary_rows, self.parameters = len(weights), weights.size

    def targets(self, batch) -> np.ndarray:
        return self.logits(batch)[: batch.taught]

    loss_head, states = None, targets  # what it keeps of a sequence are the logits themselves

    def logits(self, batch) -> np.ndarray:
        check_indices("tokens", batch.tokens, len(self.weights))
        check_indices("loss positions", batch.positions, batch.tokens.size)
        return self.weights[batch.tokens.ravel()[batch.positions]]


class ToyStudent(ToyTeacher):
    """`poison` is called with what is about to happen ("accumulate", "apply", "score") and may
    return a number to report instead.
    """

    def __init__(self, weights: np.ndarray, optim: OptimTable | None = None):
        super().__init__(weights)
        self.trainable, self.optim = weights.size, optim
        self.gradient = np.zeros_like(weights)
        self.poison = lambda what, batch=None: None
        self.rates: list[float] = []

    def compare_first(self, ids: int) -> None: ...

    def rows(self, batch, targets, objective) -> LossSums:
        check_indices("targets", batch.targets, len(self.weights))
        logits, taught = self.logits(batch), batch.taught
        kd, agree = np.zeros((2, len(logits)))
        if targets is not None:
            agree[:taught] = definition.same_choice(logits[:taught], targets)
        if targets is not None and objective.needs_teacher:
            of_taught = logits[:taught], targets, objective, batch.targets[:taught]
            kd[:taught] = definition.divergence(*of_taught)
        ce = definition.cross_entropy(logits, batch.targets)
        return LossSums.of(batch, {"kd": kd, "ce": ce, "agree": agree})

    def accumulate(self, batch, targets, objective, loss_tokens) -> LossSums:
        rows = self.rows(batch, targets, objective)
        logits, taught = self.logits(batch), batch.taught
        gradient = definition.cross_entropy_grad(logits, batch.targets)
        gradient[:taught] = definition.grad(
            logits[:taught], targets, batch.targets[:taught], objective
        )
        gradient = gradient * batch.weight[:, None] / loss_tokens
        np.add.at(self.gradient, batch.tokens.ravel()[batch.positions], gradient)
        return self.poisoned(rows, "accumulate", batch)

    def score(self, batch, targets, objective) -> LossSums:
        return self.poisoned(self.rows(batch, targets, objective), "score", batch)

    def poisoned(self, sums: LossSums, what: str, batch) -> LossSums:
        value = self.poison(what, batch)
        if value is None:
            return sums
        return dataclasses.replace(sums, terms=sums.terms | {"ce": np.full(3, value)})

    def token_scores(self, batch, targets, objective, by) -> np.ndarray:
        logits = self.logits(batch)[: batch.taught]
        if by == "divergence":
            return definition.divergence(logits, targets, objective)
        log_p = definition.log_softmax(targets if by == "teacher_entropy" else logits)
        return -(np.exp(log_p) * log_p).sum(axis=1)

    def targets_at(self, targets, places) -> np.ndarray:
        return targets[places]

    def apply(self, learning_rate: float) -> float:
        self.rates.append(learning_rate)
        norm = self.poison("apply")
        if norm is None:
            norm = float(np.sqrt((self.gradient**2).sum()))
            if np.isfinite(norm):
                self.weights = self.weights - learning_rate * self.direction(norm)
        self.gradient = np.zeros_like(self.weights)
        return norm

    def direction(self, norm: float) -> np.ndarray:
        if self.optim is None:
            return self.gradient
        limit = self.optim.max_grad_norm
        gradient = self.gradient * min(1.0, limit / norm) if limit else self.gradient
        return gradient / (np.abs(gradient) + self.optim.eps)

    def save_state(self, folder: Path | None) -> None:
        if folder:
            save_file({"weights": self.weights}, folder / "weights.safetensors")

    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        self.weights = load_file(folder / "weights.safetensors")["weights"]

    def state_bytes(self) -> int:
        return self.weights.nbytes

    export_bytes = state_bytes

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        if folder is None:
            return
        np.save(folder / "weights.npy", self.weights)
        (folder / "config.json").write_text(json.dumps({"stop_ids": stop_ids}))


class ToyBackend:
    name, ranks = "toy", Ranks()

    def load_teacher(
        self, folder: Path, name: str, quantize_bits: int | str = 0, dtype: str = "auto"
    ) -> ToyTeacher:
        return ToyTeacher(self.table(folder))

    def cached_targets(self, states: np.ndarray, head: None) -> np.ndarray:
        return states

    def load_student(self, folder: Path, name: str, recipe) -> ToyStudent:
        return ToyStudent(self.table(folder), recipe.optim)

    def table(self, folder: Path) -> np.ndarray:
        """As many words as the model of the folder has, and other numbers for another name."""
        words = json.loads((folder / "config.json").read_text())["vocab_size"]
        return table(len(folder.name), words)

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        return values

    def device(self) -> DeviceInfo:
        return DeviceInfo("toy", "numpy", "float64", "a test asked for it", "")

    def memory(self) -> Memory:
        return Memory(1, 2, 3)

    def reset_peak_memory(self) -> None: ...

    def training_limits(self) -> AbstractContextManager[None]:
        return nullcontext()

    def part(self) -> None: ...

    def release(self) -> None: ...
