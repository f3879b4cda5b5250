"""Rotary embeddings of a model that mlx-lm loaded: run on numbers, compared with their definition in
float64, and replaced by ours where they differ.

In: the model and, for each layer, the `Rotary` that its config.json asks for. Out: the model, some
embeddings replaced, or a `ModelError`.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.models.config import Meaning
from mlx_distill.models.rotary import Rotary

ROTATED = 1e-4  # how far a rotated number may be off, relative to itself, at the first positions
ROTATED_FAR = 2e-2  # and at far ones, absolutely: float32 has 7 digits for an angle
ATTENTION = ("self_attn", "attention", "attn")


class GivenRotary(nn.Module):
    """A rotary embedding by its definition; for types whose angles depend on the length too."""

    def __init__(self, rotary: Rotary):
        super().__init__()
        self._rotary = rotary
        self._made: dict[int, tuple[mx.array, float]] = {}

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        wavelengths, scale = self._at(x.shape[-2], offset)
        dims = self._rotary.dims
        if scale != 1:
            x = x.at[..., :dims].multiply(scale)
        options = {"traditional": self._rotary.interleaved, "base": None, "scale": 1.0}
        return mx.fast.rope(x, dims, **options, offset=offset, freqs=wavelengths)

    def _at(self, new: int, offset: int | mx.array) -> tuple[mx.array, float]:
        length = 0
        if self._rotary.depends_on_length:
            length = new + (offset if isinstance(offset, int) else int(offset.max().item()))
            if self._rotary.type == "longrope":
                length = self._rotary.lengths()[length > self._rotary.trained]
            else:
                length = max(length, self._rotary.longest)
        if length not in self._made:
            frequencies, scale = self._rotary.angles(length)
            self._made = {length: (mx.array((1 / frequencies).astype(np.float32)), scale)}
        return self._made[length]


class NotRotated(nn.Module):
    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return x


def settle_rotary(owner: nn.Module, meaning: Meaning) -> list[str]:
    """Compare each layer's rotary embedding with the definition, replace those that differ, and
    compare again; returns the config's key where one was replaced.

    Raises `ModelError` where what is left still differs.
    """
    asked = [layer.rotary for layer in meaning.layers or ()]
    modules = [
        next((getattr(layer, name) for name in ATTENTION if name in layer), None)
        for layer in owner.layers
    ]
    pairs = list(zip(asked, modules, strict=True))
    without = [pair for pair in pairs if getattr(pair[1], "rope", None) is None]
    if without and not meaning.tested:
        return []  # rotated elsewhere, or not at all
    if lacking := next((rotary for rotary, _ in without if rotary is not None), None):
        raise _rotary_refusal(lacking, meaning)
    pairs = [pair for pair in pairs if pair not in without]
    wrong = _differing(pairs, meaning)
    for rotary, attention in wrong:
        if meaning.tested and (rotary is None or rotary.dims <= _width(attention, meaning)):
            attention.rope = NotRotated() if rotary is None else GivenRotary(rotary)
    if left := _differing(wrong, meaning):
        raise _rotary_refusal(left[0][0], meaning)
    return ["rope_parameters"] if wrong else []


def _width(attention: nn.Module, meaning: Meaning) -> int:
    return getattr(attention, "head_dim", meaning.head_dim)


def _rotary_refusal(rotary: Rotary | None, meaning: Meaning) -> Exception:
    asked = (
        "no rotation"
        if rotary is None
        else f"{rotary.type} with rope_theta {rotary.parameters.get('rope_theta')}"
    )
    return meaning.refusal(
        "rope_parameters",
        f"asks for {asked}",
        "mlx-lm computes another rotation; use --backend torch",
    )


def _differing(pairs: list, meaning: Meaning) -> list:
    return [
        (rotary, attention)
        for rotary, attention in pairs
        if not _rotates_as_asked(rotary, attention, meaning)
    ]


def _rotates_as_asked(rotary: Rotary | None, attention: nn.Module, meaning: Meaning) -> bool:
    width = _width(attention, meaning)
    if rotary is None:
        return getattr(attention, "use_sliding_window", True) is False or _left_alone(
            attention.rope, width
        )
    if rotary.depends_on_length and not isinstance(attention.rope, GivenRotary):
        return False  # mlx-lm has one of the two of longrope, and a dynamic one for single texts
    orders = (rotary.interleaved,) if meaning.tested else (False, True)
    for length in rotary.lengths():
        tolerance = ROTATED if length == 2 else ROTATED_FAR
        if not any(
            _rotates(attention.rope, rotary, width, length, order, tolerance) for order in orders
        ):
            return False
    return True


def _rotates(
    rope: Any, rotary: Rotary, width: int, length: int, interleaved: bool, tolerance: float
) -> bool:
    """Whether the last of `length` tokens, all ones in the first of each pair, is turned as it
    should be."""
    half = rotary.dims // 2
    first, second = (
        (slice(0, rotary.dims, 2), slice(1, rotary.dims, 2))
        if interleaved
        else (slice(half), slice(half, 2 * half))
    )
    given = np.ones(width)
    given[second] = 0
    wanted = given.copy()
    wanted[first], wanted[second] = rotary.rotated(np.ones(half), np.zeros(half), length)
    found = np.array(
        rope(mx.array(given.astype(np.float32)).reshape(1, 1, 1, width), offset=length - 1)
    ).reshape(-1)
    room = tolerance * (np.abs(wanted) + 1e-6) if length == 2 else tolerance
    return bool(np.all(np.abs(found - wanted) <= room))


def _left_alone(rope: Any, width: int) -> bool:
    given = mx.ones((1, 1, 1, width))
    return mx.array_equal(rope(given, offset=1), given).item()
