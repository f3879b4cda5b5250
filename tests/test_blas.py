"""Which BLAS runs MLX on a Linux CPU: each question in a process of its own, since a library once
loaded stays.
"""

import ctypes
import os
import subprocess
import sys

import pytest

from mlx_distill import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")

ASK = "from mlx_distill.blas import load_blas; print(load_blas().name, load_blas().advice, sep='|')"


def ask(code: str = ASK, **variables: str) -> tuple[str, str]:
    """(name, advice) that `code` prints."""
    environment = {
        key: value for key, value in os.environ.items() if key != "MLX_DISTILL_BLAS"
    } | variables
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    name, _, advice = found.stdout.strip().partition("|")
    return name, advice


def test_bundled_can_be_asked_for():
    assert ask(MLX_DISTILL_BLAS="bundled") == ("bundled", blas.ADVICE)


def test_a_wrong_path_is_named_and_nothing_else_is_loaded():
    name, advice = ask(MLX_DISTILL_BLAS="/no/such/libblas.so")
    assert name == "bundled"
    assert (
        advice == "MLX_DISTILL_BLAS=/no/such/libblas.so could not be loaded or has no sgemm_; "
        f"{blas.ADVICE}"
    )


def test_a_library_that_is_no_blas_is_refused():
    name, advice = ask(MLX_DISTILL_BLAS="libm.so.6")
    assert name == "bundled" and advice.startswith(
        "MLX_DISTILL_BLAS=libm.so.6 could not be loaded or has no sgemm_"
    )


def test_too_late_after_mlx():
    name, advice = ask(f"import mlx.core; {ASK}")
    assert (
        name == "unknown"
        and "imported before mlx_distill" in advice
        and "import mlx_distill first" in advice
    )
    assert ask(f"import mlx.core; {ASK}", MLX_DISTILL_BLAS="bundled") == ("bundled", blas.ADVICE)


def test_the_backend_loads_it_before_mlx():
    """Importing the backend is enough, and in time."""
    name, _ = ask(
        f"import sys, mlx_distill.backends.mlx; assert 'mlx.core' not in sys.modules; {ASK}"
    )
    assert name in ("OpenBLAS", "MKL", "torch", "bundled")


def _available() -> str:
    for _, library in blas._candidates():
        try:
            if hasattr(ctypes.CDLL(library), "sgemm_"):
                return library
        except OSError:
            continue
    return ""


def test_a_library_that_is_there_is_used_and_right():
    """MLX multiplies the same with it. torch, which the test extra brings, is such a library where
    there is no other.
    """
    library = _available()
    assert library, "neither OpenBLAS, MKL nor torch"
    code = (
        "import mlx_distill.backends.mlx; import mlx.core as mx, numpy as np; from "
        "mlx_distill.blas import load_blas;a = np.random.default_rng(0).normal(size=(33, "
        "65)).astype(np.float32);error = np.abs(np.array(mx.array(a) @ mx.array(a).T) - "
        "a.astype(np.float64) @ a.T).max();print(load_blas().name, 'right' if error < 1e-4 else "
        "error, sep='|')"
    )
    assert ask(code, MLX_DISTILL_BLAS=library) == (library, "right")


def test_candidates_are_taken_in_order(monkeypatch: pytest.MonkeyPatch):
    """A candidate that cannot be loaded, or has no sgemm_, gives way to the next; the answer is
    kept.
    """

    class Library:
        def __init__(self, name: str, mode: int):
            if name == "absent":
                raise OSError(name)
            if name == "blas":
                self.sgemm_ = True

    monkeypatch.delenv("MLX_DISTILL_BLAS", raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setattr(blas.ctypes, "CDLL", Library)
    candidates = [("first", "absent"), ("second", "other"), ("third", "blas"), ("fourth", "blas")]
    monkeypatch.setattr(blas, "_candidates", lambda: candidates)
    fresh = blas.load_blas.__wrapped__
    assert fresh() == blas.Blas("third")
    candidates[2:] = []
    assert fresh() == blas.Blas("bundled", blas.ADVICE)
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    assert fresh() == blas.Blas("Accelerate")
