"""An optimised BLAS for MLX on a Linux CPU.

The `mlx[cpu]` wheel links a reference BLAS (about 5 GFLOP/s in float32 on two cores). A library
that exports the same symbols, loaded with RTLD_GLOBAL before the first `import mlx.core`, takes
their place; here that was 60 times faster. Decided here: where to look, in which order, and what to
say when nothing is found. macOS has Accelerate and Metal.
"""

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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

    `MLX_DISTILL_BLAS` names a library to use instead ("bundled" loads none).
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
    for name, library in [(asked, asked)] if asked else _candidates():
        try:
            if _exports_blas(ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)):
                return Blas(name)
        except OSError:
            continue
    return Blas(
        "bundled",
        f"MLX_DISTILL_BLAS={asked} could not be loaded or has no sgemm_; {ADVICE}"
        if asked
        else ADVICE,
    )


def _candidates() -> list[tuple[str, str]]:
    """(name, library) in order of preference; torch is found without importing it."""
    found = [
        ("OpenBLAS", "libopenblas.so.0"),
        ("MKL", "libmkl_rt.so.2"),
        ("MKL", f"{sys.prefix}/lib/libmkl_rt.so.2"),
    ]
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        found.append(("torch", str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so")))
    return found


def _exports_blas(library: ctypes.CDLL) -> bool:
    return hasattr(library, "sgemm_")
