"""How gradients travel between MLX's ranks; that a run of two is the run of one is in
`tests/test_ranks.py`.
"""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.backends.mlx import ranks as subject
from mlx_distill.backends.protocol import Ranks


def test_gradients_are_summed_in_messages_that_are_large_and_computed(monkeypatch):
    """Each array comes back in its place; no message waits for what is not computed yet."""
    sizes, computed = [], []

    def all_sum(array: mx.array) -> mx.array:
        sizes.append(array.nbytes)
        assert id(array) in computed  # before the others are waited for
        return 3 * array

    def evaluated(*arrays: mx.array) -> None:
        computed.extend(map(id, arrays))
        really(*arrays)

    really = mx.eval
    monkeypatch.setattr(mx, "eval", evaluated)
    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    monkeypatch.setattr(subject, "join", lambda: Ranks(0, 3))
    monkeypatch.setattr(subject, "MESSAGE_BYTES", 100)
    random = np.random.default_rng(0)
    made = {
        "layers": [{"a": mx.array(random.normal(size=(3, 4)).astype(np.float32))} for _ in range(7)]
        + [{"a": mx.ones((30, 2))}, {"a": mx.ones(5).astype(mx.bfloat16)}],
        "projection": {"1": mx.ones(3)},  # of the layer with that number, no place in a list
    }
    tree = subject.sum_gradients(made)
    assert tree["projection"].keys() == {"1"}
    found = dict(tree_flatten(tree))
    assert sizes == [144, 144, 288, 10, 12]  # three of 48; three; one and the large one
    for key, array in tree_flatten(made):
        assert found[key].shape == array.shape and found[key].dtype == array.dtype
        np.testing.assert_allclose(
            np.array(found[key].astype(mx.float32)),
            3 * np.array(array.astype(mx.float32)),
            rtol=1e-6,
        )
    assert list(found) == [key for key, _ in tree_flatten(made)]


def test_ranks_of_other_machines_share_no_memory(monkeypatch):
    mine = subject.zlib.crc32(subject.platform.node().encode()) >> 1
    said = mx.array([mine, 5, mine, 6], mx.int32)
    monkeypatch.setattr(subject, "join", lambda: Ranks(0, 4))
    monkeypatch.setattr(mx.distributed, "all_gather", lambda array: said)
    assert subject.on_this_machine() == 2
    monkeypatch.setattr(subject, "join", lambda: Ranks())
    assert subject.on_this_machine() == 1
