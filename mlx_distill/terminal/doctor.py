"""A self-check that can be pasted into an issue: what is installed, where it runs, whether products
and the loss are right, how fast matrices are multiplied.

Decided here: how far off is wrong, and that reduced products are not: where a GPU multiplies
float32 with 11 bits, the loss is checked in a process that was told not to.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from mlx_distill.backends import choose_backend
from mlx_distill.backends.oracle import Products
from mlx_distill.backends.protocol import SelfTest
from mlx_distill.machine import (
    PACKAGES,
    git_commit,
    processor_name,
    system_name,
    total_memory_bytes,
)
from mlx_distill.models.hub import model_folder
from mlx_distill.processes import program
from mlx_distill.terminal.compare import compare

OPTIONAL = ("datasets", "pyarrow", "gguf", "math-verify")
LOSS_TOLERANCE = 1e-5  # float32 against float64, relative


def check(console: Console, backend_name: str) -> bool:
    """Print the report; True if products and the loss agree with float64."""
    backend = choose_backend(backend_name)
    device, found = backend.device(), backend.self_test()
    products = found.products()
    error, told = found.loss_error(), ""
    if products.are_reduced and not error < LOSS_TOLERANCE:
        reduced, error = error, exact_loss_error(device.backend, found.exact_environment)
        told = f"with {_words(found.exact_environment)} ({reduced:.1e} without), "
    size = found.matmul_size()
    rate = found.matmul_rate(size) / 1e9
    is_right = error < LOSS_TOLERANCE
    rows = [
        ("mlx-distill", f"{_version('mlx-distill')} {git_commit()}".strip()),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("system", system_name()),
        ("processor", processor_name()),
        ("memory", memory_text(found.limits())),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in (*PACKAGES[1:], *OPTIONAL))),
        ("backend", f"{device.backend} on {device.device}, {device.dtype}: {device.reason}"),
        ("products", products_text(products, found)),
        (
            "loss",
            f"{told}relative error {error:.1e} against float64: {'ok' if is_right else 'WRONG'}",
        ),
        ("matmul", f"{rate:,.0f} GFLOP/s in {device.dtype} ({size:,} x {size:,})"),
        ("disk", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here"),
    ]
    for name, text in rows:
        console.print(f"{name:12} {text}", markup=False, highlight=False, soft_wrap=True)
    if device.advice:
        console.print(f"note: {device.advice}", markup=False, highlight=False, soft_wrap=True)
    return is_right and (products.are_exact or products.are_reduced)


def memory_text(limits: Mapping[str, int]) -> str:
    """The machine's memory and what a GPU may use of it."""
    memory = total_memory_bytes()
    parts = [f"{memory / 1e9:.1f} GB" if memory else "unknown"]
    parts += [
        f"{name} {f'{size / 1e9:.1f} GB' if size else 'not set'}" for name, size in limits.items()
    ]
    return ", ".join(parts)


def products_text(products: Products, found: SelfTest) -> str:
    """What float32 products are here, in words."""
    error = f"relative error {products.whole:.1e} against float64"
    if products.are_exact:
        return f"of float32: {error}: ok"
    if products.are_reduced:
        return (
            f"of float32 keep 11 bits on this GPU: {error}, {products.short:.1e} for bfloat16 "
            f"values: ok for training in bfloat16, which keeps 8; {_words(found.exact_environment)}"
            " keeps all"
        )
    return f"of float32: {error}, {products.short:.1e} for bfloat16 values: WRONG"


def exact_loss_error(backend_name: str, environment: Mapping[str, str]) -> float:
    """`SelfTest.loss_error` of a new process in which float32 products keep all bits; NaN where it
    says no number.
    """
    command = (*program("mlx_distill.terminal.doctor"), backend_name)
    said = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    try:
        return float(said.stdout.split()[-1])
    except (IndexError, ValueError):
        return float("nan")


def main() -> None:
    """That process."""
    print(choose_backend(sys.argv[1]).self_test().loss_error())


def _words(environment: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


def check_model(console: Console, name: str) -> bool:
    """Compare MLX's logits of a model with transformers'; True if they agree. Raises
    `DistillError`.
    """
    found = compare(model_folder(name), name)
    for package in ("mlx", "mlx-lm", "transformers", "torch"):
        console.print(
            f"{package:12} {_version(package)}", markup=False, highlight=False, soft_wrap=True
        )
    console.print(f"{'model':12} {name}: {found}", markup=False, highlight=False, soft_wrap=True)
    return found.agrees


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
