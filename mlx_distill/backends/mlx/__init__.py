"""The MLX backend. Importing it loads an optimised BLAS (Linux) before the first `import mlx.core`,
and keeps MLX off the GPU where that is asked for.
"""

from mlx_distill.blas import load_blas
from mlx_distill.machine import is_kept_off_gpu

load_blas()
if is_kept_off_gpu():
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
