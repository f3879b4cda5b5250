"""How much each part of a model does on some texts, by which parts are chosen that may go.

In: what a backend measured of each text. Out: `Activations`, averaged over tokens. Decided here:
the measures. Of a block, how far it turns the hidden state: 1 - cos(before, after), ShortGPT's
Block Influence (arXiv 2403.03853). Of an MLP channel, the mean size of what it gives to down_proj,
and of a head, the mean norm of what it gives to o_proj, as Minitron (arXiv 2407.14679) measures
them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

BLOCK, MLP_INPUT, HEADS_INPUT = "", "mlp.down_proj", "self_attn.o_proj"  # watched in each block


@dataclass(frozen=True)
class Activations:
    """Means over `tokens` tokens: `change` [L] of the blocks, `channels` [L, F] of the MLPs,
    `queries` [L, H] of the query heads; the last two are [L, 0] where a family's blocks have no
    `mlp.down_proj` or `self_attn.o_proj`.
    """

    tokens: int
    change: np.ndarray
    channels: np.ndarray
    queries: np.ndarray

    def of_kv_heads(self, kv_heads: int) -> np.ndarray:
        """[L, kv_heads]: the sum over the query heads that share a key-value head."""
        layers, queries = self.queries.shape
        return self.queries.reshape(layers, kv_heads, queries // kv_heads).sum(axis=2)


@dataclass(frozen=True)
class Sums:
    """The same of one text, as sums over its tokens: of each block its change, its channels [F] and
    its heads [H]; None where they cannot be seen.
    """

    tokens: int
    blocks: list[tuple[float, np.ndarray | None, np.ndarray | None]]


def averaged(texts: Iterable[Sums]) -> Activations:
    """Over all tokens of all texts, in float64."""
    total, tokens = None, 0
    for text in texts:
        tokens += text.tokens
        change, channels, queries = zip(*text.blocks, strict=True)
        parts = [np.array(change, np.float64), _rows(channels), _rows(queries)]
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    assert total is not None, "no texts"
    return Activations(tokens, *(part / tokens for part in total))


def _rows(found: tuple[np.ndarray | None, ...]) -> np.ndarray:
    """[L, …]; [L, 0] where any block lacks it."""
    seen = [row for row in found if row is not None]
    if len(seen) < len(found):
        return np.zeros((len(found), 0))
    return np.stack(seen).astype(np.float64)
