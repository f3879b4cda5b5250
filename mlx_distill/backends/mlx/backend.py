"""MLX behind `backends/protocol.py`: its device and number formats, loading, memory.

numpy comes in and goes out; MLX arrays stay in this folder, of which `teacher.py` and `student.py`
are the two models. Decided here: what is computed in which number format.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_distill.backends.failures import explained
from mlx_distill.backends.mlx import loading
from mlx_distill.backends.mlx import ranks as together
from mlx_distill.backends.mlx.heads import Head, MatrixHead
from mlx_distill.backends.mlx.self_test import MlxSelfTest
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.backends.mlx.teacher import LiveTargets, MlxTeacher, from_bits
from mlx_distill.backends.mlx.weights import cast
from mlx_distill.backends.protocol import DeviceInfo, Memory
from mlx_distill.blas import load_blas
from mlx_distill.machine import NO_BFLOAT16, gpu_has_bfloat16, is_kept_off_gpu, jobs_beside
from mlx_distill.recipe.recipe import Recipe

SEES_NO_GPU = "MLX sees no GPU; half precision is slow on a CPU"

# Of the working set. The arrays of one step are made again in the next; those of batches of another
# shape are not (one LoRA run's footprint fell from 51 to 7 GiB without them: mlx-lm).
CACHED_SHARE = 0.25


class MlxBackend:
    """MLX on Metal, CUDA or a CPU, whichever the installed wheel runs on."""

    name = "mlx"

    def __init__(self) -> None:
        self.ranks = together.join()

    def device(self) -> DeviceInfo:
        ranks = f" x {self.ranks.size}" if self.ranks.size > 1 else ""
        if mx.default_device().type == mx.DeviceType.gpu:
            kind = "Metal" if mx.metal.is_available() else "CUDA"
            gpu = f"{kind} ({mx.device_info().get('device_name', 'GPU')}{ranks})"
            if kind == "CUDA" and not gpu_has_bfloat16():
                reason = f"MLX sees a CUDA GPU, which {NO_BFLOAT16}"
                return DeviceInfo(self.name, gpu, "float32", reason, "")
            return DeviceInfo(self.name, gpu, "bfloat16", f"MLX sees a {kind} GPU", "")
        blas = load_blas()
        return DeviceInfo(
            self.name,
            f"CPU ({platform.machine()}{ranks}, BLAS: {blas.name})",
            "float32",
            "MLX_DISTILL_DEVICE=cpu" if is_kept_off_gpu() else SEES_NO_GPU,
            blas.advice,
        )

    def dtype(self, asked: str) -> mx.Dtype:
        return getattr(mx, self.device().dtype if asked == "auto" else asked)

    def load_teacher(
        self, folder: Path, name: str, quantize_bits: int | str = 0, dtype: str = "auto"
    ) -> MlxTeacher:
        with explained(f"loading {name}"):
            split = loading.load_teacher(folder, name, quantize_bits)
            if dtype != "auto" or self.device().dtype == "float32":
                split.model.update(cast(split.model.parameters(), self.dtype(dtype)))
                mx.eval(split.model.parameters())
            if dtype == "float16":
                split.refuse_overflow()
            return MlxTeacher(split)

    def load_student(self, folder: Path, name: str, recipe: Recipe) -> MlxStudent:
        with explained(f"loading {name}"):
            split = loading.load_student(folder, name, recipe.student, recipe.run.seed)
            return MlxStudent(split, folder, recipe, self.dtype(recipe.student.compute_dtype))

    def cached_head(self, matrix: np.ndarray) -> Head:
        return MatrixHead(from_bits(matrix))

    def cached_targets(self, states: np.ndarray, head: Head) -> LiveTargets:
        return LiveTargets(from_bits(states), head)

    def all_sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of float64 `values` over all ranks, on each."""
        return together.all_sum(values)

    def part(self) -> None:
        """Nothing here is spread over ranks but gradients."""

    def memory(self) -> Memory:
        return Memory(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory())

    @contextmanager
    def training_limits(self) -> Iterator[None]:
        """Metal keeps the working set wired, so that weights are not paged out between steps, and
        the allocator keeps a quarter of it for reuse (MLX's own limit is more than all of it). Both
        count for one process: those beside it on this machine get their shares.
        """
        processes = jobs_beside() * together.on_this_machine()
        if not mx.metal.is_available() or mx.default_device().type != mx.DeviceType.gpu:
            yield
            return
        share = int(mx.device_info()["max_recommended_working_set_size"]) // processes
        wired = mx.set_wired_limit(share)
        cache = mx.set_cache_limit(int(CACHED_SHARE * share))
        try:
            yield
        finally:
            mx.set_wired_limit(wired)
            mx.set_cache_limit(cache)
            mx.clear_cache()

    def reset_peak_memory(self) -> None:
        mx.reset_peak_memory()

    def self_test(self) -> MlxSelfTest:
        return MlxSelfTest(self.dtype("auto"))

    def release(self) -> None:
        """Give back the allocator's cache, after a model has gone."""
        mx.clear_cache()
