"""What only MLX's chunked loss has: quantised heads, an exponential of its own, and an order that
keeps a lazy graph's memory flat.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from frameworks import FRAMEWORKS
from near import near
from test_loss import EPSILON, answer, exact, make_case

from mlx_distill.backends.mlx import vocabulary as subject
from mlx_distill.backends.mlx.heads import MatrixHead, QuantizedHead
from mlx_distill.backends.mlx.loss import kd_loss
from mlx_distill.objective import Objective


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_elements", [300, 2**20])
def test_a_quantised_teacher_head_is_its_dequantised_matrix(
    bits: int, block_elements: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        subject, "BLOCK_ELEMENTS", dict.fromkeys(subject.BLOCK_ELEMENTS, block_elements)
    )
    case = make_case(7)
    wide = np.random.default_rng(7).normal(size=(203, 64)).astype(np.float32) * 0.2
    packed = mx.quantize(mx.array(wide).astype(mx.bfloat16), group_size=32, bits=bits)
    unrounded = (
        packed[0],
        *(x.astype(mx.float32) for x in packed[1:]),
    )  # dequantize rounds to its scales' dtype
    plain = np.array(mx.dequantize(*unrounded, group_size=32, bits=bits))
    teacher_hidden = np.random.default_rng(8).normal(size=(31, 64)).astype(np.float32)
    case = replace(case, teacher_hidden=teacher_hidden, teacher_matrix=plain)
    want = exact(case, Objective())
    got = answer(
        FRAMEWORKS["mlx"], case, Objective(), head=QuantizedHead(*packed, group_size=32, bits=bits)
    )
    assert got["kd"] == near(want["kd"], rel=1e-4, abs=1e-4)
    assert got["hidden_grad"] == near(want["hidden_grad"], rel=1e-4, abs=1e-5)


def test_the_polynomial_exponential_is_right_to_the_last_place():
    x = np.concatenate([np.linspace(-86.9, 0, 100_001), [-1e9, -200.0]]).astype(np.float32)[None]
    got = np.array(subject._polynomial_exp(mx.array(x), mx.zeros((1, 1))))
    want = np.exp(x.astype(np.float64))
    assert np.abs(got[:, :-2] / want[:, :-2] - 1).max() < EPSILON
    assert got[:, -2:].max() < 1e-37


def test_peak_memory_does_not_grow_with_positions():
    """Four times the positions, the same peak, which is less than one float32 tensor of logits."""

    def peak(rows: int) -> int:
        case = make_case(0, rows=rows, vocab=16_001, masked=False)
        arrays = [
            mx.array(x)
            for x in (case.hidden, case.matrix, case.teacher_hidden, case.targets, case.weight)
        ]
        head = MatrixHead(mx.array(case.teacher_matrix))
        mx.eval(arrays, head.weight)
        hidden, matrix, teacher_hidden, *rest = arrays

        def total(hidden: mx.array) -> mx.array:
            return kd_loss(
                hidden, matrix, teacher_hidden, head, *rest, Objective(), 1.0, 64, False
            ).loss

        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(total)(hidden))
        return mx.get_peak_memory() - before

    small, large = peak(512), peak(2048)
    assert large <= 1.1 * small
    assert large < 2048 * 16_001 * 4
