"""The torch backend: NVIDIA GPUs, and a CPU for the tests that compare it with MLX."""
