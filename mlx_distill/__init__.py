"""mlx-distill: distil reasoning models on a Mac, from a recipe file to a student that opens everywhere."""

__version__ = "0.1.0"
