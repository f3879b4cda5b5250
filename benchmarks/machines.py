"""What a measured number depends on beside the code: the machine, the versions, the commit; and a
process's peak memory.
"""

import ctypes
import gc
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent


def facts(*sources: str) -> dict[str, object]:
    """Columns that every row starts with; `sources` are the measured files below the repository,
    `load` the run queue.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(*sources),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    return {package.replace("-", "_"): installed(package) for package in packages}


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def blas_name() -> str:
    """The BLAS that MLX runs on, asked in a process of its own: loading one changes the process."""
    code = "from mlx_distill.blas import load_blas; print(load_blas().name)"
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    ).stdout.strip()


def commit(*sources: str) -> str:
    """The commit, and "+changes" where a measured file differs from it."""

    changed = _git(
        HERE, "status", "--porcelain", "--", *(str(HERE.parent / one) for one in sources)
    )
    return commit_of(HERE) + ("+changes" if changed else "")


def commit_of(checkout: Path) -> str:
    return _git(checkout, "rev-parse", "--short", "HEAD") or "none"


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], capture_output=True, text=True, cwd=folder
    ).stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    models = [
        line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return models[0] if models else platform.machine()


def available_bytes() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class PeakMemory:
    """A torch process's peak between `start` and `stop`, and what it held at `start`.

    On CUDA the allocator's own counters; on a CPU resident memory, whose high-water mark Linux lets
    a process reset. Elsewhere both are 0, for "not measured".
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def start(self) -> None:
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(
                0
            )  # memory freed before is not to be taken for memory not needed
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
            self.before = _status_bytes("VmRSS")
        else:
            self.before = 0

    def stop(self) -> dict[str, int]:
        """peak_bytes over what was held at `start`, held_bytes."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status_bytes("VmHWM") if sys.platform == "linux" else 0
        return {"peak_bytes": peak - self.before, "held_bytes": self.before}


def _status_bytes(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024
