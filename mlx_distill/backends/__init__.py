"""Which framework trains: chosen here, printed with its reason, imported only then."""

import importlib.util
import platform
from typing import TYPE_CHECKING

from mlx_distill.errors import DistillError
from mlx_distill.machine import has_nvidia_driver

if TYPE_CHECKING:
    from mlx_distill.backends.protocol import Backend

BACKENDS = ("auto", "mlx", "torch")


def choose_backend(asked: str = "auto") -> "Backend":
    """The backend called `asked`; `auto` is MLX on a Mac, torch where there are torch and an NVIDIA
    GPU, else MLX.

    Raises `DistillError` for a name that is not in `BACKENDS` or when the framework cannot be
    imported.
    """
    refuse_unknown(asked)
    name = ("torch" if _torch_has_gpu() else "mlx") if asked == "auto" else asked
    return {"mlx": _mlx, "torch": _torch}[name](asked)


def refuse_unknown(asked: str) -> None:
    """Raise `DistillError` for a name that is not in `BACKENDS`."""
    if asked not in BACKENDS:
        raise DistillError(f"--backend {asked}: this version has {', '.join(BACKENDS)}")


def _torch_has_gpu() -> bool:
    """Whether torch sees a CUDA GPU; it is imported only where it and NVIDIA's driver are
    installed.
    """
    if not has_nvidia_driver() or importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _mlx(asked: str) -> "Backend":
    try:
        from mlx_distill.backends.mlx.backend import MlxBackend
    except ImportError as error:
        wheel = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
        raise DistillError(
            f'--backend {asked}: MLX cannot be imported ({error}); pip install "{wheel}" mlx-lm'
        ) from None
    return MlxBackend()


def _torch(asked: str) -> "Backend":
    try:
        from mlx_distill.backends.torch.backend import TorchBackend
    except ImportError as error:
        raise DistillError(
            f"--backend {asked}: torch cannot be imported ({error}); pip install "
            '"mlx-distill[torch]"'
        ) from None
    return TorchBackend()
