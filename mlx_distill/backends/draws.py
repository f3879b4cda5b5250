"""The random numbers with which texts are drawn, the same on every backend.

In: a seed, a prompt and which answer to it is drawn. Out: one uniform number a position. Decided
here: they depend on nothing else, so a text does not depend on what it is drawn beside, and one
that is drawn again is the same but for the last digits of its model's arithmetic.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from mlx_distill.backends.protocol import Sampling

VERSION = 2  # 1: each framework drew by itself, with a seed for a batch
# keeps a number below the sum of float32 probabilities that it is compared with
BELOW_ONE = 1 - 1e-6


def draws_of(sampling: Sampling, prompts: Sequence[Sequence[int]]) -> list[Iterator[float]]:
    """For each prompt the numbers in [0, 1) of its positions, in order and without end."""
    samples = sampling.samples or (0,) * len(prompts)
    return [
        _uniform(sampling.seed, prompt, sample)
        for prompt, sample in zip(prompts, samples, strict=True)
    ]


def _uniform(seed: int, prompt: Sequence[int], sample: int) -> Iterator[float]:
    digest = hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), sample])
    while True:
        yield generator.random() * BELOW_ONE
