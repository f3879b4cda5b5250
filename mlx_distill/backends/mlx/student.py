"""The student: a model that trains, its optimizer, its checkpoints and its export.

In: batches, a teacher's targets, an objective. Out: sums of the loss's terms, the norm of a step's
gradient, files. Decided here: what is computed in which number format, when lazy work is evaluated,
and what a checkpoint holds.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_reduce

from mlx_distill.backends import matching, refusals
from mlx_distill.backends.adapters import write_adapters
from mlx_distill.backends.chunks import chunk_tokens
from mlx_distill.backends.failures import OF_VALIDATION, explained
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.mlx import ranks as together
from mlx_distill.backends.mlx.adapters import fused_weights
from mlx_distill.backends.mlx.entropy import entropy_rows
from mlx_distill.backends.mlx.generate import MlxModel
from mlx_distill.backends.mlx.heads import Head, MatrixHead, SparseHead
from mlx_distill.backends.mlx.loss import kd_loss, score_rows
from mlx_distill.backends.mlx.matching import Watched, distance_rows, of_student
from mlx_distill.backends.mlx.model import RoundedEmbedding, SplitModel, checkpoint_layers
from mlx_distill.backends.mlx.optimizer import AdamW, ScheduleFreeAdamW, make_optimizer
from mlx_distill.backends.mlx.rounding import rounded
from mlx_distill.backends.mlx.teacher import LiveTargets, MlxTeacher
from mlx_distill.backends.mlx.thinning import thinned
from mlx_distill.backends.mlx.weights import cast, cast_frozen, in_the_place_of, save_folder
from mlx_distill.backends.protocol import Sampling, SparseTargets, Targets, check_indices
from mlx_distill.data.batches import Batch
from mlx_distill.models.prune import Kept, Sizes
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe

Weights = dict[str, Any]  # arrays by the parts of their names, nested
Inputs = tuple[
    mx.array, mx.array, mx.array | None, Head | SparseHead | None, mx.array, mx.array, Objective
]  # of the loss, as far as training and scoring share them


class MlxStudent(MlxModel):
    """A model that trains: float32 weights (full) or adapters, an optimizer, and the gradients of
    the step under way.
    """

    def __init__(self, split: SplitModel, base: Path, recipe: Recipe, dtype: mx.Dtype):
        super().__init__(split)
        self.base, self.recipe, self.table, self.dtype = base, recipe, recipe.student, dtype
        self.full = recipe.student.tuning == "full"
        self.chunk_tokens = chunk_tokens(
            recipe.objective.chunk_tokens, "mlx", mx.default_device().type.name
        )
        self.max_grad_norm = recipe.optim.max_grad_norm
        if not self.full:
            cast_frozen(split.model, dtype)
        if recipe.student.gradient_checkpointing:
            checkpoint_layers(split)
        self.embedding = RoundedEmbedding(split)
        self.weights: Weights = split.model.trainable_parameters()
        self._make_optimizer()
        self._watched: Watched | None = None  # layers that are compared with the teacher's
        self.gradients: Weights | None = None
        self._mean: Weights | None = None  # under schedule-free AdamW, once asked for
        self.compared_ids = self.vocabulary_rows
        self._value_and_grad = mx.value_and_grad(self._loss)
        mx.eval(split.model.parameters(), self.optimizer.state)

    def _make_optimizer(self) -> None:
        self.optimizer = make_optimizer(self.recipe)
        self.optimizer.init(self.weights)

    def match_hidden(self, teacher: MlxTeacher) -> None:
        """Compare hidden states with this teacher's, as the recipe says; before the first step."""
        layers, of_teacher, made = matching.matched(self.recipe, self.split, teacher.split)
        self._watched = Watched(self.split, layers)
        teacher.watch(of_teacher)
        if made:
            arrays = {layer: mx.array(matrix) for layer, matrix in made.items()}
            self.weights = self.weights | {matching.PROJECTION: arrays}
            self._make_optimizer()

    @property
    def trainable(self) -> int:
        return sum(array.size for _, array in tree_flatten(self.weights))

    @property
    def evaluated(self) -> Weights:
        """The weights that are validated, write texts and are exported: those that train, but under
        schedule-free AdamW.
        """
        if not isinstance(self.optimizer, ScheduleFreeAdamW):
            return self.weights
        if self._mean is None:
            self._mean = self.optimizer.mean(self.weights)
            mx.eval(self._mean)
        return self._mean

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new ids) as they finish, the stop id included where one came."""
        self._settle(self.evaluated)
        try:
            yield from super().generate(prompts, sampling)
        finally:
            self._settle(self.weights)

    def compare_first(self, ids: int) -> None:
        """The loss compares the first `ids` of the vocabulary alone."""
        self.compared_ids = ids

    # a step: gradients of micro-batches are added up, then applied

    def accumulate(
        self, batch: Batch, targets: Targets, objective: Objective, loss_tokens: float
    ) -> LossSums:
        """Add the gradients of the batch's share of the step's loss; returns its sums. Evaluates
        everything before it returns.
        """
        with explained("a training step"):
            try:
                (_, terms), gradients = self._value_and_grad(
                    self.weights, batch, targets, objective, loss_tokens
                )
            finally:
                self._settle(self.weights)  # the traced arrays must not stay
            if self.gradients is not None:
                gradients = tree_map(mx.add, self.gradients, gradients)
            mx.eval(terms, gradients)
        self.gradients = gradients
        return _sums(batch, terms)

    def _loss(
        self,
        weights: Weights,
        batch: Batch,
        targets: Targets,
        objective: Objective,
        loss_tokens: float,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        arguments = self._arguments(weights, batch, targets, objective)
        rows = kd_loss(
            *arguments,
            loss_tokens,
            self.chunk_tokens,
            self.full,
            self.compared_ids,
            batch.taught,
        )
        if not objective.matches_hidden:
            return rows.loss, rows.terms
        hidden = self._distances(weights, batch, targets, objective.hidden_distance)
        distance = mx.sum(mx.array(batch.weight) * hidden) / (loss_tokens or 1.0)
        loss = rows.loss + objective.hidden_weight * distance
        return loss, rows.terms | {"hidden": hidden}

    def _distances(self, weights: Weights, batch: Batch, targets: Any, kind: str) -> mx.array:
        """How far the layers' hidden states of the pass under way are from the teacher's,
        float32[N]; 0 beyond the taught positions.
        """
        assert self._watched is not None, "match_hidden comes first"
        ours = self._watched.taken(batch.positions[: batch.taught])
        learned = weights.get(matching.PROJECTION, {})
        projections = [learned.get(str(layer)) for layer in self._watched.layers]
        rows = distance_rows(ours, targets.states, projections, kind)
        rows = mx.where(mx.array(batch.weight[: batch.taught]) != 0, rows, 0.0)
        return mx.pad(rows, (0, len(batch.positions) - batch.taught))

    def score(self, batch: Batch, targets: Targets, objective: Objective) -> LossSums:
        """The same sums without gradients."""
        with explained("validation", OF_VALIDATION):
            terms = self._scored(self.evaluated, batch, targets, objective)
            mx.eval(terms)
        return _sums(batch, terms)

    def _scored(
        self, weights: Weights, batch: Batch, targets: Targets, objective: Objective
    ) -> dict[str, mx.array]:
        """The terms' rows by name, under these weights."""
        try:
            arguments = self._arguments(weights, batch, targets, objective)
            rows = score_rows(*arguments, self.chunk_tokens, self.compared_ids, batch.taught)
            if not objective.matches_hidden:
                return rows.terms
            hidden = self._distances(weights, batch, targets, objective.hidden_distance)
            return rows.terms | {"hidden": hidden}
        finally:
            self._settle(self.weights)

    def _settle(self, weights: Weights) -> None:
        """Have the model compute with these weights, and hold nothing of the last pass."""
        self.split.model.update(of_student(weights))
        if self._watched:
            self._watched.forget()

    # which positions are chosen

    def token_scores(
        self, batch: Batch, targets: Targets, objective: Objective, by: str
    ) -> np.ndarray:
        """What a rule says of the first `batch.taught` positions, without gradients."""
        if by == "teacher_entropy" and isinstance(targets, SparseTargets):
            return targets.entropy
        with explained("choosing tokens"):
            if by == "divergence":
                terms = self._scored(self.weights, batch, targets, objective)
                return np.array(terms["kd"][: batch.taught])
            if by == "teacher_entropy":
                hidden, head = targets.hidden, targets.head
            else:
                hidden, matrix, *_ = self._arguments(self.weights, batch, None, objective)
                hidden, head = hidden[: batch.taught], MatrixHead(matrix)
            rows = np.array(entropy_rows(hidden, head, self.chunk_tokens, self.compared_ids))
            self._settle(self.weights)
            return rows

    def targets_at(self, targets: Targets, places: np.ndarray) -> Targets:
        """The targets of some of the positions."""
        if isinstance(targets, SparseTargets):
            return targets.at(places)
        chosen = mx.array(places)
        states = tuple(given[chosen] for given in targets.states)
        return LiveTargets(targets.hidden[chosen], targets.head, states)

    def _arguments(
        self, weights: Weights, batch: Batch, targets: Targets, objective: Objective
    ) -> Inputs:
        """What both losses begin with."""
        check_indices("targets", batch.targets, self.compared_ids)
        return (
            self._hidden(weights, batch),
            self._head_matrix(weights),
            *self._teacher(targets, batch, objective),
            mx.array(batch.targets),
            mx.array(batch.weight),
            objective,
        )

    def _hidden(self, weights: Weights, batch: Batch) -> mx.array:
        """The hidden states [N, D], computed with these weights in the format that is asked for."""
        of_model = rounded(of_student(weights), self.table.quantize_aware_bits)
        if not self.full:
            self.split.model.update(of_model)
            return self.gather(batch.tokens, batch.positions)
        self.split.model.update(cast(of_model, self.dtype, but=self.embedding.path))
        self.embedding.round_to(self.dtype)
        try:
            return self.gather(batch.tokens, batch.positions)
        finally:
            self.embedding.round_to(None)

    def _head_matrix(self, weights: Weights) -> mx.array:
        """[V, D]: the trained float32 matrix, not its cast copy; the frozen one with adapters."""
        if not self.full:
            return self.split.head_matrix()
        found: Any = weights
        for part in self.split.head_path.split("."):
            found = found[part]
        return rounded(found, self.table.quantize_aware_bits)

    def _teacher(
        self, targets: Targets, batch: Batch, objective: Objective
    ) -> tuple[mx.array | None, Head | SparseHead | None]:
        """Targets of any kind as the loss takes them: (hidden states, head), (None, K answers) or
        (None, None).
        """
        if not isinstance(targets, SparseTargets):
            return (targets.hidden, targets.head) if targets else (None, None)
        targets.check(objective, batch, self.compared_ids)
        arrays = targets.ids, targets.log_probs, targets.tail, targets.offset, targets.top
        return None, SparseHead(*map(mx.array, arrays))

    def keep(self, kept: Kept, sizes: Sizes) -> None:
        self.weights, self.optimizer.state = thinned(
            self.weights, self.optimizer.state, kept, sizes
        )
        self._mean = None
        self._settle(self.weights)

    def apply(self, learning_rate: float) -> float:
        """One optimizer step, clipped to `max_grad_norm`; the norm before clipping. If it is not
        finite nothing changes.
        """
        with explained("an optimizer step"):
            return self._applied(learning_rate)

    def _applied(self, learning_rate: float) -> float:
        assert self.gradients is not None, "a step without a batch"
        # no other name may hold them: the update frees them as it goes
        gradients, self.gradients = together.sum_gradients(self.gradients), None
        norm = mx.sqrt(
            tree_reduce(
                lambda total, g: total + mx.sum(mx.sum(mx.square(g.reshape(g.shape[0], -1)), -1)),
                gradients,
                mx.array(0.0),
            )
        )
        value = norm.item()
        if not np.isfinite(value):
            return value
        scale = self.max_grad_norm / (value + 1e-6) if self.max_grad_norm else 1.0
        if isinstance(self.optimizer, AdamW):
            self.optimizer.clipped = min(1.0, scale)
        elif scale < 1.0:
            gradients = tree_map(lambda g: g * scale, gradients)
        self.optimizer.learning_rate = learning_rate
        self._mean = None
        self.weights = self.optimizer.apply_gradients(gradients, self.weights)
        self._settle(self.weights)
        mx.eval(self.weights, self.optimizer.state)
        return value

    # checkpoints

    def save_state(self, folder: Path | None) -> None:
        """`weights.safetensors` (all trained arrays, float32) and `optimizer.safetensors`; every
        rank holds all of them.
        """
        if folder is None:
            return
        state = dict(tree_flatten(self.optimizer.state))
        with explained("a checkpoint"):
            if self.evaluated is not self.weights:
                state |= {f"{key}.y": array for key, array in tree_flatten(self.weights)}
            weights = dict(tree_flatten(self.evaluated))
            for name, arrays in (("weights", weights), ("optimizer", state)):
                mx.save_safetensors(str(folder / f"{name}.safetensors"), arrays)

    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        """Load what `save_state` wrote; `optimizer=False` for the weights alone. Raises
        `ModelError` on other arrays, `OutOfMemory`.
        """
        with explained(f"loading {folder}"):
            weights = mx.load(str(folder / "weights.safetensors"))
            shapes = {key: array.shape for key, array in tree_flatten(self.weights)}
            if {key: array.shape for key, array in weights.items()} != shapes:
                raise refusals.other_state(folder)
            self.weights = in_the_place_of(self.weights, weights)
            self.gradients = self._mean = None
            if optimizer:
                state = mx.load(str(folder / "optimizer.safetensors"))
                if isinstance(self.optimizer, ScheduleFreeAdamW):
                    self._mean = self.weights
                    trained = {key: state.pop(f"{key}.y") for key in shapes}
                    self.weights = in_the_place_of(self.weights, trained)
                self.optimizer.state = in_the_place_of(self.optimizer.state, state)
            elif isinstance(self.optimizer, ScheduleFreeAdamW):
                self.optimizer.restart(self.weights)
            self._settle(self.weights)
            mx.eval(self.weights, self.optimizer.state)

    def state_bytes(self) -> int:
        """Bytes of one checkpoint."""
        kept = [self.weights, self.optimizer.state]
        if isinstance(self.optimizer, ScheduleFreeAdamW):
            kept.append(self.weights)  # what trains and the student
        return sum(array.nbytes for _, array in tree_flatten(kept))

    # the exported student

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        """A Hugging Face folder with adapters fused; the adapters themselves go to `adapters` and
        `adapters-peft` in it.
        """
        if folder is None:
            return
        self._settle(self.evaluated)
        with explained("the student's export"):
            fused = fused_weights(self.split.model, self.base)
            save_folder(fused, self.base, folder, self._save_dtype, stop_ids)
        if not self.full:
            adapters = {
                key: np.array(array) for key, array in tree_flatten(of_student(self.evaluated))
            }
            write_adapters(folder, adapters, self.table, len(self.split.layers), self.split.name)
        self._settle(self.weights)

    def export_bytes(self) -> int:
        """Bytes of the exported weights, and of the float32 adapters beside them (in two layouts),
        at most.
        """
        adapters = 0 if self.full else 8 * self.trainable
        return self.parameters * self._save_dtype.size + adapters

    @property
    def _save_dtype(self) -> mx.Dtype:
        asked = self.table.save_dtype
        return self.split.stored_dtype if asked == "base" else getattr(mx, asked)


def _sums(batch: Batch, terms: dict[str, mx.array]) -> LossSums:
    return LossSums.of(batch, {name: np.array(row) for name, row in terms.items()})
