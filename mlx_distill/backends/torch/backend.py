"""torch behind `backends/protocol.py`: its device and number formats, loading, memory.

numpy comes in and goes out; torch tensors stay in this folder, of which `teacher.py` and
`student.py` are the two models. Mirrors `backends/mlx/`. Decided here: what is computed in which
number format.
"""

import gc
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from mlx_distill.backends.protocol import DeviceInfo, Memory, Ranks
from mlx_distill.backends.torch import loading, resident
from mlx_distill.backends.torch import ranks as together
from mlx_distill.backends.torch.failures import explained
from mlx_distill.backends.torch.heads import Head, MatrixHead
from mlx_distill.backends.torch.self_test import TorchSelfTest
from mlx_distill.backends.torch.student import TorchStudent
from mlx_distill.backends.torch.teacher import LiveTargets, TorchTeacher, from_bits
from mlx_distill.errors import RecipeError
from mlx_distill.machine import AMPERE, NO_BFLOAT16
from mlx_distill.recipe.recipe import Recipe


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
            dtype, reason = "bfloat16", "torch sees a CUDA GPU"
            if not self._has_bfloat16():
                dtype, reason = "float32", f"torch sees a CUDA GPU, which {NO_BFLOAT16}"
            return DeviceInfo(self.name, f"CUDA ({gpu}{ranks})", dtype, reason, "")
        return DeviceInfo(
            self.name,
            f"CPU ({platform.machine()}{ranks}, torch {torch.__version__})",
            "float32",
            "torch sees no CUDA GPU; half precision is for GPUs",
            "",
        )

    def dtype(self, asked: str) -> torch.dtype:
        """Raises `RecipeError` for a format that the device would only imitate."""
        if asked == "bfloat16" and not self._has_bfloat16():
            gpu = torch.cuda.get_device_name(self._device)
            raise RecipeError(
                f'compute_dtype = "bfloat16": the {gpu} {NO_BFLOAT16}: set "float32", or "auto"'
            )
        return getattr(torch, self.device().dtype if asked == "auto" else asked)

    def _has_bfloat16(self) -> bool:
        """A CPU computes in it, slowly or not; of NVIDIA's GPUs those from Ampere on."""
        return self._device.type == "cpu" or (
            torch.cuda.get_device_capability(self._device) >= AMPERE
        )

    def load_teacher(
        self, folder: Path, name: str, quantize_bits: int | str = 0, dtype: str = "auto"
    ) -> TorchTeacher:
        on_gpu = self._device.type != "cpu"
        as_stored = dtype == "auto" and on_gpu and self._has_bfloat16()
        asked = None if as_stored else self.dtype(dtype)
        with explained(f"loading {name}"):
            return TorchTeacher(
                loading.load_teacher(folder, name, quantize_bits, self._device, asked)
            )

    def load_student(self, folder: Path, name: str, recipe: Recipe) -> TorchStudent:
        with explained(f"loading {name}"):
            dtype = self.dtype(recipe.student.compute_dtype)
            split = loading.load_student(
                folder, name, recipe.student, recipe.run.seed, self._device, dtype
            )
            return TorchStudent(split, folder, recipe, dtype)

    def cached_head(self, matrix: np.ndarray) -> Head:
        return MatrixHead(from_bits(matrix, self._device))

    def cached_targets(self, states: np.ndarray, head: Head) -> LiveTargets:
        return LiveTargets(from_bits(states, self._device), head)

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

    def training_limits(self) -> AbstractContextManager[None]:
        """torch's allocator has none that would help."""
        return nullcontext()

    def reset_peak_memory(self) -> None:
        if self._device.type == "cpu":
            resident.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self._device)

    def self_test(self) -> TorchSelfTest:
        return TorchSelfTest(self._device, self.dtype("auto"))

    def release(self) -> None:
        """Give back the allocator's cache, after a model has gone; checkpointed and sharded blocks
        refer to themselves.
        """
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
