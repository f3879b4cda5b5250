"""The seam between the program and a framework: what a backend's teacher and student can do.

The seam is the training step, not the array: arguments are numpy arrays and frozen dataclasses,
results are numbers and numpy. A framework's arrays never leave its folder; a teacher's targets are
opaque to all but the same backend's student. Axes: `B` sequences, `T` tokens, `N` loss positions,
`V` vocabulary, `D` width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_distill.backends.activations import Activations
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.oracle import Products
from mlx_distill.data.batches import Batch
from mlx_distill.errors import CacheError
from mlx_distill.models.prune import Kept, Sizes
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe

Targets = (
    Any  # a live teacher's are opaque outside of the backend that made them; see also SparseTargets
)


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's answers at N positions as K ids each; every backend's student takes them (at
    temperature 1).

    ids `int32[N, K]` (-1 pads), log_probs `float32[N, K]`, tail `float32[N]`: log of the mass on
    all other ids (-inf: none). The divergence is `objective.coarse_divergence`, plus offset
    `float32[N]`, which is constant to the student. top `int32[N]`: the teacher's first most likely
    id (`objective.same_choice`).
    """

    ids: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray
    offset: np.ndarray
    top: np.ndarray

    def at(self, places: np.ndarray) -> "SparseTargets":
        """Those of some of the positions."""
        return SparseTargets(*(getattr(self, field.name)[places] for field in fields(self)))

    @property
    def entropy(self) -> np.ndarray:
        """The teacher's, `float32[N]` in nats: of the K + 1 outcomes, or its own, where answers were
        drawn and offset makes up for the difference.
        """
        outcomes = np.concatenate([self.log_probs, self.tail[:, None]], axis=1).astype(np.float64)
        products = np.exp(outcomes) * np.where(np.isfinite(outcomes), outcomes, 0.0)
        return (-products.sum(axis=1) - self.offset).astype(np.float32)

    def check(self, objective: Objective, batch: Batch, vocabulary: int) -> None:
        """Raise `ValueError` at another temperature than 1, `IndexError` for ids outside of the
        vocabulary, and `CacheError` where dkd asks about a target that is none of the ids.
        """
        if objective.temperature != 1:
            raise ValueError(
                "sparse targets hold answers at temperature 1, the objective's is "
                f"{objective.temperature}"
            )
        check_indices("the teacher's ids", np.maximum(self.ids, 0), vocabulary)
        check_indices("the teacher's ids", self.top, vocabulary)
        if objective.divergence == "dkd":
            self.refuse_unknown_targets(batch)

    def refuse_unknown_targets(self, batch: Batch) -> None:
        """Raises `CacheError` where the text's own id is none of the kept ones."""
        asked = slice(len(self.ids))
        known = (self.ids == batch.targets[asked, None]).any(axis=1)
        unknown = np.flatnonzero(~known & (batch.weight[asked] != 0))
        if not len(unknown):
            return
        row = batch.positions[unknown[0]] // batch.tokens.shape[1]
        raise CacheError(
            f'example {batch.ids[row]!r}: objective.divergence = "dkd" asks how likely the '
            f"text's token {batch.targets[unknown[0]]} is, but the teacher cache holds "
            f"{self.ids.shape[1]} likelier ones and that is none of them ({len(unknown)} such "
            'positions here): raise teacher.cache_top_k, or set teacher.cache = "hidden"'
        )


def check_indices(name: str, indices: np.ndarray, stop: int) -> None:
    """Raise `IndexError` unless all are in [0, stop): on a GPU a framework may not."""
    if indices.size and not (indices.min() >= 0 and indices.max() < stop):
        raise IndexError(f"{name} {indices.min()}..{indices.max()} outside of 0..{stop - 1}")


@dataclass(frozen=True)
class DeviceInfo:
    """Where a backend runs: `dtype` is what "auto" computes in, `reason` why this device, `advice`
    how to do better ("" = well).
    """

    backend: str
    device: str
    dtype: str
    reason: str
    advice: str


@dataclass(frozen=True)
class Memory:
    """The framework's own counters. The allocator's cache is not part of the peak; the footprint,
    what is held of the device's memory, is what lives and what is cached.
    """

    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    footprint_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "footprint_bytes", self.active_bytes + self.cache_bytes)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: the first one (`rank` 0) writes, all of them
    compute.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Sampling:
    """How texts are generated: `temperature` 0 is greedy; `stop_ids` end a text, and so do
    `max_new_tokens`; `batch_size` of them are made at once. A text is drawn with random numbers of
    its own: of `seed`, its prompt, and which answer to it this is (`samples`, 0 for all by default).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 1
    stop_ids: frozenset[int] = frozenset()
    samples: tuple[int, ...] = ()


class Teacher(Protocol):
    """What training asks: answers at the supervised positions of a batch, live or from a cache."""

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the head that the answers are over, padding included."""

    def targets(self, batch: Batch) -> Targets:
        """At the first `batch.taught` positions."""


class Model(Protocol):
    """A model that is loaded."""

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""

    @property
    def vocabulary_rows(self) -> int:
        """Rows of its head, padding included."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how it is computed."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new token ids) as they finish, in any order; the stop token, if one
        came, is the last one.
        """

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The token ids that `generate` gives for this prompt alone, each as it is made; nothing is
        computed after the caller has left.
        """


class LiveTeacher(Model, Teacher, Protocol):
    """A teacher that is loaded, which a cache on disk can be filled from (`teaching/`): the first
    `rows` ids of its head are compared, at temperature 1.
    """

    loss_head: Any  # as `Backend.cached_targets` takes one

    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k most likely ids `int32[N, k]`, their log-probabilities float32 [N, k], the log of
        the rest [N].

        The first most likely id stands first, and the less likely after the more likely.
        """

    def draw(
        self, batch: Batch, uniform: np.ndarray, rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids `int32[N, S]` drawn by inverting the distribution at `uniform` float32 [N, S],
        entropy float32 [N], first most likely id [N].
        """

    def activations(self, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
        """How much each part does, over the tokens of `texts`, each int[T] and read by itself."""

    def states(self, batch: Batch) -> np.ndarray:
        """Hidden states [N, D]: float32, or bfloat16 as uint16 bits."""

    def watch(self, layers: Sequence[int]) -> None:
        """From now on the targets hold what these layers give, counted from 1."""

    def head_matrix(self) -> np.ndarray | None:
        """The head [V, D] as `states` are given, None where it is not one matrix and nothing else."""


class Student(Model, Protocol):
    """The model that is trained."""

    @property
    def trainable(self) -> int:
        """How many numbers train."""

    def compare_first(self, ids: int) -> None:
        """The loss compares the first `ids` of the vocabulary alone: those that the teacher shares.
        Before the first step; without it all rows of the head are compared.
        """

    def match_hidden(self, teacher: Any) -> None:
        """Compare hidden states with this live teacher of the same backend, as the recipe says;
        before the first step. Raises `ModelError` for a layer that there is not.
        """

    def accumulate(
        self, batch: Batch, targets: Targets, objective: Objective, loss_tokens: float
    ) -> LossSums:
        """Add the gradient of `loss / loss_tokens` over the batch to the gradients held inside."""

    def score(self, batch: Batch, targets: Targets, objective: Objective) -> LossSums:
        """The same sums without gradients."""

    def token_scores(
        self, batch: Batch, targets: Targets, objective: Objective, by: str
    ) -> np.ndarray:
        """What a rule of `data.selection.SCORED` says of the first `batch.taught` positions, float32,
        without gradients: an entropy at temperature 1, or the objective's divergence.
        """

    def targets_at(self, targets: Targets, places: np.ndarray) -> Targets:
        """The targets of some of the positions, by their places among these."""

    def activations(self, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
        """As a `LiveTeacher`'s, of the weights that train."""

    def keep(self, kept: Kept, sizes: Sizes) -> None:
        """Zero the channels and heads that are not `kept`, in the weights and in what the optimizer
        remembers of them; no gradient reaches them again.
        """

    def apply(self, learning_rate: float) -> float:
        """One optimizer step from the accumulated gradients, which are then cleared; the gradient
        norm before clipping.

        A norm that is not finite leaves the weights alone and raises nothing: the caller decides.
        """

    def save_state(self, folder: Path | None) -> None:
        """Weights (or adapters) and optimizer state into an existing folder; every rank calls it,
        those that do not write with None.

        `weights.safetensors` and `optimizer.safetensors` in MLX's names and shapes, so that another
        backend can continue.
        """

    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        """Load what `save_state` wrote; `optimizer=False` for the weights alone. Raises
        `ModelError` for another student's, `OutOfMemory` where it does not fit.
        """

    def state_bytes(self) -> int:
        """Size of one checkpoint."""

    def export_bytes(self) -> int:
        """Size of the exported student, at most."""

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        """Weights and config in Hugging Face layout, adapters fused (and kept beside); None as for
        `save_state`.
        """


class SelfTest(Protocol):
    """What a framework says of itself on this machine, without a model."""

    exact_environment: Mapping[str, str]  # with it a new process multiplies all bits of float32

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""

    def products(self) -> Products:
        """How exact products of float32 are, as this process was started."""

    def limits(self) -> dict[str, int]:
        """Bytes of a GPU's memory by what limits them; nothing on a CPU."""

    def matmul_size(self) -> int:
        """Rows of square matrices whose product keeps the device busy, and ends soon."""

    def matmul_rate(self, size: int = 0) -> float:
        """Measured operations a second of such a product, by default of `matmul_size`, in the dtype
        that "auto" trains in.
        """


class Backend(Protocol):
    """A framework: loads models, counts memory, and sums over the ranks that train together."""

    name: str
    ranks: Ranks

    def device(self) -> DeviceInfo: ...

    def load_teacher(
        self, folder: Path, name: str, quantize_bits: int | str = 0, dtype: str = "auto"
    ) -> LiveTeacher:
        """A frozen teacher of `folder` that computes in `dtype` ("auto": float32 on a CPU, elsewhere
        as stored), quantised as `TeacherTable` says; `name` is what the user called it. Raises
        `ModelError`.
        """

    def load_student(self, folder: Path, name: str, recipe: Recipe) -> Student:
        """A student to train. Raises `ModelError`."""

    def cached_head(self, matrix: np.ndarray) -> Any:
        """What `LiveTeacher.head_matrix` gave, ready to be part of targets."""

    def cached_targets(self, states: np.ndarray, head: Any) -> Targets:
        """Targets as the backend's own teacher gives them, from `LiveTeacher.states` [N, D] and a
        `cached_head`.
        """

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of float64 `values` over all ranks, on each of them; also the point at which they
        wait for each other.
        """

    def memory(self) -> Memory: ...

    def training_limits(self) -> AbstractContextManager[None]:
        """What a framework may keep of the device's memory while it trains; as it was before,
        afterwards. Every rank enters it.
        """

    def reset_peak_memory(self) -> None: ...

    def part(self) -> None:
        """Training together is over; what follows the first rank does alone."""

    def release(self) -> None:
        """Give unused memory back, after a model has gone."""

    def self_test(self) -> SelfTest: ...
