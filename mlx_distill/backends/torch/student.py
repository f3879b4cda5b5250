"""The student: a model that trains, its optimizer, its checkpoints and its export.

In: batches, a teacher's targets, an objective. Out: sums of the loss's terms, the norm of a step's
gradient, files. Decided here: what is computed in which number format, and what a checkpoint holds:
MLX's names and shapes, so that either backend continues what the other began.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mlx_distill.backends import matching, refusals
from mlx_distill.backends.activations import Activations
from mlx_distill.backends.adapters import write_adapters
from mlx_distill.backends.chunks import chunk_tokens
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.protocol import Sampling, SparseTargets, Targets, check_indices
from mlx_distill.backends.torch import ranks as together
from mlx_distill.backends.torch import resident
from mlx_distill.backends.torch.adapters import canonical, fused_weights
from mlx_distill.backends.torch.entropy import entropy_rows
from mlx_distill.backends.torch.failures import explained
from mlx_distill.backends.torch.generate import TorchModel
from mlx_distill.backends.torch.heads import Head, MatrixHead, SparseHead
from mlx_distill.backends.torch.loss import kd_loss, score_rows
from mlx_distill.backends.torch.matching import Watched, distance_rows, of_student
from mlx_distill.backends.torch.model import SplitModel, checkpoint_layers
from mlx_distill.backends.torch.optimizer import (
    ScheduleFreeAdamW,
    counters,
    look_at_mean,
    make_optimizer,
    restore_counters,
    state_names,
)
from mlx_distill.backends.torch.rounding import rounded
from mlx_distill.backends.torch.stored import gathered, kept_array, kept_shape, restore, whole
from mlx_distill.backends.torch.teacher import LiveTargets, TorchTeacher
from mlx_distill.backends.torch.thinning import thin
from mlx_distill.backends.torch.weights import save_folder
from mlx_distill.data.batches import Batch
from mlx_distill.errors import RecipeError
from mlx_distill.models.prune import Kept, Sizes
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe

Inputs = tuple[
    Tensor, Tensor, Tensor | None, Head | SparseHead | None, Tensor, Tensor, Objective
]  # of the loss, as far as training and scoring share them


class TorchStudent(TorchModel):
    """A model that trains: float32 weights (full) or adapters, an optimizer, and the gradients of
    the step under way.
    """

    def __init__(self, split: SplitModel, base: Path, recipe: Recipe, dtype: torch.dtype):
        super().__init__(split)
        self.base, self.recipe, self.table, self.dtype = base, recipe, recipe.student, dtype
        self.full = recipe.student.tuning == "full"
        self.chunk_tokens = chunk_tokens(recipe.objective.chunk_tokens, "torch", self.device.type)
        self.max_grad_norm = recipe.optim.max_grad_norm
        if recipe.student.gradient_checkpointing:
            checkpoint_layers(split)
            if self.device.type == "cpu":
                resident.return_freed_blocks()
        if split.rounded_to and together.size() > 1:
            raise RecipeError(
                f"student.quantize_aware_bits = {split.rounded_to} on {together.size()} ranks of "
                "torch, which hold a part of each matrix: use one process, or set 0"
            )
        head_path = "" if split.packed_head else split.head_path
        together.shard(split, trains=True, dtype=dtype if self.full else torch.float32)
        named = dict(split.model.named_parameters())
        self.head = named.get(head_path)  # none where it is packed
        self.weights = {
            name: parameter for name, parameter in named.items() if parameter.requires_grad
        }
        self.optimizer = self._made_optimizer()
        self._averages = recipe.optim.schedule_free  # what trains is then not the student
        self._watched: Watched | None = None  # layers that are compared with the teacher's
        self.compared_ids = self.vocabulary_rows

    def _made_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.recipe, list(self.weights.values()), together.size() > 1)

    def match_hidden(self, teacher: TorchTeacher) -> None:
        """Compare hidden states with this teacher's, as the recipe says; before the first step."""
        layers, of_teacher, made = matching.matched(self.recipe, self.split, teacher.split)
        self._watched = Watched(self.split, layers)
        teacher.watch(of_teacher)
        like = next(iter(self.weights.values()))  # sharded, or whole on each rank
        for layer, matrix in made.items():
            parameter = torch.nn.Parameter(together.spread(self.tensor(matrix), like))
            self.weights[f"{matching.PROJECTION}.{layer}"] = parameter
        if made:
            self.optimizer = self._made_optimizer()

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.weights.values())

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new ids), a batch at a time, the stop id included where one came."""
        look_at_mean(self.optimizer, True)
        yield from super().generate(prompts, sampling)

    def compare_first(self, ids: int) -> None:
        """The loss compares the first `ids` of the vocabulary alone."""
        self.compared_ids = ids

    def precision(self) -> AbstractContextManager:
        """What trains is kept in float32 and computes in `dtype`; but DoRA's norms, of which a
        rounding would move the untrained student, are computed as they are kept.
        """
        half = self.dtype != torch.float32 and self.table.tuning != "dora"
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    # a step: gradients of micro-batches are added up, then applied

    def accumulate(
        self, batch: Batch, targets: Targets, objective: Objective, loss_tokens: float
    ) -> LossSums:
        """Add the gradients of the batch's share of the step's loss; returns its sums."""
        look_at_mean(self.optimizer, False)
        with explained("a training step"):
            rows = kd_loss(
                *self._arguments(batch, targets, objective),
                loss_tokens,
                self.chunk_tokens,
                self.full,
                self.compared_ids,
                self.dtype,
                batch.taught,
            )
            loss, terms = rows.loss, rows.terms
            if objective.matches_hidden:
                terms["hidden"] = self._distances(batch, targets, objective.hidden_distance)
                distance = (self.tensor(batch.weight) * terms["hidden"]).sum() / (
                    loss_tokens or 1.0
                )
                loss = loss + objective.hidden_weight * distance
            loss.backward()
            return _sums(batch, terms)

    def _distances(self, batch: Batch, targets: Any, kind: str) -> Tensor:
        """How far the layers' hidden states of the last pass are from the teacher's, float32[N]; 0
        beyond the taught positions.
        """
        assert self._watched is not None, "match_hidden comes first"
        ours = self._watched.taken(self.tensor(batch.positions[: batch.taught]))
        learned = [
            self.weights.get(f"{matching.PROJECTION}.{layer}") for layer in self._watched.layers
        ]
        projections = [one if one is None else together.whole_with_gradient(one) for one in learned]
        rows = distance_rows(ours, targets.states, projections, kind)
        rows = rows.masked_fill(self.tensor(batch.weight[: batch.taught]) == 0, 0.0)
        return torch.nn.functional.pad(rows, (0, len(batch.positions) - batch.taught))

    @torch.no_grad()
    def score(self, batch: Batch, targets: Targets, objective: Objective) -> LossSums:
        """The same sums without gradients."""
        look_at_mean(self.optimizer, True)
        with explained("validation"):
            return _sums(batch, self._scored(batch, targets, objective))

    def _scored(self, batch: Batch, targets: Targets, objective: Objective) -> dict[str, Tensor]:
        """The terms' rows by name."""
        arguments = self._arguments(batch, targets, objective)
        rows = score_rows(
            *arguments, self.chunk_tokens, self.compared_ids, self.dtype, batch.taught
        )
        if objective.matches_hidden:
            hidden = self._distances(batch, targets, objective.hidden_distance)
            return rows.terms | {"hidden": hidden}
        if self._watched:
            self._watched.forget()
        return rows.terms

    # which positions are chosen

    @torch.no_grad()
    def token_scores(
        self, batch: Batch, targets: Targets, objective: Objective, by: str
    ) -> np.ndarray:
        """What a rule says of the first `batch.taught` positions, without gradients."""
        look_at_mean(self.optimizer, False)
        if by == "teacher_entropy" and isinstance(targets, SparseTargets):
            return targets.entropy
        with explained("choosing tokens"):
            if by == "divergence":
                rows = self._scored(batch, targets, objective)["kd"]
                return rows[: batch.taught].cpu().numpy()
            if by == "teacher_entropy":
                hidden, head = targets.hidden, targets.head
            else:
                hidden, matrix, *_ = self._arguments(batch, None, objective)
                matrix = matrix.to(self.dtype) if matrix.is_cuda else matrix
                hidden, head = hidden[: batch.taught], MatrixHead(matrix)
            rows = entropy_rows(hidden, head, self.chunk_tokens, self.compared_ids)
            return rows.cpu().numpy()

    def targets_at(self, targets: Targets, places: np.ndarray) -> Targets:
        """The targets of some of the positions."""
        if isinstance(targets, SparseTargets):
            return targets.at(places)
        chosen = self.tensor(places)
        states = tuple(given[chosen] for given in targets.states)
        return LiveTargets(targets.hidden[chosen], targets.head, states)

    def _arguments(self, batch: Batch, targets: Targets, objective: Objective) -> Inputs:
        """What both losses begin with."""
        check_indices("targets", batch.targets, self.compared_ids)
        with self.precision():
            hidden = self.gather(batch.tokens, batch.positions)
        return (
            hidden,
            self._head_matrix(),
            *self._teacher(targets, batch, objective),
            self.tensor(batch.targets),
            self.tensor(batch.weight),
            objective,
        )

    def _head_matrix(self) -> Tensor:
        """[V, D]: the trained float32 matrix; the frozen one with adapters, unpacked where it is
        quantised.
        """
        if self.head is None:
            assert self.split.packed_head is not None
            return self.split.packed_head.matrix()
        return rounded(together.whole_with_gradient(self.head), self.table.quantize_aware_bits)

    def _teacher(
        self, targets: Targets, batch: Batch, objective: Objective
    ) -> tuple[Tensor | None, Head | SparseHead | None]:
        """As the loss takes them: (hidden states, head), (None, K answers) or (None, None)."""
        if not isinstance(targets, SparseTargets):
            return (targets.hidden, targets.head) if targets else (None, None)
        targets.check(objective, batch, self.compared_ids)
        arrays = targets.ids, targets.log_probs, targets.tail, targets.offset, targets.top
        return None, SparseHead(*map(self.tensor, arrays))

    def activations(self, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
        look_at_mean(self.optimizer, False)
        return super().activations(texts, head_dim)

    def keep(self, kept: Kept, sizes: Sizes) -> None:
        look_at_mean(self.optimizer, False)
        thin(self.weights, self.optimizer.state, kept, sizes)

    def apply(self, learning_rate: float) -> float:
        """One optimizer step, clipped to `max_grad_norm`; the norm before clipping. If it is not
        finite nothing changes.
        """
        look_at_mean(self.optimizer, False)
        with explained("an optimizer step"):
            parameters = list(self.weights.values())
            together.sum_replicated(parameters)
            gradients = [parameter.grad for parameter in parameters]
            norm = together.whole(torch.nn.utils.get_total_norm(gradients))
            value = norm.item()
            if np.isfinite(value):
                if self.max_grad_norm:
                    torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate
                self.optimizer.step()
            self.optimizer.zero_grad()
            return value

    # checkpoints

    def save_state(self, folder: Path | None) -> None:
        """`weights.safetensors` (all trained arrays, float32) and `optimizer.safetensors`; other
        ranks than the first help with None.
        """
        with explained("gathering a checkpoint"):
            weights = gathered(self._weight_arrays(), folder is not None)
            optimizer = gathered(self._optimizer_arrays(), folder is not None)
        if folder:
            save_file(weights, folder / "weights.safetensors")
            save_file(optimizer, folder / "optimizer.safetensors")

    def _weight_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        look_at_mean(self.optimizer, True)
        for name, parameter in self.weights.items():
            array = kept_array(name, parameter)
            # a copy, for on a CPU what trains will lie in the same memory
            yield canonical(name), array.copy() if self._averages else array

    def _optimizer_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        look_at_mean(self.optimizer, False)
        yield from counters(self.optimizer).items()
        for name, parameter in self.weights.items():
            state = self.optimizer.state[parameter]
            if self._averages:
                yield f"{canonical(name)}.y", kept_array(name, parameter)
            for ours, theirs in state_names(name, state).items():
                yield f"{canonical(name)}.{theirs}", kept_array(name, state[ours])

    @torch.no_grad()
    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        """Load what `save_state` wrote; `optimizer=False` for the weights alone. Raises
        `ModelError` on other arrays, `OutOfMemory`.
        """
        with explained(f"loading {folder}"):
            look_at_mean(self.optimizer, False)
            self._restore_weights(folder)
            if optimizer:
                self._restore_optimizer(load_file(folder / "optimizer.safetensors"))
            elif isinstance(self.optimizer, ScheduleFreeAdamW):
                self.optimizer.restart()

    def _restore_weights(self, folder: Path) -> None:
        kept = load_file(folder / "weights.safetensors")
        shapes = {
            canonical(name): kept_shape(name, parameter) for name, parameter in self.weights.items()
        }
        if {key: array.shape for key, array in kept.items()} != shapes:
            raise refusals.other_state(folder)
        for name, parameter in self.weights.items():
            restore(parameter, kept[canonical(name)], name)
        self.optimizer.zero_grad()

    def _restore_optimizer(self, kept: dict[str, np.ndarray]) -> None:
        restore_counters(self.optimizer, kept)
        beside = {}
        for name, parameter in self.weights.items():
            state = self.optimizer.state[parameter]
            if self._averages:
                beside[parameter] = torch.empty_like(parameter)
                restore(beside[parameter], kept[f"{canonical(name)}.y"], name)
            for ours, theirs in state_names(name, state).items():
                restore(state[ours], kept[f"{canonical(name)}.{theirs}"], name)
        if isinstance(self.optimizer, ScheduleFreeAdamW):
            self.optimizer.kept = beside  # the weights are the mean, to the bit

    def state_bytes(self) -> int:
        """Bytes of one checkpoint."""
        moments = (
            tensor
            for parameter in self.weights.values()
            for key, tensor in self.optimizer.state[parameter].items()
            if key not in ("step", "RMS")
        )
        return 4 * (
            (1 + self._averages) * self.trainable + sum(tensor.numel() for tensor in moments)
        )

    # the exported student

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        """A Hugging Face folder with adapters fused; the adapters themselves go to `adapters` and
        `adapters-peft` in it.
        """
        look_at_mean(self.optimizer, True)
        if self.full:
            with explained("gathering the student"):
                tensors = (
                    (name, whole(parameter)) for name, parameter in of_student(self.weights).items()
                )
                fused = gathered(tensors, folder is not None)
        if folder is None:
            return
        if not self.full:
            fused = fused_weights(self.split, self.base)
            adapters = {
                canonical(name): kept_array(name, one)
                for name, one in of_student(self.weights).items()
            }
            write_adapters(folder, adapters, self.table, len(self.split.layers), self.split.name)
        save_folder(fused, self.base, folder, self._save_dtype, stop_ids)

    def export_bytes(self) -> int:
        """Bytes of the exported weights, and of the float32 adapters beside them (in two layouts),
        at most.
        """
        adapters = 0 if self.full else 8 * self.trainable
        return self.parameters * self._save_dtype.itemsize + adapters

    @property
    def _save_dtype(self) -> torch.dtype:
        asked = self.table.save_dtype
        return self.split.stored_dtype if asked == "base" else getattr(torch, asked)


def _sums(batch: Batch, terms: dict[str, Tensor]) -> LossSums:
    values = torch.stack(list(terms.values())).detach().cpu().numpy()  # waits for the GPU once
    return LossSums.of(batch, dict(zip(terms, values, strict=True)))
