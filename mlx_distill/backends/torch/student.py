"""The student: a model that trains, its optimizer, its checkpoints and its export.

In: batches, a teacher's targets, an objective. Out: sums of the loss's terms, the norm of a step's
gradient, files. Decided here: what is computed in which number format, and what a checkpoint holds:
MLX's names and shapes, so that either backend continues what the other began.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mlx_distill.backends import refusals
from mlx_distill.backends.adapters import write_adapters
from mlx_distill.backends.chunks import chunk_tokens
from mlx_distill.backends.protocol import LossSums, SparseTargets, Targets, check_indices
from mlx_distill.backends.torch import ranks as together
from mlx_distill.backends.torch import resident
from mlx_distill.backends.torch.adapters import canonical, fused_weights, is_transposed
from mlx_distill.backends.torch.failures import explained
from mlx_distill.backends.torch.generate import TorchModel
from mlx_distill.backends.torch.heads import Head, SparseHead
from mlx_distill.backends.torch.loss import LossRows, kd_loss, score_rows
from mlx_distill.backends.torch.model import SplitModel, checkpoint_layers
from mlx_distill.backends.torch.optimizer import make_optimizer, state_names
from mlx_distill.backends.torch.weights import save_folder
from mlx_distill.data.batches import Batch
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
        self.base, self.table, self.dtype = base, recipe.student, dtype
        self.full = recipe.student.tuning == "full"
        self.chunk_tokens = chunk_tokens(recipe.objective.chunk_tokens, "torch", self.device.type)
        self.max_grad_norm = recipe.optim.max_grad_norm
        if recipe.student.gradient_checkpointing:
            checkpoint_layers(split)
            if self.device.type == "cpu":
                resident.return_freed_blocks()
        head_path = split.head_path
        together.shard(split, trains=True, dtype=dtype if self.full else torch.float32)
        named = dict(split.model.named_parameters())
        self.head = named[head_path]
        self.weights = {
            name: parameter for name, parameter in named.items() if parameter.requires_grad
        }
        ranked = together.size() > 1
        self.optimizer = make_optimizer(recipe, list(self.weights.values()), ranked)
        self.compared_ids = self.vocabulary_rows

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.weights.values())

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
            rows.loss.backward()
            return _sums(batch, rows)

    @torch.no_grad()
    def score(self, batch: Batch, targets: Targets, objective: Objective) -> LossSums:
        """The same sums without gradients."""
        with explained("validation"):
            arguments = self._arguments(batch, targets, objective)
            rows = score_rows(
                *arguments, self.chunk_tokens, self.compared_ids, self.dtype, batch.taught
            )
            return _sums(batch, rows)

    def _arguments(self, batch: Batch, targets: Targets, objective: Objective) -> Inputs:
        """What both losses begin with."""
        check_indices("targets", batch.targets, self.compared_ids)
        with self.precision():
            hidden = self.gather(batch.tokens, batch.positions)
        return (
            hidden,
            together.whole_with_gradient(self.head),
            *self._teacher(targets, batch, objective),
            self.tensor(batch.targets),
            self.tensor(batch.weight),
            objective,
        )

    def _teacher(
        self, targets: Targets, batch: Batch, objective: Objective
    ) -> tuple[Tensor | None, Head | SparseHead | None]:
        """Targets of any kind as the loss takes them: (hidden states, head), (None, K answers) or
        (None, None).
        """
        if not isinstance(targets, SparseTargets):
            return targets or (None, None)
        targets.check(objective, batch, self.compared_ids)
        arrays = targets.ids, targets.log_probs, targets.tail, targets.offset, targets.top
        return None, SparseHead(*map(self.tensor, arrays))

    def apply(self, learning_rate: float) -> float:
        """One optimizer step, clipped to `max_grad_norm`; the norm before clipping. If it is not
        finite nothing changes.
        """
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
            weights = _gathered(self._weight_arrays(), folder is not None)
            optimizer = _gathered(self._optimizer_arrays(), folder is not None)
        if folder:
            save_file(weights, folder / "weights.safetensors")
            save_file(optimizer, folder / "optimizer.safetensors")

    def _weight_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, parameter in self.weights.items():
            yield canonical(name), _kept(name, parameter)

    def _optimizer_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "learning_rate", np.array(self.optimizer.param_groups[0]["lr"], np.float32)
        step = 0
        for name, parameter in self.weights.items():
            state = self.optimizer.state[parameter]
            step = int(state["step"])
            for ours, theirs in state_names(name, state).items():
                yield f"{canonical(name)}.{theirs}", _kept(name, state[ours])
        yield "step", np.array(step, np.uint64)

    @torch.no_grad()
    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        """Load what `save_state` wrote; `optimizer=False` for the weights alone. Raises
        `ModelError` on other arrays, `OutOfMemory`.
        """
        with explained(f"loading {folder}"):
            self._restore_weights(folder)
            if optimizer:
                self._restore_optimizer(load_file(folder / "optimizer.safetensors"))

    def _restore_weights(self, folder: Path) -> None:
        kept = load_file(folder / "weights.safetensors")
        shapes = {
            canonical(name): _kept_shape(name, parameter)
            for name, parameter in self.weights.items()
        }
        if {key: array.shape for key, array in kept.items()} != shapes:
            raise refusals.other_state(folder)
        for name, parameter in self.weights.items():
            _restore(parameter, kept[canonical(name)], name)
        self.optimizer.zero_grad()

    def _restore_optimizer(self, kept: dict[str, np.ndarray]) -> None:
        for name, parameter in self.weights.items():
            state = self.optimizer.state[parameter]
            state["step"] = _like(state["step"], int(kept["step"]))
            for ours, theirs in state_names(name, state).items():
                _restore(state[ours], kept[f"{canonical(name)}.{theirs}"], name)

    def state_bytes(self) -> int:
        """Bytes of one checkpoint."""
        moments = (
            tensor
            for parameter in self.weights.values()
            for key, tensor in self.optimizer.state[parameter].items()
            if key not in ("step", "RMS")
        )
        return 4 * (self.trainable + sum(tensor.numel() for tensor in moments))

    # the exported student

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        """A Hugging Face folder with adapters fused; the adapters themselves go to `adapters` and
        `adapters-peft` in it.
        """
        if self.full:
            with explained("gathering the student"):
                whole = ((name, _whole(parameter)) for name, parameter in self.weights.items())
                fused = _gathered(whole, folder is not None)
        if folder is None:
            return
        if not self.full:
            fused = fused_weights(self.split, self.base)
            adapters = dict(self._weight_arrays())
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


def _gathered(arrays: Iterable[tuple[str, Any]], keep: bool) -> dict[str, Any]:
    """All of them where `keep`; other ranks than the first help to make each one and drop it."""
    return {name: array for name, array in arrays if keep}


def _whole(parameter: Tensor) -> Tensor:
    """The trained values; on the CPU if their shards had to be gathered, since a GPU may not hold
    all of them at once.
    """
    whole = together.whole(parameter.detach())
    return whole.cpu() if together.size() > 1 else whole


def _kept(name: str, tensor: Tensor) -> np.ndarray:
    """A tensor as a checkpoint holds it."""
    array = together.whole(tensor.detach()).cpu().numpy()
    return np.ascontiguousarray(array.T) if is_transposed(name) else array


def _kept_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    return tuple(reversed(tensor.shape)) if is_transposed(name) else tuple(tensor.shape)


def _restore(tensor: Tensor, array: np.ndarray, name: str) -> None:
    array = np.ascontiguousarray(array.T) if is_transposed(name) else array
    tensor.detach().copy_(together.spread(torch.from_numpy(array), tensor))


def _like(old: Tensor | int, value: int) -> Tensor | int:
    return torch.full_like(old, value) if isinstance(old, Tensor) else value


def _sums(batch: Batch, rows: LossRows) -> LossSums:
    _, *names = rows._fields
    values = torch.stack(rows[1:]).cpu().numpy()  # which waits for the GPU once
    return LossSums.of(batch, dict(zip(names, values, strict=True)))
