"""An optimised BLAS for MLX on a Linux CPU.

The `mlx[cpu]` wheel links a reference BLAS (about 5 GFLOP/s in float32 on two cores). A library
that exports the same symbols, loaded with RTLD_GLOBAL before the first `import mlx.core`, takes
their place; here that was 60 times faster. Where there is none, the OpenBLAS inside scipy, whose
functions have other names, is put into the three slots through which MLX multiplies. Decided here:
where to look, in which order, and what to say when nothing is found. macOS has Accelerate and
Metal.

MLX computes nothing here: its threads would start, and a child that is forked later does not have
them and would wait for ever.
"""

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mlx_distill import slots

Scalar = type[ctypes.c_float] | type[ctypes.c_double] | type[ctypes.c_void_p]
# What MLX's CPU products call: dtype, how C passes its scalars, how near to numpy small ones come.
PRODUCTS: dict[str, tuple[str, Scalar, float]] = {
    "cblas_sgemm": ("float32", ctypes.c_float, 1e-4),
    "cblas_dgemm": ("float64", ctypes.c_double, 1e-10),
    "cblas_cgemm": ("complex64", ctypes.c_void_p, 1e-3),
}
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
    late = "mlx.core" in sys.modules
    if late and asked not in ("", "scipy"):
        return Blas(
            "unknown",
            f"mlx.core was imported before mlx_distill could load {asked}: import mlx_distill "
            "first",
        )
    if late or asked == "scipy":
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
    right.
    """
    try:
        ours = _scipy_library()
        core = importlib.util.find_spec("mlx")
        if ours is None or core is None or not core.submodule_search_locations:
            return Blas("bundled", ADVICE)
        libmlx = Path(core.submodule_search_locations[0]) / "lib" / "libmlx.so"
        ctypes.CDLL(str(libmlx))  # it has to be loaded to be changed
        library = ctypes.CDLL(str(ours))  # by its own names, so that nothing else finds it
        places = slots.slots_in_memory(libmlx, PRODUCTS)
        before = slots.write(
            {
                slot: ctypes.cast(getattr(library, f"scipy_{name}"), ctypes.c_void_p).value or 0
                for name in PRODUCTS
                for slot in places[name]
            }
        )
        if all(
            multiplies_right(name, slots.read(slot)) for name in PRODUCTS for slot in places[name]
        ):
            return Blas("OpenBLAS of scipy")
        slots.write(before)
        return Blas("bundled", f"{ours.name} of scipy multiplies wrong; {ADVICE}")
    except (OSError, ValueError, AttributeError, ImportError, IndexError) as error:
        return Blas("bundled", f"scipy's OpenBLAS cannot be used ({error}); {ADVICE}")


def _scipy_library() -> Path | None:
    """The OpenBLAS with 32-bit integers in scipy's wheel; scipy is not imported."""
    spec = importlib.util.find_spec("scipy")
    if spec is None or spec.origin is None:
        return None
    found = sorted((Path(spec.origin).parents[1] / "scipy.libs").glob("libscipy_openblas-*.so"))
    return found[0] if found else None


def multiplies_right(product: str, address: int) -> bool:
    """Whether the function at `address`, called as MLX calls the cblas function `product`, finds
    what numpy does, plain and transposed.
    """
    dtype, scalar, tolerance = PRODUCTS[product]
    draw = np.random.default_rng(0)
    for rows, inner, columns in ((5, 7, 3), (33, 65, 17), (1, 19, 23)):
        turns = (1 + 2j, 3 - 1j) if dtype == "complex64" else (1, 1)
        left = draw.normal(size=(rows, inner)) * turns[0]
        right = draw.normal(size=(inner, columns)) * turns[1]
        for transposed in ((False, False), (False, True), (True, False)):
            found = _multiply(address, scalar, left.astype(dtype), right.astype(dtype), transposed)
            if not np.abs(found - left @ right).max() < tolerance:
                return False
    return True


def _multiply(
    address: int,
    scalar: Scalar,
    left: np.ndarray,
    right: np.ndarray,
    transposed: tuple[bool, bool],
) -> np.ndarray:
    """left @ right by the cblas function at `address`, for which the factors named in `transposed`
    lie in memory as their transposes (cblas.h).
    """
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    matrix = (pointer, integer)
    function = ctypes.CFUNCTYPE(None, *[integer] * 6, scalar, *matrix, *matrix, scalar, *matrix)(
        address
    )
    stored = [
        np.ascontiguousarray(one.T if turned else one)
        for one, turned in zip((left, right), transposed, strict=True)
    ]
    found = np.full((left.shape[0], right.shape[1]), np.nan, left.dtype)
    weights = np.array([1, 0], left.dtype)  # of the product, and of what `found` held
    if scalar is pointer:
        alpha, beta = weights.ctypes.data, weights.ctypes.data + weights.itemsize
    else:
        alpha, beta = weights.tolist()
    by_rows, plain = 101, 111
    function(
        by_rows,
        plain + transposed[0],
        plain + transposed[1],
        left.shape[0],
        right.shape[1],
        left.shape[1],
        alpha,
        stored[0].ctypes.data,
        stored[0].shape[1],
        stored[1].ctypes.data,
        stored[1].shape[1],
        beta,
        found.ctypes.data,
        found.shape[1],
    )
    return found
