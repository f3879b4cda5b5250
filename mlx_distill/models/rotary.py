"""Rotary position embeddings as plain numbers: which angles a configuration asks for.

In: `rope_parameters` as transformers 5 writes them. Out: inverse frequencies and the scale of
cosine and sine, in float64. Decided here: the definition of every type, so that what a framework
loaded can be compared with it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first `dims` numbers of a head, as pairs (i, i + dims/2), or (2i, 2i + 1)
    where `interleaved`.

    The pair i of a token at position p turns by p × `angles(length)[0][i]`, and is scaled by
    `angles(length)[1]`.
    """

    dims: int
    longest: int  # max_position_embeddings
    interleaved: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return self.parameters.get("rope_type") or self.parameters.get("type") or "default"

    @property
    def trained(self) -> int:
        """The length that "llama3", "yarn" and "longrope" stretch."""
        return self.parameters.get("original_max_position_embeddings") or self.longest

    @property
    def depends_on_length(self) -> bool:
        return self.type == "longrope" or (
            self.type == "dynamic" and not self.parameters.get("alpha")
        )

    def lengths(self) -> tuple[int, ...]:
        """Lengths of text between which everything that the type knows is seen."""
        if not self.depends_on_length:
            return (2,)
        return (2, 2 * self.longest) if self.type == "dynamic" else (2, self.trained + 1)

    def angles(self, length: int) -> tuple[np.ndarray, float]:
        """(float64[dims / 2], scale) for a text of `length` tokens."""
        return getattr(self, f"_{self.type}")(length)

    def rotated(
        self, first: np.ndarray, second: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The pairs (first, second) [dims / 2] of the last of `length` tokens, after rotation."""
        frequencies, scale = self.angles(length)
        cosine, sine = np.cos((length - 1) * frequencies), np.sin((length - 1) * frequencies)
        return scale * (first * cosine - second * sine), scale * (second * cosine + first * sine)

    def _wavelengths(self, base: float) -> np.ndarray:
        """What a type stretches: 1 / frequency of each pair."""
        return base ** (np.arange(0, self.dims, 2) / self.dims)

    @property
    def _base(self) -> float:
        return self.parameters["rope_theta"]

    def _default(self, length: int) -> tuple[np.ndarray, float]:
        return 1 / self._wavelengths(self._base), 1.0

    def _linear(self, length: int) -> tuple[np.ndarray, float]:
        return 1 / (self.parameters["factor"] * self._wavelengths(self._base)), 1.0

    def _dynamic(self, length: int) -> tuple[np.ndarray, float]:
        """The base grows with the text; Hunyuan's `alpha` fixes by how much."""
        factor, length = self.parameters.get("factor", 1.0), max(length, self.longest)
        growth = self.parameters.get("alpha") or factor * length / self.longest - (factor - 1)
        return 1 / self._wavelengths(self._base * growth ** (self.dims / (self.dims - 2))), 1.0

    def _llama3(self, length: int) -> tuple[np.ndarray, float]:
        """Fast pairs stay, slow ones are stretched by `factor`, between them a smooth mixture
        (Llama 3.1)."""
        low, high = self.parameters["low_freq_factor"], self.parameters["high_freq_factor"]
        frequencies = 1 / self._wavelengths(self._base)
        turns = self.trained * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.parameters["factor"]), 1.0

    def _yarn(self, length: int) -> tuple[np.ndarray, float]:
        """As llama3, but mixed linearly between two pairs (arXiv 2309.00071), and with an
        attention factor."""
        factor = self.parameters["factor"] or self.longest / self.trained
        fast, slow = self.parameters.get("beta_fast") or 32, self.parameters.get("beta_slow") or 1
        first, last = self._pair_that_turns(fast), self._pair_that_turns(slow)
        if self.parameters.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dims - 1)
        last += 0.001 if first == last else 0
        stretched = np.clip((np.arange(self.dims // 2) - first) / (last - first), 0, 1)
        frequencies = 1 / self._wavelengths(self._base)
        return frequencies * (stretched / factor + 1 - stretched), yarn_scale(
            self.parameters, factor
        )

    def _pair_that_turns(self, times: float) -> float:
        """The (fractional) pair that turns so many times in the trained length."""
        return (
            self.dims * math.log(self.trained / (times * 2 * math.pi)) / (2 * math.log(self._base))
        )

    def _longrope(self, length: int) -> tuple[np.ndarray, float]:
        """Each pair has a factor of its own, one for short texts and one for long ones (arXiv
        2402.13753)."""
        key = "long_factor" if length > self.trained else "short_factor"
        factor = self.parameters.get("factor") or self.longest / self.trained
        scale = self.parameters.get("attention_factor")
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(self.trained)) if factor > 1 else 1.0
        return 1 / (np.array(self.parameters[key]) * self._wavelengths(self._base)), scale


def yarn_scale(parameters: dict[str, Any], factor: float) -> float:
    """YaRN's attention factor: as said, or by `mscale`s where both are given, or by the factor."""

    def by(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    said, mscale, all_dim = (
        parameters.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if said is not None:
        return said
    return by(mscale) / by(all_dim) if mscale and all_dim else by(1)
