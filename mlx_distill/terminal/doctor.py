"""A self-check that can be pasted into an issue: what is installed, where it runs, whether the loss
is right, how fast it is.
"""

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from mlx_distill.backends import choose_backend
from mlx_distill.machine import PACKAGES, git_commit, processor_name, total_memory_bytes
from mlx_distill.models.hub import model_folder
from mlx_distill.terminal.compare import compare

OPTIONAL = ("datasets", "pyarrow", "gguf", "math-verify")
LOSS_TOLERANCE = 1e-5  # float32 against float64, relative


def check(console: Console, backend_name: str) -> bool:
    """Print the report; True if the loss agrees with its float64 definition."""
    backend = choose_backend(backend_name)
    device, memory = backend.device(), total_memory_bytes()
    found = backend.self_test()
    error = found.loss_error()
    rows = [
        ("mlx-distill", f"{_version('mlx-distill')} {git_commit()}".strip()),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("processor", processor_name()),
        ("memory", f"{memory / 1e9:.1f} GB" if memory else "unknown"),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in (*PACKAGES[1:], *OPTIONAL))),
        ("backend", f"{device.backend} on {device.device}, {device.dtype}: {device.reason}"),
        (
            "loss",
            f"relative error {error:.1e} against float64: "
            f"{'ok' if error < LOSS_TOLERANCE else 'WRONG'}",
        ),
        ("matmul", f"{found.matmul_rate() / 1e9:,.0f} GFLOP/s in {device.dtype}"),
        ("disk", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here"),
    ]
    for name, text in rows:
        console.print(f"{name:12} {text}", markup=False, highlight=False, soft_wrap=True)
    if device.advice:
        console.print(f"note: {device.advice}", markup=False, highlight=False, soft_wrap=True)
    return error < LOSS_TOLERANCE


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
