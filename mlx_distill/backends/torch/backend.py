"""torch's teacher and student: the verbs of `backends/protocol.py` in transformers' models, torch's
optimizers and our loss.

numpy comes in and goes out; torch tensors stay here. Decided here: number formats by device, how
ranks share the work, and what a checkpoint of the student holds (MLX's names and shapes, so that
either backend continues what the other began). Mirrors `backends/mlx/backend.py`.
"""

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mlx_distill.backends import oracle, refusals
from mlx_distill.backends.adapters import write_adapters
from mlx_distill.backends.chunks import chunk_tokens
from mlx_distill.backends.protocol import (
    DeviceInfo,
    LossSums,
    Memory,
    Ranks,
    Sampling,
    SparseTargets,
    check_indices,
)
from mlx_distill.backends.torch import loading, resident
from mlx_distill.backends.torch import model as models
from mlx_distill.backends.torch import ranks as together
from mlx_distill.backends.torch.adapters import (
    canonical,
    fused_weights,
    is_transposed,
    parameter_count,
)
from mlx_distill.backends.torch.heads import FLOOR, Head, MatrixHead, SparseHead
from mlx_distill.backends.torch.loss import LossRows, kd_loss, score_rows
from mlx_distill.backends.torch.weights import save_folder
from mlx_distill.data.batches import Batch
from mlx_distill.errors import ModelError, OutOfMemory
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe

TEACHER_CHUNK = 128  # positions whose logits exist at once while a cache is written


class TorchBackend:
    """torch on a CUDA GPU where there is one, else on the CPU."""

    name = "torch"

    def __init__(self) -> None:
        self._device = (
            torch.device("cuda", together.local_rank())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self.ranks: Ranks = together.join(self._device)

    def device(self) -> DeviceInfo:
        ranks = f" x {self.ranks.size}" if self.ranks.size > 1 else ""
        if self._device.type == "cuda":
            gpu = torch.cuda.get_device_name(self._device)
            return DeviceInfo(
                self.name, f"CUDA ({gpu}{ranks})", "bfloat16", "torch sees a CUDA GPU", ""
            )
        return DeviceInfo(
            self.name,
            f"CPU ({platform.machine()}{ranks}, torch {torch.__version__})",
            "float32",
            "torch sees no CUDA GPU; half precision is for GPUs",
            "",
        )

    def dtype(self, asked: str) -> torch.dtype:
        return getattr(torch, self.device().dtype if asked == "auto" else asked)

    def load_teacher(self, folder: Path, name: str, quantize_bits: int = 0) -> "TorchTeacher":
        with _explained(f"loading {name}"):
            dtype = torch.float32 if self._device.type == "cpu" else None
            return TorchTeacher(
                loading.load_teacher(folder, name, quantize_bits, self._device, dtype)
            )

    def load_student(self, folder: Path, name: str, recipe: Recipe) -> "TorchStudent":
        with _explained(f"loading {name}"):
            dtype = self.dtype(recipe.student.compute_dtype)
            split = loading.load_student(
                folder, name, recipe.student, recipe.run.seed, self._device, dtype
            )
            return TorchStudent(split, folder, recipe, dtype)

    def cached_head(self, matrix: np.ndarray) -> Head:
        return MatrixHead(self._of_bits(matrix))

    def cached_targets(self, states: np.ndarray, head: Head) -> tuple[Tensor, Head]:
        return self._of_bits(states), head

    def _of_bits(self, array: np.ndarray) -> Tensor:
        """float32 as it is; uint16 holds the bits of bfloat16."""
        tensor = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array).to(
            self._device
        )
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of float64 `values` over all ranks, on each."""
        return together.all_sum(values, self._device)

    def part(self) -> None:
        """Leave the other ranks."""
        together.part()

    def memory(self) -> Memory:
        if self._device.type == "cpu":
            return resident.memory()
        active = torch.cuda.memory_allocated(self._device)
        return Memory(
            active,
            torch.cuda.memory_reserved(self._device) - active,
            torch.cuda.max_memory_allocated(self._device),
        )

    def reset_peak_memory(self) -> None:
        if self._device.type == "cpu":
            resident.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)

    def loss_error(self) -> float:
        """Largest relative error of a tiny loss and its gradient against the float64 definition."""
        return oracle.loss_error(lambda *case: _mean_loss(*case, device=self._device))

    def matmul_rate(self, size: int = 0, repeats: int = 8) -> float:
        """Measured operations a second of `size`³ products in the dtype that "auto" trains in; by
        default large enough to keep it busy.
        """
        size = size or (8192 if self._device.type == "cuda" else 1024)
        left = torch.ones((size, size), dtype=self.dtype("auto"), device=self._device)
        (left @ left).sum().item()  # which waits for a GPU
        started = time.perf_counter()
        for _ in range(repeats):
            product = left @ left
        product.sum().item()
        return repeats * 2 * size**3 / (time.perf_counter() - started)

    def release(self) -> None:
        """Give back the allocator's cache, after a model has gone; checkpointed and sharded blocks
        refer to themselves.
        """
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class TorchModel:
    """What teacher and student share: hidden states, generation, size."""

    def __init__(self, split: models.SplitModel):
        self.split, self.notes = (
            split,
            (),
        )  # transformers' own reading of the folder is the right one
        self.device = split.device
        self.parameters = parameter_count(split.model)
        self.vocabulary_rows = split.head_rows()

    def gather(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """The hidden states [N, D] at flat `positions` [N] of `tokens` [B, T]; all indices are
        checked, CUDA's checks kill the process.
        """
        check_indices("tokens", tokens, self.vocabulary_rows)
        check_indices("loss positions", positions, tokens.size)
        hidden = self.split.hidden(self.tensor(tokens).long())
        return hidden.reshape(-1, hidden.shape[-1])[self.tensor(positions).long()]

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def precision(self) -> AbstractContextManager:
        """What a forward pass is computed in."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Iterator[tuple[int, list[int]]]:
        """(which prompt, its new ids), a batch at a time, the stop id included where one came."""
        torch.manual_seed(sampling.seed)
        self.split.model.generation_config = _generation(sampling)
        # the longest first: they need the most memory
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), sampling.batch_size):
            group = order[start : start + sampling.batch_size]
            with self.precision(), _explained("generating"):
                texts = self._generate([prompts[i] for i in group], sampling.stop_ids)
            yield from zip(group, texts, strict=True)

    def _generate(self, prompts: list[Sequence[int]], stop_ids: frozenset[int]) -> list[list[int]]:
        """One batch, padded at the left."""
        width = max(map(len, prompts))
        tokens = self.tensor(
            np.array([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        )
        mask = self.tensor(
            np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        )
        texts = self.split.model.generate(tokens, attention_mask=mask)[:, width:].tolist()
        return [
            text[: next((i + 1 for i, token in enumerate(text) if token in stop_ids), None)]
            for text in texts
        ]


class TorchTeacher(TorchModel):
    """A frozen model. Its targets are hidden states [N, D] and its head: [N, V] is never made."""

    def __init__(self, split: models.SplitModel):
        super().__init__(split)
        self._head = split.loss_head()
        together.shard(split)

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Tensor, Head]:
        with _explained("the teacher's forward pass"):
            return self.gather(batch.tokens, batch.positions), self._head

    @torch.no_grad()
    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._by_chunk(batch, rows, partial(_top_k, k=k))

    @torch.no_grad()
    def draw(
        self, batch: Batch, uniform: np.ndarray, rows: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._by_chunk(batch, rows, _draw, self.tensor(uniform))

    @torch.no_grad()
    def states(self, batch: Batch) -> np.ndarray:
        hidden, _ = self.targets(batch)
        return _bits(hidden)

    def head_matrix(self) -> np.ndarray | None:
        plain = (
            isinstance(self._head, MatrixHead)
            and self._head.bias is None
            and self._head.finish is None
        )
        return _bits(self._head.weight) if plain else None

    def _by_chunk(
        self, batch: Batch, rows: int, answer: Callable, *inputs: Tensor
    ) -> tuple[np.ndarray, ...]:
        """`answer(log-probabilities [C, rows], inputs [C, …])` of all N positions, by chunks of
        them.
        """
        hidden, head = self.targets(batch)
        columns = []
        for start in range(0, len(hidden), TEACHER_CHUNK):
            place = slice(start, start + TEACHER_CHUNK)
            part = hidden[place] if hidden.is_cuda else hidden[place].float()
            found = answer(
                head.logits(part, rows).log_softmax(1), *(array[place] for array in inputs)
            )
            columns.append([column.cpu().numpy() for column in found])
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


class TorchStudent(TorchModel):
    """A model that trains: float32 weights (full) or adapters, an optimizer, and the gradients of
    the step under way.
    """

    def __init__(self, split: models.SplitModel, base: Path, recipe: Recipe, dtype: torch.dtype):
        super().__init__(split)
        self.base, self.table, self.dtype = base, recipe.student, dtype
        self.chunk_tokens = chunk_tokens(recipe.objective.chunk_tokens, "torch", self.device.type)
        self.max_grad_norm = recipe.optim.max_grad_norm
        if recipe.student.gradient_checkpointing:
            models.checkpoint_layers(split)
            if self.device.type == "cpu":
                resident.return_freed_blocks()
        self.head_path = split.head_path
        together.shard(
            split, trains=True, dtype=dtype if recipe.student.tuning == "full" else torch.float32
        )
        named = dict(split.model.named_parameters())
        self.head = named[self.head_path]
        self.weights = {
            name: parameter for name, parameter in named.items() if parameter.requires_grad
        }
        self.optimizer = make_optimizer(recipe, list(self.weights.values()), self.ranked)
        self.vocabulary = 0  # ids the loss compares; 0 = all of the head's rows

    @property
    def ranked(self) -> bool:
        return together.size() > 1

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.weights.values())

    def precision(self) -> AbstractContextManager:
        """Full tuning computes in `dtype` over float32 weights; with adapters the frozen weights
        are of that type themselves.
        """
        half = self.table.tuning == "full" and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=half)

    def accumulate(
        self, batch: Batch, targets, objective: Objective, loss_tokens: float
    ) -> LossSums:
        """Add the gradients of the batch's share of the step's loss; returns its sums."""
        with _explained("a training step"):
            arguments = self._arguments(batch, targets, objective)
            rows = kd_loss(
                *arguments,
                loss_tokens,
                self.chunk_tokens,
                self.table.tuning == "full",
                self.vocabulary,
                self.dtype,
            )
            rows.loss.backward()
            return _sums(batch, rows)

    @torch.no_grad()
    def score(self, batch: Batch, targets, objective: Objective) -> LossSums:
        """The same sums without gradients."""
        with _explained("validation"):
            rows = score_rows(
                *self._arguments(batch, targets, objective),
                self.chunk_tokens,
                self.vocabulary,
                self.dtype,
            )
            return _sums(batch, rows)

    def _arguments(self, batch: Batch, targets, objective: Objective) -> tuple:
        check_indices("targets", batch.targets, self.vocabulary or self.vocabulary_rows)
        with self.precision():
            hidden = self.gather(batch.tokens, batch.positions)
        head = together.whole_with_gradient(self.head)
        return (
            hidden,
            head,
            *self._teacher(targets, objective),
            self.tensor(batch.targets),
            self.tensor(batch.weight),
            objective,
        )

    def _teacher(
        self, targets, objective: Objective
    ) -> tuple[Tensor | None, Head | SparseHead | None]:
        """Targets of any kind as the loss takes them: (hidden states, head), (None, K answers) or
        (None, None).
        """
        if not isinstance(targets, SparseTargets):
            return targets or (None, None)
        targets.check(objective, self.vocabulary or self.vocabulary_rows)
        return None, SparseHead(
            *map(
                self.tensor,
                (targets.ids, targets.log_probs, targets.tail, targets.offset, targets.top),
            )
        )

    def apply(self, learning_rate: float) -> float:
        """One optimizer step, clipped to `max_grad_norm`; the norm before clipping. If it is not
        finite nothing changes.
        """
        with _explained("an optimizer step"):
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

    # state

    def save_state(self, folder: Path | None) -> None:
        """`weights.safetensors` (all trained arrays, float32) and `optimizer.safetensors`; other
        ranks than the first help with None.
        """
        with _explained("gathering a checkpoint"):
            weights = _gathered(self._weight_arrays(), folder is not None)
            optimizer = _gathered(self._optimizer_arrays(), folder is not None)
        if folder:
            save_file(weights, folder / "weights.safetensors")
            save_file(optimizer, folder / "optimizer.safetensors")

    def _weight_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        return (
            (canonical(name), _kept(name, parameter)) for name, parameter in self.weights.items()
        )

    def _optimizer_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "learning_rate", np.array(self.optimizer.param_groups[0]["lr"], np.float32)
        step = 0
        for name, parameter in self.weights.items():
            state = self.optimizer.state[parameter]
            step = int(state["step"])
            for ours, theirs in _state_names(name, state).items():
                yield f"{canonical(name)}.{theirs}", _kept(name, state[ours])
        yield "step", np.array(step, np.uint64)

    @torch.no_grad()
    def restore_state(self, folder: Path, optimizer: bool = True) -> None:
        """Load what `save_state` wrote; `optimizer=False` for the weights alone. Raises
        `ModelError` on other arrays.
        """
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
        if optimizer:
            arrays = load_file(folder / "optimizer.safetensors")
            for name, parameter in self.weights.items():
                state = self.optimizer.state[parameter]
                state["step"] = _like(state["step"], int(arrays["step"]))
                for ours, theirs in _state_names(name, state).items():
                    _restore(state[ours], arrays[f"{canonical(name)}.{theirs}"], name)

    def state_bytes(self) -> int:
        """Bytes of one checkpoint."""
        moments = (
            tensor
            for parameter in self.weights.values()
            for key, tensor in self.optimizer.state[parameter].items()
            if key not in ("step", "RMS")
        )
        return 4 * (self.trainable + sum(tensor.numel() for tensor in moments))

    def export_bytes(self) -> int:
        """Bytes of the exported weights, and of the float32 adapters beside them (in two layouts),
        at most.
        """
        return self.parameters * self._save_dtype.itemsize + (
            8 * self.trainable if self.table.tuning != "full" else 0
        )

    def export(self, folder: Path | None, stop_ids: list[int]) -> None:
        """A Hugging Face folder with adapters fused; the adapters themselves go to `adapters` and
        `adapters-peft` in it.
        """
        if self.table.tuning == "full":
            with _explained("gathering the student"):
                fused = _gathered(
                    ((name, _whole(parameter)) for name, parameter in self.weights.items()),
                    folder is not None,
                )
        if folder is None:
            return
        if self.table.tuning != "full":
            fused, adapters = (
                fused_weights(self.split, self.base),
                dict(self._weight_arrays()),
            )
            write_adapters(folder, adapters, self.table, len(self.split.layers), self.split.name)
        save_folder(fused, self.base, folder, self._save_dtype, stop_ids)

    @property
    def _save_dtype(self) -> torch.dtype:
        return (
            self.split.stored_dtype
            if self.table.save_dtype == "base"
            else getattr(torch, self.table.save_dtype)
        )


def make_optimizer(
    recipe: Recipe, parameters: list[Tensor], ranked: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimizer with its state made: torch's AdamW, or transformers' Adafactor, whose
    rule is MLX's (torch's own is not).
    """
    table = recipe.optim
    if table.optimizer == "adamw":
        made = torch.optim.AdamW(
            parameters,
            table.learning_rate,
            (table.beta1, table.beta2),
            table.eps,
            table.weight_decay,
            fused=True,
        )
    elif table.optimizer == "adafactor" and not ranked:
        made = transformers.Adafactor(
            parameters, table.learning_rate, weight_decay=table.weight_decay, relative_step=False
        )
    else:
        where = "torch on several ranks" if table.optimizer == "adafactor" else "torch"
        raise ModelError(
            f'optim.optimizer = "{table.optimizer}" asked, but {where} has none: choose "adamw", '
            "or --backend mlx"
        )
    for parameter in parameters:
        made.state[parameter] = _moments(parameter, table.optimizer)
    return made


def _moments(parameter: Tensor, optimizer: str) -> dict[str, Tensor | int]:
    """The state before the first step, zero: what the optimizer itself would make in it."""
    if optimizer == "adamw":
        step = torch.zeros((), device=parameter.device)
        return {
            "step": step,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if parameter.ndim < 2:
        return {"step": 0, "exp_avg_sq": torch.zeros_like(parameter), "RMS": 0}
    rows, columns = (
        parameter.new_zeros(parameter.shape[:-1]),
        parameter.new_zeros(parameter.shape[:-2] + parameter.shape[-1:]),
    )
    return {"step": 0, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns, "RMS": 0}


ADAMW_NAMES = {"exp_avg": "m", "exp_avg_sq": "v"}


def _state_names(name: str, state: dict) -> dict[str, str]:
    """torch's names of the moments → MLX's; a transposed parameter's row sums are columns there."""
    if "exp_avg" in state:
        return ADAMW_NAMES
    if "exp_avg_sq" in state:
        return {"exp_avg_sq": "exp_avg_sq"}
    rows, columns = "exp_avg_sq_row", "exp_avg_sq_col"
    return {rows: columns, columns: rows} if is_transposed(name) else {rows: rows, columns: columns}


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


def _generation(sampling: Sampling) -> transformers.GenerationConfig:
    """Greedy or sampled, and nothing of what the model's own `generation_config.json` asks for."""
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(sampling.stop_ids) or None,
        pad_token_id=0,
        use_cache=True,
        do_sample=sampling.temperature > 0,
        **(drawn if sampling.temperature else {}),
    )


def _mean_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    matrix: np.ndarray,
    targets: np.ndarray,
    objective: Objective,
    device: torch.device,
) -> tuple[float, np.ndarray]:
    hidden, teacher_hidden, head, ids = (
        torch.from_numpy(array).to(device) for array in (student, teacher, matrix, targets)
    )
    rows = len(targets)
    weight = torch.ones(rows, device=device)
    loss = kd_loss(
        hidden.requires_grad_(),
        head,
        teacher_hidden,
        MatrixHead(head),
        ids,
        weight,
        objective,
        rows,
        4,
        False,
    ).loss
    loss.backward()
    return loss.item(), hidden.grad.cpu().numpy()


def _top_k(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and log-probabilities [C, k], the likeliest first, and the log of what is left [C]."""
    values, ids = log_probs.topk(k, dim=1)
    # `topk` may leave any of equally likely ids in front, and the first one out
    top = log_probs.argmax(1, keepdim=True)
    ids = torch.where(
        torch.arange(k, device=ids.device) == 0, top, torch.where(ids == top, ids[:, :1], ids)
    )
    return ids.int(), values, log_probs.scatter(1, ids, -torch.inf).logsumexp(1)


def _draw(log_probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [C, S] whose cumulated probability first exceeds `uniform` [C, S], entropy [C] in nats,
    most likely id [C].
    """
    cumulated = log_probs.double().exp().cumsum(1)
    drawn = torch.searchsorted(cumulated, uniform.double() * cumulated[:, -1:], right=True)
    entropy = -(log_probs.exp() * log_probs.clamp(min=FLOOR)).sum(1)
    return drawn.clamp(max=log_probs.shape[1] - 1).int(), entropy, log_probs.argmax(1).int()


def _bits(tensor: Tensor) -> np.ndarray:
    """On the CPU as numpy: bfloat16 as uint16 bits, anything else as float32."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    return tensor.float().cpu().numpy()


def _sums(batch: Batch, rows: LossRows) -> LossSums:
    _, *names = rows._fields
    values = torch.stack(rows[1:]).cpu().numpy()  # which waits for the GPU once
    return LossSums.of(batch, dict(zip(names, values, strict=True)))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn CUDA's out-of-memory and a lost rank into errors of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).partition(" Including")[0].rstrip(".")
        raise OutOfMemory(f"{what} does not fit the GPU's memory ({reason[:200]})") from None
    except RuntimeError as error:
        if together.size() > 1 and together.is_loss_of_a_rank(error):
            raise together.lost(what, error) from None
        raise
