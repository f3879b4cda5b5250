"""MLX's chunked loss against the float64 definitions and against the dense float32 formula it replaces."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill import objective as definition
from mlx_distill.backends.mlx import loss as subject
from mlx_distill.backends.mlx.loss import CallableHead, Head, MatrixHead, QuantizedHead, kd_loss, score_rows
from mlx_distill.objective import DIVERGENCES, Objective

EPSILON = 2.0**-23
NAMES = ("loss", "kd", "ce", "hidden_grad", "weight_grad")


@dataclass(frozen=True)
class Case:
    """The float32 arrays of one comparison."""

    hidden: np.ndarray
    matrix: np.ndarray
    teacher_hidden: np.ndarray
    teacher_matrix: np.ndarray
    targets: np.ndarray
    weight: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        return self.hidden.astype(np.float64) @ self.matrix.T.astype(np.float64)

    @property
    def teacher_logits(self) -> np.ndarray:
        return self.teacher_hidden.astype(np.float64) @ self.teacher_matrix.T.astype(np.float64)


def make_case(seed: int, rows: int = 31, vocab: int = 203, temper: str = "plain", masked: bool = True) -> Case:
    """`temper`: "plain", "peaked" (large logits) or "onehot" (a teacher that is nearly sure)."""
    rng = np.random.default_rng(seed)
    scale = {"plain": 0.2, "peaked": 3.0, "onehot": 1.0}[temper]
    hidden, teacher_hidden = rng.normal(size=(rows, 24)), rng.normal(size=(rows, 16))
    matrix, teacher_matrix = scale * rng.normal(size=(vocab, 24)), scale * rng.normal(size=(vocab, 16))
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    if temper == "onehot":
        teacher_hidden = 3 * teacher_matrix[targets]
    weight = rng.integers(0, 2, rows) * rng.uniform(0.5, 2, rows) if masked else np.ones(rows)
    arrays = (hidden, matrix, teacher_hidden, teacher_matrix, weight)
    hidden, matrix, teacher_hidden, teacher_matrix, weight = (x.astype(np.float32) for x in arrays)
    return Case(hidden, matrix, teacher_hidden, teacher_matrix, targets, weight)


def exact(case: Case, objective: Objective, teacher_logits: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The float64 answer; with loss_tokens = rows."""
    teacher_logits = case.teacher_logits if teacher_logits is None else teacher_logits
    weight, rows = case.weight.astype(np.float64), len(case.weight)
    live = weight != 0
    slope = definition.grad(case.logits, teacher_logits, case.targets, objective) * weight[:, None] / rows
    total = (definition.loss(case.logits, teacher_logits, case.targets, objective) * weight).sum() / rows
    kd = definition.divergence(case.logits, teacher_logits, objective) * live
    ce = definition.cross_entropy(case.logits, case.targets) * live
    return dict(zip(NAMES, (total, kd, ce, slope @ case.matrix, slope.T @ case.hidden), strict=True))


def evaluate(function, case: Case) -> dict[str, np.ndarray]:
    """Numpy float64 of `function(hidden, matrix) -> loss, kd, ce` and its gradients."""
    arrays = mx.array(case.hidden), mx.array(case.matrix)
    outputs, gradients = mx.value_and_grad(function, argnums=(0, 1))(*arrays)
    return dict(zip(NAMES, (np.array(x, dtype=np.float64) for x in (*outputs, *gradients)), strict=True))


def ours(case: Case, objective: Objective, chunk: int, head: Head | None = None) -> dict[str, np.ndarray]:
    head = head or MatrixHead(mx.array(case.teacher_matrix))
    rest = [mx.array(x) for x in (case.targets, case.weight)]
    teacher_hidden, rows = mx.array(case.teacher_hidden), len(case.weight)
    return evaluate(
        lambda h, w: kd_loss(h, w, teacher_hidden, head, *rest, objective, float(rows), chunk, True)[:3], case
    )


def dense(case: Case, objective: Objective) -> dict[str, np.ndarray]:
    """The same from the dense float32 formula and autodiff."""
    targets, weight = mx.array(case.targets), mx.array(case.weight)
    beta, temperature = objective.jsd_beta, objective.temperature

    def log_softmax(logits: mx.array) -> mx.array:
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def kl(log_p: mx.array, log_q: mx.array) -> mx.array:
        return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)

    def formula(hidden: mx.array, matrix: mx.array) -> tuple[mx.array, ...]:
        logits = hidden @ matrix.T
        s = log_softmax(logits / temperature)
        t = log_softmax(mx.array(case.teacher_hidden) @ mx.array(case.teacher_matrix).T / temperature)
        m = mx.logaddexp(np.log(beta) + t, np.log1p(-beta) + s)
        kd = {
            "forward_kl": lambda: kl(t, s), "reverse_kl": lambda: kl(s, t),
            "jsd": lambda: beta * kl(t, m) + (1 - beta) * kl(s, m),
        }[objective.divergence]() * objective.divergence_scale
        ce = -mx.take_along_axis(log_softmax(logits), targets[:, None], axis=1)[:, 0]
        total = ((objective.kd_weight * kd + (1 - objective.kd_weight) * ce) * weight).sum() / len(case.weight)
        live = weight != 0
        return total, mx.where(live, kd, 0), mx.where(live, ce, 0)

    return evaluate(formula, case)


def error(got: dict[str, np.ndarray], want: dict[str, np.ndarray], name: str) -> float:
    return float(np.sqrt(np.mean((got[name] - want[name]) ** 2)))


@pytest.fixture(params=[300, 2**20], ids=["many blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BLOCK_ELEMENTS", dict.fromkeys(subject.BLOCK_ELEMENTS, request.param))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temper", ["plain", "peaked", "onehot"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_error_is_at_most_twice_that_of_the_dense_float32_formula(
    blocks, divergence: str, temper: str, temperature: float
):
    objective = Objective(divergence, 0.3, 0.5, temperature)
    for seed in range(2):
        case = make_case(seed, rows=19, temper=temper, masked=bool(seed))
        want, naive = exact(case, objective), dense(case, objective)
        for chunk in (1, 8, 64):
            got = ours(case, objective, chunk)
            for name in ("kd", "ce", "hidden_grad", "weight_grad"):
                assert error(got, want, name) <= 2 * error(naive, want, name), (name, seed, chunk)
            # one number can be right by luck: the formula's luck is worth no more than rounding it
            assert error(got, want, "loss") <= 2 * max(error(naive, want, "loss"), 2 * EPSILON * abs(want["loss"]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_real_vocabulary_is_summed_no_worse_than_densely(divergence: str):
    objective = Objective(divergence, 0.5, 0.5)
    case = make_case(0, rows=9, vocab=151_936, masked=False)
    want, naive, got = exact(case, objective), dense(case, objective), ours(case, objective, 4)
    for name in NAMES:
        assert error(got, want, name) <= 2 * error(naive, want, name), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("kd_weight", [0.0, 0.4, 1.0])
def test_chunked_equals_whole_at_odd_sizes(blocks, divergence: str, rows: int, kd_weight: float):
    objective = Objective(divergence, 0.3, kd_weight, 1.5)
    case = make_case(rows, rows=rows)
    whole, chunked, want = (
        ours(case, objective, 1000), ours(case, objective, 8), exact(case, objective),
    )
    for name in NAMES:
        assert chunked[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
        assert chunked[name] == pytest.approx(want[name], rel=1e-5, abs=2e-6), name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_equals_filtered_whatever_the_masked_rows_hold(blocks, divergence: str):
    objective = Objective(divergence, 0.3, 0.4, 2.0)
    case = make_case(0)
    live = case.weight != 0
    poisoned = [np.where(live[:, None], x, np.nan).astype(np.float32) for x in (case.hidden, case.teacher_hidden)]
    masked = ours(Case(poisoned[0], case.matrix, poisoned[1], case.teacher_matrix, case.targets, case.weight),
                  objective, 4)
    filtered = ours(Case(case.hidden[live], case.matrix, case.teacher_hidden[live], case.teacher_matrix,
                         case.targets[live], case.weight[live]), objective, 4)
    share = live.mean()  # `ours` divides by the rows it is given
    for name in ("kd", "ce"):
        assert masked[name][live] == pytest.approx(filtered[name], rel=1e-5, abs=1e-6)
        assert not masked[name][~live].any()
    assert masked["loss"] == pytest.approx(filtered["loss"] * share, rel=1e-5)
    assert masked["weight_grad"] == pytest.approx(filtered["weight_grad"] * share, rel=1e-4, abs=1e-6)
    assert masked["hidden_grad"][live] == pytest.approx(filtered["hidden_grad"] * share, rel=1e-4, abs=1e-6)
    assert not masked["hidden_grad"][~live].any()


@pytest.mark.parametrize("loss_tokens", [0.0, 5.0])
def test_nothing_supervised_is_zero_not_nan(blocks, loss_tokens: float):
    case = make_case(0, rows=5)

    def total(hidden: mx.array, matrix: mx.array) -> mx.array:
        return kd_loss(
            hidden, matrix, mx.array(case.teacher_hidden), MatrixHead(mx.array(case.teacher_matrix)),
            mx.array(case.targets), mx.zeros(5), Objective(), loss_tokens, 2, True,
        ).loss

    value, gradients = mx.value_and_grad(total, argnums=(0, 1))(mx.array(case.hidden), mx.array(case.matrix))
    assert value.item() == 0
    assert all(not np.array(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_are_finite_differences_of_the_loss(blocks, divergence: str):
    objective = Objective(divergence, 0.3, 0.6, 2.0)
    case = make_case(1, rows=6, vocab=11, masked=False)
    got = ours(case, objective, 4)
    rng = np.random.default_rng(0)
    for name, field in (("hidden_grad", "hidden"), ("weight_grad", "matrix")):
        direction = rng.normal(size=got[name].shape).astype(np.float32)
        ends = []
        for sign in (1, -1):
            moved = {**case.__dict__, field: (getattr(case, field) + sign * 1e-2 * direction).astype(np.float32)}
            ends.append(ours(Case(**moved), objective, 4)["loss"])
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx((got[name] * direction).sum(), rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_divergence_from_oneself(divergence: str):
    case = make_case(2, temper="peaked", masked=False)
    twin = Case(case.hidden, case.matrix, case.hidden, case.matrix, case.targets, case.weight)
    got = ours(twin, Objective(divergence, 0.3, 1.0, 2.0), 8)
    assert got["kd"] == pytest.approx(0, abs=1e-5)
    assert got["hidden_grad"] == pytest.approx(0, abs=1e-5)


def call(case: Case, head: Head | None, objective: Objective, train_head: bool = True, matrix: mx.array | None = None,
         vocab: int = 0):
    """(loss rows, gradients) of a case with any head."""
    matrix = mx.array(case.matrix) if matrix is None else matrix
    teacher_hidden = None if head is None else mx.array(case.teacher_hidden)

    def total(hidden: mx.array, matrix: mx.array):
        rows = kd_loss(hidden, matrix, teacher_hidden, head, mx.array(case.targets), mx.array(case.weight), objective,
                       float(len(case.weight)), 8, train_head, vocab)
        return rows.loss, rows

    (_, rows), gradients = mx.value_and_grad(total, argnums=(0, 1))(mx.array(case.hidden), matrix)
    return rows, gradients


def test_agreement_is_of_the_most_likely_tokens(blocks):
    case = make_case(3, temper="onehot", masked=False)
    hidden = np.where(np.arange(31)[:, None] % 2, 3 * case.matrix[case.targets], case.hidden)
    case = Case(hidden, case.matrix, case.teacher_hidden, case.teacher_matrix, case.targets, case.weight)
    rows, _ = call(case, MatrixHead(mx.array(case.teacher_matrix)), Objective())
    same = case.logits.argmax(axis=1) == case.teacher_logits.argmax(axis=1)
    assert 10 < same.sum() < 25
    assert (np.array(rows.agree) == same).all()


def test_a_frozen_head_has_no_gradient_and_the_hidden_states_the_same(blocks):
    case = make_case(4)
    head = MatrixHead(mx.array(case.teacher_matrix))
    _, (hidden_grad, _) = call(case, head, Objective())
    _, (frozen_grad, weight_grad) = call(case, head, Objective(), train_head=False)
    assert not np.array(weight_grad).any()
    assert np.array_equal(np.array(hidden_grad), np.array(frozen_grad))


def test_a_frozen_bfloat16_head_is_exact_in_float32(blocks):
    case = make_case(5)
    half = mx.array(case.matrix).astype(mx.bfloat16)
    teacher_half = mx.array(case.teacher_matrix).astype(mx.bfloat16)
    rounded = Case(case.hidden, np.array(half.astype(mx.float32)), case.teacher_hidden,
                   np.array(teacher_half.astype(mx.float32)), case.targets, case.weight)
    want = exact(rounded, Objective())
    rows, (hidden_grad, _) = call(case, MatrixHead(teacher_half), Objective(), train_head=False, matrix=half)
    assert np.array(rows.kd) == pytest.approx(want["kd"], rel=1e-5, abs=1e-6)
    assert np.array(hidden_grad) == pytest.approx(want["hidden_grad"], rel=1e-5, abs=1e-6)


def test_gradients_come_in_the_dtype_of_what_they_are_gradients_of():
    case = make_case(6)
    hidden, matrix = (mx.array(x).astype(mx.bfloat16) for x in (case.hidden, case.matrix))
    total = lambda h, w: kd_loss(  # noqa: E731
        h, w, None, None, mx.array(case.targets), mx.array(case.weight), Objective(kd_weight=0.0), 31.0, 8, True
    ).loss
    value, gradients = mx.value_and_grad(total, argnums=(0, 1))(hidden, matrix)
    assert value.dtype == mx.float32
    assert [gradient.dtype for gradient in gradients] == [mx.bfloat16, mx.bfloat16]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_teacher_head_is_its_dequantised_matrix(blocks, bits: int):
    case = make_case(7)
    wide = np.random.default_rng(7).normal(size=(203, 64)).astype(np.float32) * 0.2
    packed = mx.quantize(mx.array(wide).astype(mx.bfloat16), group_size=32, bits=bits)
    unrounded = (packed[0], *(x.astype(mx.float32) for x in packed[1:]))  # dequantize rounds to its scales' dtype
    plain = np.array(mx.dequantize(*unrounded, group_size=32, bits=bits))
    teacher_hidden = np.random.default_rng(8).normal(size=(31, 64)).astype(np.float32)
    case = Case(case.hidden, case.matrix, teacher_hidden, plain, case.targets, case.weight)
    want = exact(case, Objective())
    rows, (hidden_grad, _) = call(case, QuantizedHead(*packed, group_size=32, bits=bits), Objective())
    assert np.array(rows.kd) == pytest.approx(want["kd"], rel=1e-4, abs=1e-4)
    assert np.array(hidden_grad) == pytest.approx(want["hidden_grad"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("form", ["matrix", "function"])
def test_a_head_with_bias_and_soft_cap(blocks, form: str):
    case = make_case(8, temper="peaked")
    bias = np.random.default_rng(9).normal(size=203).astype(np.float32)
    matrix, cap = mx.array(case.teacher_matrix), lambda logits: 5.0 * mx.tanh(logits / 5.0)
    head = {
        "matrix": MatrixHead(matrix, mx.array(bias), cap),
        "function": CallableHead(lambda hidden: cap(hidden @ matrix.T + mx.array(bias))),
    }[form]
    want = exact(case, Objective(), 5 * np.tanh((case.teacher_logits + bias) / 5))
    rows, (hidden_grad, _) = call(case, head, Objective())
    assert np.array(rows.kd) == pytest.approx(want["kd"], rel=1e-5, abs=1e-5)
    assert np.array(hidden_grad) == pytest.approx(want["hidden_grad"], rel=1e-5, abs=1e-5)


def test_padded_heads_are_cut_and_their_padding_gets_no_gradient(blocks):
    case = make_case(9)
    padded = np.concatenate([case.matrix, np.full((13, 24), 9, np.float32)])
    head = MatrixHead(mx.array(np.concatenate([case.teacher_matrix, np.full((5, 16), 9, np.float32)])))
    rows, (_, weight_grad) = call(case, head, Objective(), matrix=mx.array(padded), vocab=203)
    want = exact(case, Objective())
    assert rows.loss.item() == pytest.approx(want["loss"], rel=1e-5)
    assert np.array(weight_grad)[:203] == pytest.approx(want["weight_grad"], rel=1e-4, abs=1e-6)
    assert weight_grad.shape == padded.shape and not np.array(weight_grad)[203:].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_logits_of_minus_infinity_in_the_teacher_add_nothing(blocks, divergence: str):
    case = make_case(10)
    bias = np.where(np.arange(203) % 3 == 0, -np.inf, 0).astype(np.float32)
    want = exact(case, Objective(divergence), case.teacher_logits + bias)
    head = MatrixHead(mx.array(case.teacher_matrix), mx.array(bias))
    rows, (hidden_grad, _) = call(case, head, Objective(divergence))
    assert np.array(rows.kd) == pytest.approx(want["kd"], rel=1e-5, abs=1e-6)
    assert np.array(hidden_grad) == pytest.approx(want["hidden_grad"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_in_a_live_row_is_not_hidden(poison: float):
    case = make_case(11, masked=False)
    hidden = case.hidden.copy()
    hidden[3] = poison
    case = Case(hidden, case.matrix, case.teacher_hidden, case.teacher_matrix, case.targets, case.weight)
    rows, (hidden_grad, _) = call(case, MatrixHead(mx.array(case.teacher_matrix)), Objective())
    assert not np.isfinite(rows.loss.item())
    assert not np.isfinite(np.array(hidden_grad)[3]).all()


def test_kd_weight_zero_needs_no_teacher_and_kd_weight_one_no_target(blocks):
    case = make_case(12)
    rows, gradients = call(case, None, Objective(kd_weight=0.0, temperature=3.0))
    want = exact(case, Objective(kd_weight=0.0, temperature=3.0))
    assert not np.array(rows.kd).any() and not np.array(rows.agree).any()
    assert rows.loss.item() == pytest.approx(want["loss"], rel=1e-5)
    assert np.array(gradients[1]) == pytest.approx(want["weight_grad"], rel=1e-4, abs=1e-6)
    head = MatrixHead(mx.array(case.teacher_matrix))
    other = Case(case.hidden, case.matrix, case.teacher_hidden, case.teacher_matrix, case.targets[::-1].copy(),
                 case.weight)
    first, second = (call(c, head, Objective(kd_weight=1.0)) for c in (case, other))
    assert first[0].loss.item() == second[0].loss.item()
    assert np.array_equal(np.array(first[1][1]), np.array(second[1][1]))
    assert not np.array_equal(np.array(first[0].ce), np.array(second[0].ce))  # still reported


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scores_are_the_rows_of_the_loss(blocks, divergence: str):
    case = make_case(13)
    objective = Objective(divergence, 0.3, 0.4, 2.0)
    head = MatrixHead(mx.array(case.teacher_matrix))
    rows, _ = call(case, head, objective)
    scores = score_rows(
        mx.array(case.hidden), mx.array(case.matrix), mx.array(case.teacher_hidden), head, mx.array(case.targets),
        mx.array(case.weight), objective, 8,
    )
    for name in ("kd", "ce", "agree"):
        assert np.array_equal(np.array(getattr(rows, name)), np.array(getattr(scores, name))), name
    assert scores.loss.item() == pytest.approx(rows.loss.item() * 31, rel=1e-5)


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
        arrays = [mx.array(x) for x in (case.hidden, case.matrix, case.teacher_hidden, case.targets, case.weight)]
        head = MatrixHead(mx.array(case.teacher_matrix))
        mx.eval(arrays, head.weight)
        hidden, matrix, teacher_hidden, *rest = arrays

        def total(hidden: mx.array) -> mx.array:
            return kd_loss(hidden, matrix, teacher_hidden, head, *rest, Objective(), 1.0, 64, False).loss

        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(total)(hidden))
        return mx.get_peak_memory() - before

    small, large = peak(512), peak(2048)
    assert large <= 1.1 * small
    assert large < 2048 * 16_001 * 4
