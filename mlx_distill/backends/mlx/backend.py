"""MLX's teacher and student: the verbs of `backends/protocol.py` in mlx-lm's models, mlx's
optimizers and our loss.

numpy comes in and goes out; MLX arrays stay here. Decided here: number formats by device, when lazy
work is evaluated, and what a checkpoint of the student holds.
"""

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_reduce, tree_unflatten

from mlx_distill.backends import oracle, refusals
from mlx_distill.backends.adapters import write_adapters
from mlx_distill.backends.chunks import chunk_tokens
from mlx_distill.backends.mlx import loading
from mlx_distill.backends.mlx import model as models
from mlx_distill.backends.mlx.adapters import fused_weights
from mlx_distill.backends.mlx.heads import FLOOR, Head, MatrixHead, QuantizedHead, SparseHead
from mlx_distill.backends.mlx.loss import LossRows, kd_loss, score_rows
from mlx_distill.backends.mlx.weights import cast, cast_frozen, parameter_count, save_folder
from mlx_distill.backends.protocol import (
    DeviceInfo,
    LossSums,
    Memory,
    Ranks,
    Sampling,
    SparseTargets,
    check_indices,
)
from mlx_distill.blas import load_blas
from mlx_distill.data.batches import Batch
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe

TEACHER_CHUNK = 128  # positions whose logits exist at once while a cache is written


class MlxBackend:
    """MLX on Metal, CUDA or a CPU, whichever the installed wheel runs on."""

    name = "mlx"

    def __init__(self) -> None:
        self.ranks = _join()

    def device(self) -> DeviceInfo:
        ranks = f" x {self.ranks.size}" if self.ranks.size > 1 else ""
        if mx.default_device().type == mx.DeviceType.gpu:
            kind = "Metal" if mx.metal.is_available() else "CUDA"
            info = mx.device_info()
            return DeviceInfo(
                self.name,
                f"{kind} ({info.get('device_name', 'GPU')}{ranks})",
                "bfloat16",
                f"MLX sees a {kind} GPU",
                "",
            )
        blas = load_blas()
        return DeviceInfo(
            self.name,
            f"CPU ({platform.machine()}{ranks}, BLAS: {blas.name})",
            "float32",
            "MLX sees no GPU; half precision is slow on a CPU",
            blas.advice,
        )

    def dtype(self, asked: str) -> mx.Dtype:
        return getattr(mx, self.device().dtype if asked == "auto" else asked)

    def load_teacher(self, folder: Path, name: str, quantize_bits: int = 0) -> "MlxTeacher":
        split = loading.load_teacher(folder, name, quantize_bits)
        if self.device().dtype == "float32":
            split.model.update(cast(split.model.parameters(), mx.float32))
            mx.eval(split.model.parameters())
        return MlxTeacher(split)

    def load_student(self, folder: Path, name: str, recipe: Recipe) -> "MlxStudent":
        split = loading.load_student(folder, name, recipe.student, recipe.run.seed)
        return MlxStudent(split, folder, recipe, self.dtype(recipe.student.compute_dtype))

    def cached_head(self, matrix: np.ndarray) -> Head:
        return MatrixHead(_of_bits(matrix))

    def cached_targets(self, states: np.ndarray, head: Head) -> tuple[mx.array, Head]:
        return _of_bits(states), head

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of `values` over all ranks, on each; counts are exact, sums of losses are rounded
        to float32 twice.
        """
        if self.ranks.size == 1:
            return values
        high = np.asarray(values, np.float64).astype(np.float32)
        low = (values - high).astype(np.float32)  # MLX sums no float64 on a GPU
        return np.sum(
            np.array(mx.distributed.all_sum(mx.array(np.stack([high, low]))), np.float64), axis=0
        )

    def part(self) -> None:
        """Nothing here is spread over ranks but gradients."""

    def memory(self) -> Memory:
        return Memory(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())

    def reset_peak_memory(self) -> None:
        mx.reset_peak_memory()

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""
        return oracle.loss_error(_mean_loss)

    def matmul_rate(self, size: int = 1024, repeats: int = 8) -> float:
        """Measured operations a second of `size`³ products in the dtype that "auto" trains in."""
        left = mx.ones((size, size), self.dtype("auto"))
        mx.eval(left @ left)
        started = time.perf_counter()
        for _ in range(repeats):
            mx.eval(left @ left)
        return repeats * 2 * size**3 / (time.perf_counter() - started)

    def release(self) -> None:
        """Give back the allocator's cache, after a model has gone."""
        mx.clear_cache()


class MlxModel:
    """What teacher and student share: hidden states, generation, size."""

    def __init__(self, split: models.SplitModel):
        self.split, self.notes = split, split.notes

    @property
    def parameters(self) -> int:
        return parameter_count(self.split.model)

    @property
    def vocabulary_rows(self) -> int:
        return self.split.head_rows()

    def gather(self, tokens: np.ndarray, positions: np.ndarray) -> mx.array:
        """The hidden states [N, D] at flat `positions` [N] of `tokens` [B, T]; all indices are
        checked, MLX does not.
        """
        check_indices("tokens", tokens, self.vocabulary_rows)
        check_indices("loss positions", positions, tokens.size)
        hidden = self.split.hidden(mx.array(tokens))
        return hidden.reshape(-1, hidden.shape[-1])[mx.array(positions)]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new ids) as they finish, the stop id included where one came."""
        from mlx_lm.generate import BatchGenerator

        mx.random.seed(sampling.seed)
        generator = BatchGenerator(
            self.split.model,
            max_tokens=sampling.max_new_tokens,
            stop_tokens=[[i] for i in sorted(sampling.stop_ids)],
            sampler=_sampler(sampling.temperature, sampling.top_p),
            completion_batch_size=sampling.batch_size,
            prefill_batch_size=sampling.batch_size,
        )
        try:
            names = generator.insert([list(prompt) for prompt in prompts])
            places = {name: place for place, name in enumerate(names)}
            tokens: dict[int, list[int]] = {name: [] for name in names}
            while responses := generator.next_generated():
                for response in responses:
                    tokens[response.uid].append(response.token)
                    if response.finish_reason is not None:
                        yield places[response.uid], tokens.pop(response.uid)
        finally:
            generator.close()


class MlxTeacher(MlxModel):
    """A frozen model. Its targets are hidden states [N, D] and its head: [N, V] is never made."""

    def __init__(self, split: models.SplitModel):
        super().__init__(split)
        self._head = split.loss_head()

    def targets(self, batch: Batch) -> tuple[mx.array, Head]:
        return self.gather(batch.tokens, batch.positions), self._head

    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._by_chunk(batch, rows, partial(_top_k, k=k))

    def draw(
        self, batch: Batch, uniform: np.ndarray, rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._by_chunk(batch, rows, _draw, mx.array(uniform))

    def states(self, batch: Batch) -> np.ndarray:
        hidden, _ = self.targets(batch)
        return _bits(hidden)

    def head_matrix(self) -> np.ndarray | None:
        head = self._head
        if (
            not isinstance(head, MatrixHead | QuantizedHead)
            or head.bias is not None
            or head.finish is not None
        ):
            return None
        if isinstance(head, MatrixHead):
            return _bits(head.weight)
        sizes = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
        return _bits(mx.dequantize(head.weight, head.scales, head.biases, **sizes))

    def _by_chunk(
        self, batch: Batch, rows: int, answer: Callable, *inputs: mx.array
    ) -> tuple[np.ndarray, ...]:
        """`answer(log-probabilities [C, rows], inputs [C, …])` of all N positions, by chunks of
        them.
        """
        hidden, head = self.targets(batch)
        columns = []
        for start in range(0, len(hidden), TEACHER_CHUNK):
            place = slice(start, start + TEACHER_CHUNK)
            logits = head.logits(hidden[place].astype(mx.float32), 0, rows)
            below = logits - logits.max(
                axis=1, keepdims=True
            )  # so that a log-probability near 0 keeps its digits
            found = answer(
                below - mx.logsumexp(below, axis=1, keepdims=True),
                *(array[place] for array in inputs),
            )
            columns.append([np.array(column) for column in found])
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


class MlxStudent(MlxModel):
    """A model that trains: float32 weights (full) or adapters, an optimizer, and the gradients of
    the step under way.
    """

    def __init__(self, split: models.SplitModel, base: Path, recipe: Recipe, dtype: mx.Dtype):
        super().__init__(split)
        self.base, self.table, self.dtype = base, recipe.student, dtype
        self.chunk_tokens = chunk_tokens(
            recipe.objective.chunk_tokens, "mlx", mx.default_device().type.name
        )
        self.max_grad_norm = recipe.optim.max_grad_norm
        if recipe.student.tuning != "full":
            cast_frozen(split.model, dtype)
        if recipe.student.gradient_checkpointing:
            models.checkpoint_layers(split)
        self.optimizer = make_optimizer(recipe)
        self.weights = split.model.trainable_parameters()
        self.optimizer.init(self.weights)
        self.gradients = None
        self.vocabulary = 0  # ids the loss compares; 0 = all of the head's rows
        self._value_and_grad = mx.value_and_grad(self._loss)
        mx.eval(split.model.parameters(), self.optimizer.state)

    @property
    def trainable(self) -> int:
        return sum(array.size for _, array in tree_flatten(self.weights))

    def accumulate(
        self, batch: Batch, targets, objective: Objective, loss_tokens: float
    ) -> LossSums:
        """Add the gradients of the batch's share of the step's loss; returns its sums. Evaluates
        everything before it returns.
        """
        try:
            (_, terms), gradients = self._value_and_grad(
                self.weights, batch, targets, objective, loss_tokens
            )
        finally:
            self.split.model.update(self.weights)  # the traced arrays must not stay
        if self.gradients is not None:
            gradients = tree_map(mx.add, self.gradients, gradients)
        mx.eval(terms, gradients)
        self.gradients = gradients
        return _sums(batch, terms)

    def score(self, batch: Batch, targets, objective: Objective) -> LossSums:
        """The same sums without gradients."""
        try:
            hidden, head = self._hidden(self.weights, batch), self._head_matrix(self.weights)
        finally:
            self.split.model.update(self.weights)
        teacher_hidden, teacher_head = self._teacher(targets, objective)
        rows = score_rows(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            mx.array(batch.targets),
            mx.array(batch.weight),
            objective,
            self.chunk_tokens,
            self.vocabulary,
        )
        terms = _terms(rows)
        mx.eval(terms)
        return _sums(batch, terms)

    def apply(self, learning_rate: float) -> float:
        """One optimizer step, clipped to `max_grad_norm`; the norm before clipping. If it is not
        finite nothing changes.
        """
        gradients, self.gradients = _over_all_ranks(self.gradients), None
        norm = mx.sqrt(
            tree_reduce(
                lambda total, g: total + mx.sum(mx.sum(g.reshape(g.shape[0], -1) ** 2, -1)),
                gradients,
                mx.array(0.0),
            )
        )
        value = norm.item()
        if not np.isfinite(value):
            return value
        if self.max_grad_norm:
            scale = min(1.0, self.max_grad_norm / (value + 1e-6))
            gradients = tree_map(lambda g: g * scale, gradients)
        self.optimizer.learning_rate = learning_rate
        self.weights = self.optimizer.apply_gradients(gradients, self.weights)
        self.split.model.update(self.weights)
        mx.eval(self.weights, self.optimizer.state)
        return value

    def save_state(self, folder: Path | None) -> None:
        """`weights.safetensors` (all trained arrays, float32) and `optimizer.safetensors`; every
        rank holds all of them.
        """
        if folder is None:
            return
        mx.save_safetensors(str(folder / "weights.safetensors"), dict(tree_flatten(self.weights)))
        mx.save_safetensors(
            str(folder / "optimizer.safetensors"), dict(tree_flatten(self.optimizer.state))
        )

    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        """Load what `save_state` wrote; `optimizer=False` for the weights alone. Raises
        `ModelError` on other arrays.
        """
        weights = mx.load(str(folder / "weights.safetensors"))
        expected = {key: array.shape for key, array in tree_flatten(self.weights)}
        if {key: array.shape for key, array in weights.items()} != expected:
            raise refusals.other_state(folder)
        self.weights = tree_unflatten(
            [(key, weights[key]) for key in expected]
        )  # in the model's order, in which norms are summed
        self.split.model.update(self.weights)
        self.gradients = None
        if optimizer:
            self.optimizer.state = tree_unflatten(
                list(mx.load(str(folder / "optimizer.safetensors")).items())
            )
        mx.eval(self.weights, self.optimizer.state)

    def state_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return sum(array.nbytes for _, array in tree_flatten([self.weights, self.optimizer.state]))

    def export_bytes(self) -> int:
        """Bytes of the exported weights, and of the float32 adapters beside them (in two layouts),
        at most.
        """
        return self.parameters * self._save_dtype.size + (
            8 * self.trainable if self.table.tuning != "full" else 0
        )

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        """A Hugging Face folder with adapters fused; the adapters themselves go to `adapters` and
        `adapters-peft` in it.
        """
        if folder is None:
            return
        save_folder(
            fused_weights(self.split.model, self.base),
            self.base,
            folder,
            self._save_dtype,
            stop_ids,
        )
        if self.table.tuning != "full":
            adapters = {key: np.array(array) for key, array in tree_flatten(self.weights)}
            write_adapters(folder, adapters, self.table, len(self.split.layers), self.split.name)

    @property
    def _save_dtype(self) -> mx.Dtype:
        return (
            self.split.stored_dtype
            if self.table.save_dtype == "base"
            else getattr(mx, self.table.save_dtype)
        )

    def _loss(self, weights: dict, batch: Batch, targets, objective: Objective, loss_tokens: float):
        hidden, head = self._hidden(weights, batch), self._head_matrix(weights)
        teacher_hidden, teacher_head = self._teacher(targets, objective)
        rows = kd_loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            mx.array(batch.targets),
            mx.array(batch.weight),
            objective,
            loss_tokens,
            self.chunk_tokens,
            self.table.tuning == "full",
            self.vocabulary,
        )
        return rows.loss, _terms(rows)

    def _teacher(
        self, targets, objective: Objective
    ) -> tuple[mx.array | None, Head | SparseHead | None]:
        """Targets of any kind as the loss takes them: (hidden states, head), (None, K answers) or
        (None, None).
        """
        if not isinstance(targets, SparseTargets):
            return targets or (None, None)
        targets.check(objective, self.vocabulary or self.vocabulary_rows)
        return None, SparseHead(
            *map(
                mx.array,
                (targets.ids, targets.log_probs, targets.tail, targets.offset, targets.top),
            )
        )

    def _hidden(self, weights: dict, batch: Batch) -> mx.array:
        check_indices("targets", batch.targets, self.vocabulary or self.vocabulary_rows)
        self.split.model.update(
            cast(weights, self.dtype) if self.table.tuning == "full" else weights
        )
        return self.gather(batch.tokens, batch.positions)

    def _head_matrix(self, weights: dict) -> mx.array:
        """[V, D]: the trained float32 matrix, not its cast copy; the frozen one with adapters."""
        path = self.split.head_path
        if self.table.tuning != "full":
            return self.split.head_matrix()
        for part in path.split("."):
            weights = weights[part]
        return weights


LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # what `mlx.launch` sets, by its way of connecting


@cache
def _join() -> Ranks:
    """The group that `mlx.launch` started this process for; alone where none did."""
    if not any(name in os.environ for name in LAUNCHED):
        return Ranks()
    group = mx.distributed.init()
    return Ranks(group.rank(), group.size())


def _over_all_ranks(gradients: dict) -> dict:
    """Summed: the loss was divided by the tokens of all ranks."""
    return gradients if _join().size == 1 else tree_map(mx.distributed.all_sum, gradients)


def make_optimizer(recipe: Recipe) -> optimizers.Optimizer:
    """The recipe's optimizer: AdamW with bias correction (MLX's default has none), Lion, Adafactor
    (its rate is `learning_rate` times each weight's RMS, 1e-3 at least: MLX's and transformers'
    default).
    """
    table = recipe.optim
    if table.optimizer == "adamw":
        return optimizers.AdamW(
            table.learning_rate,
            betas=[table.beta1, table.beta2],
            eps=table.eps,
            weight_decay=table.weight_decay,
            bias_correction=True,
        )
    if table.optimizer == "lion":
        return optimizers.Lion(
            table.learning_rate, betas=[table.beta1, table.beta2], weight_decay=table.weight_decay
        )
    return optimizers.Adafactor(
        table.learning_rate, weight_decay=table.weight_decay, relative_step=False
    )


def _top_k(log_probs: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """Ids and log-probabilities [C, k], the likeliest first, and the log of what is left [C]."""
    ids = mx.argpartition(-log_probs, k - 1, axis=1)[:, :k]
    values = mx.take_along_axis(log_probs, ids, axis=1)
    order = mx.argsort(-values, axis=1)
    ids = mx.take_along_axis(ids, order, axis=1).astype(mx.int32)
    values = mx.take_along_axis(values, order, axis=1)
    # sorting may leave any of equally likely ids in front, and the first one out
    top = mx.argmax(log_probs, axis=1, keepdims=True).astype(mx.int32)
    ids = mx.where(mx.arange(k) == 0, top, mx.where(ids == top, ids[:, :1], ids))
    if k == log_probs.shape[1]:
        tail = mx.full((len(ids),), -mx.inf)
    else:
        tail = mx.logsumexp(mx.put_along_axis(log_probs, ids, mx.array(-mx.inf), axis=1), axis=1)
    return ids, values, tail


def _draw(log_probs: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Ids [C, S] whose cumulated probability first exceeds `uniform` [C, S], entropy [C] in nats,
    most likely id [C].
    """
    probs, (count, vocab) = mx.exp(log_probs), log_probs.shape
    # sums of sums: a GPU has no float64, and a float32 running sum over a vocabulary loses
    # digits
    size = math.isqrt(vocab) + 1
    blocks = mx.pad(probs, [(0, 0), (0, -vocab % size)]).reshape(count, -1, size)
    sums = mx.cumsum(blocks.sum(axis=2), axis=1)
    cumulated = (mx.cumsum(blocks, axis=2) + (sums - blocks.sum(axis=2))[..., None]).reshape(
        count, -1
    )
    wanted = uniform * sums[:, -1:]
    low, high = mx.zeros(uniform.shape, mx.int32), mx.full(uniform.shape, vocab - 1)
    for _ in range(vocab.bit_length()):
        middle = (low + high) // 2
        before = mx.take_along_axis(cumulated, middle, axis=1) <= wanted
        low, high = (
            mx.where(before, mx.minimum(middle + 1, high), low),
            mx.where(before, high, middle),
        )
    entropy = -(probs * mx.maximum(log_probs, FLOOR)).sum(axis=1)
    return low, entropy, mx.argmax(log_probs, axis=1).astype(mx.int32)


def _bits(array: mx.array) -> np.ndarray:
    """bfloat16 as uint16 bits, anything else as float32."""
    return np.array(
        array.view(mx.uint16) if array.dtype == mx.bfloat16 else array.astype(mx.float32)
    )


def _of_bits(array: np.ndarray) -> mx.array:
    """float32 as it is; uint16 holds the bits of bfloat16."""
    return mx.array(array).view(mx.bfloat16) if array.dtype == np.uint16 else mx.array(array)


def _terms(rows: LossRows) -> dict[str, mx.array]:
    """All rows but the loss itself, by name."""
    return dict(zip(rows._fields[1:], rows[1:], strict=True))


def _sums(batch: Batch, terms: dict[str, mx.array]) -> LossSums:
    return LossSums.of(batch, {name: np.array(row) for name, row in terms.items()})


def _mean_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    matrix: np.ndarray,
    targets: np.ndarray,
    objective: Objective,
) -> tuple[float, np.ndarray]:
    head, rows = mx.array(matrix), len(targets)

    def total(hidden: mx.array) -> mx.array:
        rest = (mx.array(teacher), MatrixHead(head), mx.array(targets), mx.ones(rows))
        return kd_loss(hidden, head, *rest, objective, rows, 4, False).loss

    value, gradient = mx.value_and_grad(total)(mx.array(student))
    return value.item(), np.array(gradient)


def _sampler(temperature: float, top_p: float) -> Callable[[mx.array], mx.array]:
    """Log-probabilities → token. The temperature comes before the cut to `top_p`, as in
    transformers (mlx-lm has it after).
    """
    from mlx_lm.sample_utils import make_sampler

    if not temperature:
        return make_sampler(0.0)
    sample = make_sampler(1.0, top_p=top_p if top_p < 1 else 0.0)
    return lambda logprobs: sample((logprobs - logprobs.max(axis=-1, keepdims=True)) / temperature)
