"""mlx-distill: distil reasoning models on a Mac, from a recipe file to a student that opens
everywhere.
"""

import os

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # it advises, on import, to install torch

__version__ = "0.1.0"
