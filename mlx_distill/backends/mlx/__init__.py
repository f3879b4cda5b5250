"""The MLX backend. Importing it loads an optimised BLAS (Linux) before the first `import mlx.core`."""

from mlx_distill.blas import load_blas

load_blas()
