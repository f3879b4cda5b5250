"""What the parts of a model on MLX do on some texts: see `backends/activations.py`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.backends.activations import HEADS_INPUT, MLP_INPUT, Activations, Sums, averaged
from mlx_distill.backends.mlx.model import SplitModel, call_through

Found = dict[str, mx.array]


def activations(split: SplitModel, texts: Sequence[np.ndarray], head_dim: int) -> Activations:
    """Means over the tokens of `texts`, each int[T] and read by itself."""
    with ExitStack() as stack:
        found = [stack.enter_context(_watched(block, head_dim)) for block in split.layers]
        return averaged(_sums(split, text, found) for text in texts)


def _sums(split: SplitModel, text: np.ndarray, found: list[Found]) -> Sums:
    hidden = split.hidden(mx.array(np.asarray(text, np.int32))[None])
    mx.eval(hidden, found)
    blocks = [
        (each["change"].item(), _numpy(each.get(MLP_INPUT)), _numpy(each.get(HEADS_INPUT)))
        for each in found
    ]
    return Sums(len(text), blocks)


def _numpy(sums: mx.array | None) -> np.ndarray | None:
    return None if sums is None else np.array(sums)


@contextmanager
def _watched(block: nn.Module, head_dim: int) -> Iterator[Found]:
    """A dictionary that each call of the block fills anew with sums over tokens."""
    found: Found = {}

    def change(before: mx.array, after: mx.array) -> None:
        before, after = before.astype(mx.float32), after.astype(mx.float32)
        product = (before * after).sum(axis=-1)
        lengths = mx.linalg.norm(before, axis=-1) * mx.linalg.norm(after, axis=-1)
        found["change"] = (1 - product / mx.maximum(lengths, 1e-8)).sum()

    def channels(given: mx.array, _: mx.array) -> None:
        found[MLP_INPUT] = mx.abs(given.astype(mx.float32)).flatten(0, -2).sum(axis=0)

    def heads(given: mx.array, _: mx.array) -> None:
        by_head = mx.unflatten(given.astype(mx.float32), -1, (-1, head_dim))
        found[HEADS_INPUT] = mx.linalg.norm(by_head, axis=-1).flatten(0, -2).sum(axis=0)

    parts = dict(block.named_modules())
    with ExitStack() as stack:
        stack.enter_context(_told(block, change))
        for name, watch in ((MLP_INPUT, channels), (HEADS_INPUT, heads)):
            if part := parts.get(name):
                stack.enter_context(_told(part, watch))
        yield found


@contextmanager
def _told(module: nn.Module, watch: Callable[[mx.array, mx.array], None]) -> Iterator[None]:
    """While it lasts, `watch(first argument, result)` follows every call."""

    def told(forward: Callable, self: nn.Module, given: mx.array, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, given, *args, **kwargs)
        watch(given, result)
        return result

    give_back = call_through(module, told, "Watched")
    try:
        yield
    finally:
        give_back()
