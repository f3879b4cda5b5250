"""MLX on Metal as Python code sees it: a GPU, its limits, and an M5's products.

`mlx.core` is changed as soon as somebody imports it. Only code in `mlx_distill` sees the GPU: MLX's
own Python and mlx-lm would start kernels that are not there.
"""

import atexit
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

from fakemac_system import MEMORY

# what Metal recommends as it is reported: two thirds up to 32 GB, three quarters above
SHARE = (2, 3) if MEMORY <= 32 * 2**30 else (3, 4)
WORKING_SET = int(os.environ.get("FAKEMAC_WORKING_SET", 0)) or MEMORY * SHARE[0] // SHARE[1]
INFO = {
    "device_name": os.environ.get("FAKEMAC_CHIP", "Apple M4 Pro"),
    "architecture": "applegpu_g16s",
    "memory_size": MEMORY,
    "max_recommended_working_set_size": WORKING_SET,
    "max_buffer_length": MEMORY * 9 // 16,
    "resource_limit": 499000,
}
TOO_MUCH_WIRED = (
    "[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size is "
    "not allowed."
)


def pretend() -> None:
    """Change `mlx.core` when it is imported."""
    sys.meta_path.insert(0, _AfterImport())
    if os.environ.get("FAKEMAC_LIMITS"):
        atexit.register(_write_calls)


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _change(sys.modules[name])

        spec.loader.exec_module = exec_module
        return spec


def _change(mx: ModuleType) -> None:
    _device(mx)
    _limits(mx)
    _products(mx)


_on_gpu = [True]


def _device(mx: ModuleType) -> None:
    class Gpu:
        type = mx.DeviceType.gpu

        def __eq__(self, other: object) -> bool:
            return getattr(other, "type", None) == self.type

        def __repr__(self) -> str:
            return "Device(gpu, 0)"

    default_device = mx.default_device

    def seen_device():
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return Gpu() if caller.startswith("mlx_distill") and _on_gpu[0] else default_device()

    def set_default_device(device) -> None:  # in truth it stays the CPU
        _on_gpu[0] = getattr(device, "type", device) == mx.DeviceType.gpu

    mx.default_device, mx.set_default_device = seen_device, set_default_device
    mx.metal.is_available = lambda: True
    mx.device_info = mx.metal.device_info = lambda *_, **__: dict(INFO)


# limits

_calls: list[str] = []


def _limits(mx: ModuleType) -> None:
    wired, cache = [0], [min(WORKING_SET * 3 // 2, MEMORY * 19 // 20)]

    def set_wired_limit(limit: int) -> int:
        if limit > WORKING_SET:
            raise ValueError(TOO_MUCH_WIRED)
        before, wired[0] = wired[0], limit
        return before

    def set_cache_limit(limit: int) -> int:
        before, cache[0] = cache[0], limit
        return before

    mx.set_cache_limit = mx.metal.set_cache_limit = _noted("set_cache_limit", set_cache_limit)
    mx.set_wired_limit = mx.metal.set_wired_limit = _noted("set_wired_limit", set_wired_limit)
    for name in ("set_memory_limit", "clear_cache"):
        setattr(mx, name, _noted(name, getattr(mx, name)))


def _noted(name: str, function: Callable) -> Callable:
    def call(*arguments, **keywords):
        caller = sys._getframe(1)
        where = f"{caller.f_globals.get('__name__')}:{caller.f_lineno}"
        _calls.append(f"{name}{arguments} from {where}\n")
        return function(*arguments, **keywords)

    return call


def _write_calls() -> None:
    with open(os.environ["FAKEMAC_LIMITS"], "a") as file:
        file.writelines(_calls)


# an M5's products

_reduced: list[bool] = []  # MLX reads its variable once, at the first product


def _are_reduced() -> bool:
    if not _on_gpu[0]:
        return False
    if not _reduced:
        m5 = os.environ.get("FAKEMAC_TF32") == "1"
        _reduced.append(m5 and os.environ.get("MLX_ENABLE_TF32", "1") != "0")
    return _reduced[0]


def _products(mx: ModuleType) -> None:
    plain_matmul, plain_addmm = mx.matmul, mx.addmm

    def rounded(x):
        """Float32 with ten bits after the leading one, to nearest, ties to even."""
        bits = x.view(mx.uint32)
        to_even = (bits >> 13) & 1
        return ((bits + 0x0FFF + to_even) & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)

    @mx.custom_function
    def product(a, b):
        return plain_matmul(rounded(a), rounded(b))

    @product.vjp
    def gradients(primals, cotangent, _):
        a, b = primals
        return matmul(cotangent, mx.swapaxes(b, -1, -2)), matmul(mx.swapaxes(a, -1, -2), cotangent)

    def matmul(a, b, **keywords):
        two = a.ndim == b.ndim == 2 and a.shape[0] >= 2 and b.shape[1] >= 2
        if two and mx.float32 in (a.dtype, b.dtype) and _are_reduced():
            return product(a.astype(mx.float32), b.astype(mx.float32))
        return plain_matmul(a, b, **keywords)

    def addmm(c, a, b, **keywords):
        if keywords or not _are_reduced():
            return plain_addmm(c, a, b, **keywords)
        return c + matmul(a, b)

    mx.matmul, mx.addmm = matmul, addmm
    mx.array.__matmul__ = lambda self, other: matmul(self, other)
