"""How unsure a model is at some positions, on MLX, walked over chunks as the loss is.

In: hidden states of N positions and the head that makes logits of them. Out: the entropy at each.
Nothing is kept for a gradient. Axes: `N` positions, `D` width.
"""

import mlx.core as mx

from mlx_distill.backends.mlx.heads import Head
from mlx_distill.backends.mlx.vocabulary import Softmax, after, blocks_of, floor


def entropy_rows(hidden: mx.array, head: Head, chunk_tokens: int, vocab: int) -> mx.array:
    """Entropy in nats at temperature 1 over the first `vocab` ids, float32[N], of hidden states [N,
    D].
    """
    if not len(hidden):
        return mx.zeros((0,))
    blocks = blocks_of(vocab, min(chunk_tokens, len(hidden)), head.splits)
    rows: list[mx.array] = []
    for start in range(0, len(hidden), chunk_tokens):
        inputs = after(hidden[start : start + chunk_tokens].astype(mx.float32), rows[-1:])
        softmax, products = Softmax(), []
        done: list[mx.array] = []
        for first, last in blocks:
            logits = floor(head.logits(after(inputs, done), first, last))
            done = softmax.add(logits, logits.max(axis=1, keepdims=True))
            products.append(softmax.product(logits))
            done.append(products[-1])
        softmax.close()
        rows.append(softmax.entropy(products)[:, 0])
    return mx.concatenate(rows)
