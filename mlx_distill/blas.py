"""An optimised BLAS for MLX on a Linux CPU.

The `mlx[cpu]` wheel links a reference BLAS (about 5 GFLOP/s in float32 on two cores). A library
that exports the same symbols, loaded with RTLD_GLOBAL before the first `import mlx.core`, takes
their place; here that was 60 times faster. Where there is none, the OpenBLAS inside scipy, whose
functions have other names, is put into the three slots through which MLX multiplies. Decided here:
where to look, in which order, and what to say when nothing is found. macOS has Accelerate and
Metal.
"""

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill import slots

PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # what MLX's CPU products call
ADVICE = (
    "no optimised BLAS found: MLX will be some 50 times slower than it could be on this CPU; "
    "`apt install libopenblas0-pthread` (or `pip install mkl`) mends that"
)


@dataclass(frozen=True)
class Blas:
    """What MLX's matrix products run on: a `name` to print, and `advice` if that could be better
    ("" if not).
    """

    name: str
    advice: str = ""


@cache
def load_blas() -> Blas:
    """Load the first optimised BLAS found; call it before `mlx.core` is imported. Later calls
    return the same answer.

    `MLX_DISTILL_BLAS` names a library to use instead ("bundled" loads none, "scipy" takes
    scipy's).
    """
    if sys.platform != "linux":
        return Blas("Accelerate")
    asked = os.environ.get("MLX_DISTILL_BLAS", "")
    if asked == "bundled":
        return Blas("bundled", ADVICE)
    if "mlx.core" in sys.modules:
        return Blas(
            "unknown",
            "mlx.core was imported before mlx_distill could load an optimised BLAS: import "
            "mlx_distill first",
        )
    if asked == "scipy":
        return _of_scipy()
    for name, library in [(asked, asked)] if asked else _candidates():
        try:
            if _exports_blas(ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)):
                return Blas(name)
        except OSError:
            continue
    if asked:
        why = f"MLX_DISTILL_BLAS={asked} could not be loaded or has no sgemm_; {ADVICE}"
        return Blas("bundled", why)
    return _of_scipy()


def _candidates() -> list[tuple[str, str]]:
    """(name, library) in order of preference; torch is found without importing it."""
    found = [
        ("OpenBLAS", "libopenblas.so.0"),
        *(
            ("MKL", folder + name)
            for name in ("libmkl_rt.so.3", "libmkl_rt.so.2")
            for folder in ("", f"{sys.prefix}/lib/")
        ),
    ]
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        found.append(("torch", str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so")))
    return found


def _exports_blas(library: ctypes.CDLL) -> bool:
    return hasattr(library, "sgemm_")


def _of_scipy() -> Blas:
    """Point MLX's products at the OpenBLAS that scipy brings, and keep that where it multiplies
    right. It imports `mlx.core`, which has to be loaded to be changed.
    """
    try:
        ours = _scipy_library()
        core = importlib.util.find_spec("mlx")
        if ours is None or core is None or not core.submodule_search_locations:
            return Blas("bundled", ADVICE)
        import mlx.core

        libmlx = Path(core.submodule_search_locations[0]) / "lib" / "libmlx.so"
        library = ctypes.CDLL(str(ours))  # by its own names, so that nothing else finds it
        functions = {
            name: ctypes.cast(getattr(library, f"scipy_{name}"), ctypes.c_void_p).value or 0
            for name in PRODUCTS
        }
        before = slots.point(libmlx, functions)
        if multiplies_right(mlx.core):
            return Blas("OpenBLAS of scipy")
        slots.point(libmlx, before)
        return Blas("bundled", f"{ours.name} of scipy multiplies wrong under MLX; {ADVICE}")
    except (OSError, ValueError, AttributeError, ImportError, IndexError) as error:
        return Blas("bundled", f"scipy's OpenBLAS cannot be used ({error}); {ADVICE}")


def _scipy_library() -> Path | None:
    """The OpenBLAS with 32-bit integers in scipy's wheel; scipy is not imported."""
    spec = importlib.util.find_spec("scipy")
    if spec is None or spec.origin is None:
        return None
    found = sorted((Path(spec.origin).parents[1] / "scipy.libs").glob("libscipy_openblas-*.so"))
    return found[0] if found else None


def multiplies_right(mx: Any) -> bool:
    """Whether MLX's products are numpy's: both real types and the complex one, plain, transposed
    and in a batch.
    """
    draw = np.random.default_rng(0)
    for name, tolerance in (("float32", 1e-4), ("float64", 1e-10), ("complex64", 1e-4)):
        a = draw.normal(size=(2, 33, 65)).astype(name)
        if name == "complex64":
            a = a + 1j * draw.normal(size=a.shape).astype("float32")
        with mx.stream(mx.cpu):
            one = mx.array(a, dtype=getattr(mx, name))
            product = np.array(one @ one.swapaxes(1, 2))
        if not np.abs(product - a @ a.swapaxes(1, 2)).max() < tolerance:
            return False
    return True
