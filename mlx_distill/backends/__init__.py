"""Which framework trains: chosen here, printed with its reason, imported only then."""

import platform
from typing import TYPE_CHECKING

from mlx_distill.errors import DistillError

if TYPE_CHECKING:
    from mlx_distill.backends.protocol import Backend

BACKENDS = ("auto", "mlx")


def choose_backend(asked: str = "auto") -> "Backend":
    """The backend called `asked`; `auto` is MLX, on Metal, CUDA or the CPU, whichever the installed MLX offers.

    Raises `DistillError` for a name that is not in `BACKENDS` or when MLX is not installed.
    """
    if asked not in BACKENDS:
        raise DistillError(f"--backend {asked}: this version has {', '.join(BACKENDS)}")
    try:
        from mlx_distill.backends.mlx.backend import MlxBackend
    except ImportError as error:
        wheel = "mlx" if platform.system() == "Darwin" else "mlx[cpu]"
        raise DistillError(f'--backend {asked}: MLX cannot be imported ({error}); pip install "{wheel}" mlx-lm') from None
    return MlxBackend()
