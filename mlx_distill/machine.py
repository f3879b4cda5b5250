"""What machine this is: its devices and their memory, its processor, the versions of what is
installed.

Decided here: how much memory a run may use, and who is asked for it. No framework is imported for
an answer but MLX's core, on a Mac.
"""

import ctypes
import importlib.util
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Protocol

import mlx_distill
from mlx_distill.errors import DistillError

DEVICE = "MLX_DISTILL_DEVICE"
CHIP = "machdep.cpu.brand_string"
PACKAGES = (
    "mlx-distill",
    "mlx",
    "mlx-lm",
    "torch",
    "peft",
    "bitsandbytes",
    "transformers",
    "tokenizers",
    "numpy",
    "pydantic",
    "safetensors",
)


AMPERE = (8, 0)  # NVIDIA's first compute capability with bfloat16
NO_BFLOAT16 = "has no bfloat16 (NVIDIA's GPUs have it from compute capability 8.0 on)"
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what a BLAS reads
JOBS = "MLX_DISTILL_JOBS"  # what a sweep tells its children: how many run side by side


class Described(Protocol):
    """A device as a backend that is loaded describes it (`backends.protocol.DeviceInfo`)."""

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Machine:
    """Where a run is to go: backend (mlx, torch), device (cpu, metal, cuda), the format "auto"
    computes in, memory and what it is.
    """

    backend: str
    device: str
    dtype: str
    memory_bytes: int  # 0 = unknown
    limit: str

    @classmethod
    def of(cls, device: Described) -> "Machine":
        """The machine as a backend that is already loaded describes it."""
        name = device.device.split()[0].lower()
        kind = name if name in ("cuda", "metal") else "cpu"
        return cls(device.backend, kind, device.dtype, *device_memory(kind))


def this_machine(backend_name: str = "auto") -> Machine:
    """What `choose_backend` would choose, found without importing a framework."""
    off_gpu = is_kept_off_gpu()
    if platform.system() == "Darwin" and backend_name != "torch" and not off_gpu:
        return Machine("mlx", "metal", "bfloat16", *device_memory("metal"))
    cuda = has_nvidia_driver()
    torch = backend_name == "torch" or (
        backend_name == "auto" and cuda and importlib.util.find_spec("torch") is not None
    )
    on_gpu = cuda and (torch or (_installed("mlx-cuda") and not off_gpu))
    device = "cuda" if on_gpu else "cpu"
    dtype = "bfloat16" if on_gpu and gpu_has_bfloat16() else "float32"
    return Machine("torch" if torch else "mlx", device, dtype, *device_memory(device))


def is_kept_off_gpu() -> bool:
    """Whether MLX_DISTILL_DEVICE=cpu asks that MLX compute on the processor alone. Raises
    `DistillError` for another word.
    """
    asked = os.environ.get(DEVICE, "")
    if asked not in ("", "cpu"):
        raise DistillError(
            f"{DEVICE}={asked}: it may be cpu, or be left out for the GPU that is there"
        )
    return asked == "cpu"


def device_memory(kind: str) -> tuple[int, str]:
    """Bytes that a run may use on a cpu, metal or cuda device, and what limits them; 0 where nobody
    says.
    """
    if kind == "cuda":
        return _free_on_gpu(), "free GPU memory"
    physical = total_memory_bytes()
    if kind != "metal":
        return physical, "physical memory"
    if working_set := _working_set():
        return working_set, "the GPU's working set, as MLX says it"
    wired = _asked("sysctl", "-n", "iogpu.wired_limit_mb") * 2**20
    return (
        (wired, "iogpu.wired_limit_mb")
        if wired
        else (
            physical * 3 // 4,
            "75 % of memory, for MLX is not there to say the GPU's working set",
        )
    )


def _free_on_gpu() -> int:
    """Bytes on the GPU that CUDA chooses first, asked of torch where that is loaded already."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    said = _gpu_says("memory.free")
    return int(said) * 2**20 if said.isdigit() else 0


def gpu_has_bfloat16() -> bool:
    """By its compute capability; a driver too old to say it is taken for a GPU of today."""
    major, _, minor = _gpu_says("compute_cap").partition(".")
    return not (major.isdigit() and minor.isdigit()) or (int(major), int(minor)) >= AMPERE


def _gpu_says(what: str) -> str:
    """One property of the first GPU of CUDA_VISIBLE_DEVICES, "" where the driver says nothing."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    which = ("-i", chosen) if chosen else ()
    said = _said("nvidia-smi", *which, f"--query-gpu={what}", "--format=csv,noheader,nounits")
    return next(iter(said.splitlines()), "").strip()


def _working_set() -> int:
    """Bytes that Metal recommends at most, which `iogpu.wired_limit_mb` moves; 0 without MLX. Its
    core alone is imported, which takes milliseconds.
    """
    try:
        import mlx.core as mx
    except ImportError:
        return 0
    asked = mx.device_info() if mx.metal.is_available() else {}
    return int(asked.get("max_recommended_working_set_size", 0))


def jobs_beside() -> int:
    """How many processes share this machine's memory by a sweep's `--jobs`, this one included."""
    said = os.environ.get(JOBS, "")
    return int(said) if said.isdigit() and int(said) else 1


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is installed, found without importing a framework."""
    if platform.system() != "Linux":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _installed(prefix: str) -> bool:
    return any((found.name or "").startswith(prefix) for found in distributions())


def total_memory_bytes() -> int:
    """Physical memory, 0 where it cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _asked(*command: str) -> int:
    """The number in the first line of what a command prints, 0 where it has none to say."""
    answer = _said(*command).split()
    return int(answer[0]) if answer and answer[0].isdigit() else 0


def _said(*command: str) -> str:
    """What a command prints, "" where it cannot be run."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip()


def versions() -> dict[str, str]:
    """Of the packages that matter, as far as they are installed."""
    return {name: found for name in PACKAGES if (found := _version(name))}


@cache  # while a process lives; reading it takes a millisecond or two
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache  # what runs is what was loaded, whatever the checkout becomes meanwhile
def git_commit() -> str:
    """The commit of the program's checkout, with "+changes" where it has some; "" for an installed
    package.
    """
    here = Path(mlx_distill.__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
        status = subprocess.run(
            ["git", "status", "--porcelain", "."],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (
        commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
        if commit.returncode == 0
        else ""
    )


def system_name() -> str:
    """What system runs, as its users call it."""
    macos = platform.mac_ver()[0] if platform.system() == "Darwin" else ""
    return f"macOS {macos} ({platform.release()})" if macos else platform.platform()


def processor_name() -> str:
    """What the machine calls its processor: on a Mac the chip."""
    if platform.system() == "Darwin" and (chip := _said("sysctl", "-n", CHIP)):
        return chip
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
