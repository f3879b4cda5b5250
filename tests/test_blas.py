"""Which BLAS runs MLX on a Linux CPU: each question in a process of its own, since a library once
loaded stays.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_distill import blas, slots

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
    """Once MLX is loaded a library's path comes too late, and scipy's OpenBLAS does not."""
    name, advice = ask(f"import mlx.core; {ASK}", MLX_DISTILL_BLAS="libopenblas.so.0")
    assert name == "unknown" and "before mlx_distill could load libopenblas.so.0" in advice
    assert ask(f"import mlx.core; {ASK}") == ("OpenBLAS of scipy", "")
    assert ask(f"import mlx.core; {ASK}", MLX_DISTILL_BLAS="bundled") == ("bundled", blas.ADVICE)


def test_the_backend_loads_it_before_mlx():
    """Importing the backend is enough, and in time."""
    name, _ = ask(
        f"import sys, mlx_distill.backends.mlx; assert 'mlx.core' not in sys.modules; {ASK}",
        MLX_DISTILL_DEVICE="",  # with "cpu" MLX is imported right after it
    )
    assert name in ("OpenBLAS", "MKL", "torch", "bundled")


MULTIPLY = (
    "import mlx_distill.backends.mlx; import mlx.core as mx, numpy as np; from "
    "mlx_distill.blas import load_blas; a = np.random.default_rng(0).normal(size=(33, "
    "65)).astype(np.float32); error = np.abs(np.array(mx.array(a) @ mx.array(a).T) - "
    "a.astype(np.float64) @ a.T).max(); print(load_blas().name, 'right' if error < 1e-4 else "
    "error, sep='|')"
)
WHERE = (
    "import ctypes, mlx.core; from pathlib import Path; from mlx_distill import blas, slots; "
    "lib = Path(list(mlx.__path__)[0]) / 'lib' / 'libmlx.so'; base = slots.loaded_at(lib); "
    "at = lambda: [ctypes.c_uint64.from_address(base + slots.slots(lib)[n][0]).value "
    "for n in blas.PRODUCTS]; "
)


def test_scipys_own_takes_the_place_of_the_bundled_one():
    assert ask(MULTIPLY, MLX_DISTILL_BLAS="scipy") == ("OpenBLAS of scipy", "right")
    code = (
        f"{WHERE} blas._of_scipy(); ours = ctypes.CDLL(str(blas._scipy_library())); "
        "print(at() == [ctypes.cast(getattr(ours, 'scipy_' + n), ctypes.c_void_p).value "
        "for n in blas.PRODUCTS])"
    )
    assert ask(code)[0] == "True"


def test_scipys_own_is_put_back_where_it_multiplies_wrong():
    code = (
        f"{WHERE} mlx.core.eval(mlx.core.ones((9, 9)) @ mlx.core.ones((9, 9))); before = at(); "
        "blas.multiplies_right = lambda name, at: name != 'cblas_cgemm'; found = blas._of_scipy(); "
        "print(found.name, found.advice, at() == before, sep='|')"
    )
    name, told = ask(code)
    assert name == "bundled" and "of scipy multiplies wrong" in told
    assert told.endswith("|True")


def test_another_function_in_the_place_of_a_product_is_noticed():
    code = (
        "import ctypes; from mlx_distill import blas; ours = ctypes.CDLL(str(blas._scipy_library()))"
        "; at = lambda name: ctypes.cast(getattr(ours, name), ctypes.c_void_p).value; print("
        "[blas.multiplies_right(n, at('scipy_' + n)) for n in blas.PRODUCTS], "
        "blas.multiplies_right('cblas_dgemm', at('scipy_cblas_sgemm')), sep='|')"
    )
    assert ask(code) == ("[True, True, True]", "False")


def test_mlx_multiplies_by_the_function_in_its_slot():
    """Shown by one that fills products with sevens."""
    code = f"""{WHERE}
import numpy as np, mlx.core as mx
whole, matrix, real = ctypes.c_int, (ctypes.c_void_p, ctypes.c_int), ctypes.c_float
@ctypes.CFUNCTYPE(None, *[whole] * 6, real, *matrix, *matrix, real, *matrix)
def sevens(order, left, right, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    (ctypes.c_float * (m * n)).from_address(c)[:] = [7.0] * (m * n)
(slot,) = slots.slots_in_memory(lib, ["cblas_sgemm"])["cblas_sgemm"]
slots.write({{slot: ctypes.cast(sevens, ctypes.c_void_p).value}})
with mx.stream(mx.cpu):
    print(set(np.array(mx.ones((4, 5)) @ mx.ones((5, 3))).ravel().tolist()))"""
    assert ask(code)[0] == "{7.0}"


def test_slots_on_closed_pages_are_changed_and_closed_again():
    """As loaders leave them that bind all at once (RELRO)."""
    code = f"""{WHERE}
import mmap
places = [base + slots.slots(lib)[n][0] for n in blas.PRODUCTS]
protect = lambda rights: [slots._protect(p & ~(mmap.PAGESIZE - 1), rights) for p in places]
protect(mmap.PROT_READ)
name = blas._of_scipy().name
still = any(slots._is_writable(p) for p in places)
protect(mmap.PROT_READ | mmap.PROT_WRITE)  # other things of MLX's lie on these pages, too
print(name, still, sep="|")"""
    assert ask(code) == ("OpenBLAS of scipy", "False")


def test_all_slots_are_changed_or_none():
    """The last one's page stays closed."""
    code = f"""{WHERE}
places = [base + slots.slots(lib)[n][0] for n in blas.PRODUCTS]
before, protect = at(), slots._protect
slots._is_writable = lambda place: place != places[-1]
def closed(page, rights): raise OSError(13, "closed")
slots._protect = closed
found = blas._of_scipy()
print(found.name, "closed" in found.advice, at() == before, sep="|")"""
    assert ask(code) == ("bundled", "True|True")


def test_threads_and_a_forked_child_multiply_right():
    """The child computes, too: loading starts none of MLX's threads, which it would not have."""
    code = """
import warnings; warnings.simplefilter("error")
import os, threading, signal, numpy as np
from mlx_distill.blas import load_blas
name = load_blas().name
import mlx.core as mx
def right():
    signal.alarm(60) if threading.current_thread() is threading.main_thread() else None
    wrong = 0.0
    for kind in ("float32", "float64", "complex64"):
        a = np.random.default_rng(0).normal(size=(2, 33, 65)).astype(kind)
        with mx.stream(mx.cpu):
            one = mx.array(a, dtype=getattr(mx, kind))
            found = np.array(one @ one.swapaxes(1, 2))
        wrong = max(wrong, float(np.abs(found - a @ a.swapaxes(1, 2)).max()))
    return wrong < 1e-4
child = os.fork()
if child == 0:
    os._exit(0 if right() else 1)
assert os.waitpid(child, 0)[1] == 0
found = []
threads = [threading.Thread(target=lambda: found.append(right())) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(name, found, sep="|")"""
    assert ask(code, MLX_DISTILL_BLAS="scipy") == ("OpenBLAS of scipy", str([True] * 4))


def test_a_library_without_the_slots_stays_as_it_is(tmp_path: Path):
    code = (
        f"{WHERE} before = at(); why = []\n"
        "for names in (dict(cblas_sgemm=1, no_such=2), dict(no_such=2)):\n"
        "    try: slots.slots_in_memory(lib, names)\n"
        "    except ValueError as error: why.append(str(error).partition(' does ')[2])\n"
        "print(why, at() == before, sep='|')"
    )
    assert ask(code) == ("['not call no_such', 'not call no_such']", "True")
    for content in (b"", b"\x7fELF\x02\x01", b"\x7fELF\x01\x01" + bytes(100)):
        (tmp_path / "library.so").write_bytes(content)
        with pytest.raises(ValueError):
            slots.slots(tmp_path / "library.so")
    with pytest.raises(ValueError, match="is not loaded"):
        slots.loaded_at(tmp_path / "library.so")


@pytest.mark.parametrize("gone", ["_scipy_library", "find_spec"])
def test_without_scipys_own_the_bundled_one_stays(monkeypatch: pytest.MonkeyPatch, gone: str):
    if gone == "find_spec":
        monkeypatch.setattr(blas.importlib.util, gone, lambda name: None)
    else:
        monkeypatch.setattr(blas, gone, lambda: None)
    assert blas._of_scipy() == blas.Blas("bundled", blas.ADVICE)


@pytest.mark.network
def test_the_wheels_for_aarch64_have_the_same_slots_and_symbols(aarch64_libraries: Path):
    """Read, not run: there is no such machine here."""
    libmlx, openblas = (next(aarch64_libraries.glob(name)) for name in ("libmlx*", "libscipy*"))
    assert all(len(slots.slots(libmlx)[name]) == 1 for name in blas.PRODUCTS)
    content = openblas.read_bytes()
    assert all(b"\0scipy_" + name.encode() + b"\0" in content for name in blas.PRODUCTS)


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
    assert ask(MULTIPLY, MLX_DISTILL_BLAS=library) == (library, "right")


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
    monkeypatch.setattr(blas, "_of_scipy", lambda: blas.Blas("of scipy"))
    assert fresh() == blas.Blas("of scipy")
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    assert fresh() == blas.Blas("Accelerate")
