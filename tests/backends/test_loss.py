"""The chunked loss of every framework against the float64 definitions and against the dense float32
formula it replaces.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
from frameworks import FRAMEWORKS, Framework, dtype_name
from near import near

from mlx_distill import objective as definition
from mlx_distill.backends.mlx import divergences
from mlx_distill.backends.mlx import vocabulary as mlx_vocabulary
from mlx_distill.backends.torch import loss as torch_loss
from mlx_distill.backends.torch import products
from mlx_distill.backends.torch import vocabulary as torch_vocabulary
from mlx_distill.divergences import DIVERGENCES
from mlx_distill.objective import Objective

ALL = (*DIVERGENCES, "dkd")  # the pairs, and the one that asks for the target
EPSILON = 2.0**-23
NAMES = ("loss", "kd", "ce", "hidden_grad", "weight_grad")


@dataclass(frozen=True, eq=False)
class Case:
    """The float32 arrays of one comparison, to be left as they are."""

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


@lru_cache(maxsize=8)
def make_case(
    seed: int, rows: int = 31, vocab: int = 203, temper: str = "plain", masked: bool = True
) -> Case:
    """`temper`: "plain", "peaked" (large logits) or "onehot" (a teacher that is nearly sure)."""
    rng = np.random.default_rng(seed)
    scale = {"plain": 0.2, "peaked": 3.0, "onehot": 1.0}[temper]
    hidden, teacher_hidden = rng.normal(size=(rows, 24)), rng.normal(size=(rows, 16))
    matrix, teacher_matrix = (
        scale * rng.normal(size=(vocab, 24)),
        scale * rng.normal(size=(vocab, 16)),
    )
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    if temper == "onehot":
        teacher_hidden = 3 * teacher_matrix[targets]
    weight = rng.integers(0, 2, rows) * rng.uniform(0.5, 2, rows) if masked else np.ones(rows)
    arrays = (hidden, matrix, teacher_hidden, teacher_matrix, weight)
    hidden, matrix, teacher_hidden, teacher_matrix, weight = (x.astype(np.float32) for x in arrays)
    return Case(hidden, matrix, teacher_hidden, teacher_matrix, targets, weight)


def exact(
    case: Case, objective: Objective, teacher_logits: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The float64 answer; with loss_tokens = rows."""
    teacher_logits = case.teacher_logits if teacher_logits is None else teacher_logits
    weight, rows = case.weight.astype(np.float64), len(case.weight)
    live = weight != 0
    slope = (
        definition.grad(case.logits, teacher_logits, case.targets, objective)
        * weight[:, None]
        / rows
    )
    total = (
        definition.loss(case.logits, teacher_logits, case.targets, objective) * weight
    ).sum() / rows
    kd = definition.divergence(case.logits, teacher_logits, objective, case.targets) * live
    ce = definition.cross_entropy(case.logits, case.targets) * live
    return dict(
        zip(NAMES, (total, kd, ce, slope @ case.matrix, slope.T @ case.hidden), strict=True)
    )


def answer(
    framework: Framework,
    case: Case,
    objective: Objective,
    chunk: int = 8,
    head=None,
    matrix=None,
    loss_tokens: float | None = None,
    **options,
) -> dict[str, np.ndarray]:
    """Float64 loss, rows and gradients by `kd_loss`; the teacher's head is its matrix unless given,
    False is no teacher.
    """
    if head is None:
        head = framework.heads.MatrixHead(framework.array(case.teacher_matrix))
    teacher = (framework.array(case.teacher_hidden), head) if head else (None, None)
    rest = framework.array(case.targets), framework.array(case.weight)
    divisor = float(len(case.weight)) if loss_tokens is None else loss_tokens

    def total(hidden, matrix) -> tuple:
        return tuple(
            framework.loss.kd_loss(
                hidden,
                matrix,
                *teacher,
                *rest,
                objective,
                divisor,
                chunk,
                **{"train_head": True} | options,
            )
        )

    return evaluate(framework, total, case, matrix)


def evaluate(framework: Framework, function, case: Case, matrix=None) -> dict[str, np.ndarray]:
    """Of `function(hidden, matrix) -> loss, kd, ce(, agree)` and the gradients of the loss, as
    float64.
    """
    matrix = framework.array(case.matrix) if matrix is None else matrix
    outputs, gradients = framework.differentiate(function, framework.array(case.hidden), matrix)
    arrays = (*outputs[:3], *gradients, *outputs[3:])
    return dict(
        zip(
            (*NAMES, "agree"), (framework.numpy(x).astype(np.float64) for x in arrays), strict=False
        )
    )


def dense(framework: Framework, case: Case, objective: Objective) -> dict[str, np.ndarray]:
    """The same from the dense float32 formula and the framework's own derivatives."""
    xp, vocab = framework.xp, len(case.matrix)
    beta, alpha, temperature = (
        objective.jsd_beta,
        objective.skew_alpha,
        objective.temperature,
    )
    targets, weight, teacher_hidden, teacher_matrix = map(
        framework.array, (case.targets, case.weight, case.teacher_hidden, case.teacher_matrix)
    )

    def log_softmax(logits):
        return logits - xp.logsumexp(logits, axis=-1, keepdims=True)

    def kl(log_p, log_q):
        return (xp.exp(log_p) * (log_p - log_q)).sum(-1)

    def dkd(s, t):
        at_target = xp.arange(vocab)[None] == targets[:, None]
        others = [xp.where(at_target, -1e9, x) for x in (s, t)]
        rest = [xp.logsumexp(x, axis=-1, keepdims=True) for x in others]
        of_target = [x[xp.arange(len(case.targets)), targets][:, None] for x in (s, t)]
        binary = kl(of_target[1], of_target[0]) + kl(rest[1], rest[0])
        among = kl(others[1] - rest[1], others[0] - rest[0])
        return objective.dkd_target * binary + objective.dkd_rest * among

    def entropy_kl(s, t):
        entropy = -(xp.exp(t) * t).sum(-1)
        forward = entropy / (entropy + objective.entropy_half)
        return forward * kl(t, s) + (1 - forward) * kl(s, t)

    def formula(hidden, matrix) -> tuple:
        logits = hidden @ matrix.T
        s = log_softmax(logits / temperature)
        t = log_softmax(teacher_hidden @ teacher_matrix.T / temperature)
        m = xp.logaddexp(math.log(beta) + t, math.log1p(-beta) + s)
        kd = {
            "forward_kl": lambda: kl(t, s),
            "reverse_kl": lambda: kl(s, t),
            "jsd": lambda: beta * kl(t, m) + (1 - beta) * kl(s, m),
            "mixed_kl": lambda: kl(t, s) / 2 + kl(s, t) / 2,
            "entropy_kl": lambda: entropy_kl(s, t),
            "dkd": lambda: dkd(s, t),
            "tvd": lambda: xp.abs(xp.exp(s) - xp.exp(t)).sum(-1) / 2,
            "log_tvd": lambda: xp.abs(s - t).sum(-1) / 2,
            "skew_kl": lambda: kl(t, xp.logaddexp(math.log(alpha) + t, math.log1p(-alpha) + s)),
            "skew_reverse_kl": lambda: kl(
                s, xp.logaddexp(math.log(alpha) + s, math.log1p(-alpha) + t)
            ),
        }[objective.divergence]() * objective.divergence_scale
        ce = -log_softmax(logits)[xp.arange(len(case.targets)), targets]
        total = ((objective.kd_weight * kd + (1 - objective.kd_weight) * ce) * weight).sum() / len(
            case.weight
        )
        live = weight != 0
        return total, xp.where(live, kd, 0.0), xp.where(live, ce, 0.0)

    return evaluate(framework, formula, case)


def error(got: dict[str, np.ndarray], want: dict[str, np.ndarray], name: str) -> float:
    return float(np.sqrt(np.mean((got[name] - want[name]) ** 2)))


def assert_no_worse(
    got: dict[str, np.ndarray], naive: dict[str, np.ndarray], want: dict[str, np.ndarray]
) -> None:
    """At most twice the formula's error. The loss is one number, right by luck at times: luck is
    worth no more than rounding it.
    """
    for name in NAMES:
        rounding = 2 * EPSILON * abs(want["loss"]) if name == "loss" else 0.0
        assert error(got, want, name) <= 2 * max(error(naive, want, name), rounding), name


# how the walk is cut: MLX's by logits of a block, torch's by positions, and by rows of a head in
# half precision
BLOCKS = {
    "mlx, many blocks": ("mlx", mlx_vocabulary, "BLOCK_ELEMENTS", {"cpu": 300, "gpu": 300}),
    "mlx, one block": ("mlx", mlx_vocabulary, "BLOCK_ELEMENTS", {"cpu": 2**20, "gpu": 2**20}),
    "torch, three positions at once": ("torch", torch_loss, "torch_rows", lambda *_: 3),
    "torch, 50 rows of a head at once": ("torch", products, "BLOCK_ROWS", 50),
}


@pytest.fixture(params=BLOCKS)
def walker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Framework:
    """A framework whose loss is cut in one way."""
    name, module, constant, value = BLOCKS[request.param]
    monkeypatch.setattr(module, constant, value)
    return FRAMEWORKS[name]


TEMPERS, TEMPERATURES, CHUNKS = ("plain", "peaked", "onehot"), (0.7, 1.0, 2.0), (1, 8, 64)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("temper", TEMPERS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_error_is_at_most_twice_that_of_the_dense_float32_formula(
    walker: Framework, divergence: str, temper: str, temperature: float
):
    """Each size of chunks with each mask, divergence, temper and temperature, but not with all of
    them together: that chunks tell what the whole tells is the next test but one.
    """
    objective = Objective(divergence, 0.3, 0.5, temperature)
    for seed in range(2):
        case = make_case(seed, rows=19, temper=temper, masked=bool(seed))
        want, naive = exact(case, objective), dense(walker, case, objective)
        turn = TEMPERS.index(temper) + TEMPERATURES.index(temperature) + seed
        got = answer(walker, case, objective, CHUNKS[turn % 3])
        assert_no_worse(got, naive, want)


@pytest.mark.parametrize("divergence", ALL)
def test_a_real_vocabulary_is_summed_no_worse_than_densely(divergence: str):
    objective = Objective(divergence, 0.5, 0.5)
    case = make_case(0, rows=5, vocab=151_936, masked=False)
    want = exact(case, objective)
    for framework in FRAMEWORKS.values():
        got, naive = answer(framework, case, objective, 4), dense(framework, case, objective)
        assert_no_worse(got, naive, want)


@pytest.mark.parametrize("taught", [0, 1, 8, 11, 19])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_weight", [0.4, 1.0])
def test_beyond_the_taught_positions_the_loss_is_the_cross_entropy(
    walker: Framework, taught: int, temperature: float, kd_weight: float
):
    objective, case = Objective("jsd", 0.3, kd_weight, temperature), make_case(3, rows=19)
    first = replace(case, weight=case.weight * (np.arange(19) < taught))
    rest = replace(case, weight=case.weight * (np.arange(19) >= taught))
    with_teacher, alone = exact(first, objective), exact(rest, Objective(kd_weight=0.0))
    want = {name: with_teacher[name] + alone[name] for name in NAMES} | {"kd": with_teacher["kd"]}
    asked = replace(case, teacher_hidden=case.teacher_hidden[:taught])
    got = answer(walker, asked, objective, 8, taught=taught)
    for name in NAMES:
        assert got[name] == near(want[name], rel=1e-5, abs=2e-6), name
    if taught == 19:
        assert got["loss"] == answer(walker, case, objective, 8)["loss"]


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("kd_weight", [0.0, 0.4, 1.0])
def test_chunked_equals_whole_at_odd_sizes(
    walker: Framework, divergence: str, rows: int, kd_weight: float
):
    objective = Objective(divergence, 0.3, kd_weight, 1.5)
    case = make_case(rows, rows=rows)
    whole, chunked, want = (
        answer(walker, case, objective, 1000),
        answer(walker, case, objective, 8),
        exact(case, objective),
    )
    for name in NAMES:
        assert chunked[name] == near(whole[name], rel=1e-5, abs=1e-6), name
        assert chunked[name] == near(want[name], rel=1e-5, abs=2e-6), name


@pytest.mark.parametrize("divergence", ALL)
def test_masked_equals_filtered_whatever_the_masked_rows_hold(walker: Framework, divergence: str):
    objective = Objective(divergence, 0.3, 0.4, 2.0)
    case = make_case(0)
    live = case.weight != 0
    poisoned = [
        np.where(live[:, None], x, np.nan).astype(np.float32)
        for x in (case.hidden, case.teacher_hidden)
    ]
    masked = answer(
        walker, replace(case, hidden=poisoned[0], teacher_hidden=poisoned[1]), objective, 4
    )
    filtered = answer(
        walker,
        Case(
            case.hidden[live],
            case.matrix,
            case.teacher_hidden[live],
            case.teacher_matrix,
            case.targets[live],
            case.weight[live],
        ),
        objective,
        4,
    )
    share = live.mean()  # `answer` divides by the rows it is given
    for name in ("kd", "ce"):
        assert masked[name][live] == near(filtered[name], rel=1e-5, abs=1e-6)
        assert not masked[name][~live].any()
    assert masked["loss"] == pytest.approx(filtered["loss"] * share, rel=1e-5)
    assert masked["weight_grad"] == near(filtered["weight_grad"] * share, rel=1e-4, abs=1e-6)
    assert masked["hidden_grad"][live] == near(filtered["hidden_grad"] * share, rel=1e-4, abs=1e-6)
    assert not masked["hidden_grad"][~live].any()


@pytest.mark.parametrize("loss_tokens", [0.0, 5.0])
def test_nothing_supervised_is_zero_not_nan(walker: Framework, loss_tokens: float):
    case = replace(make_case(0, rows=5), weight=np.zeros(5, np.float32))
    got = answer(walker, case, Objective(), 2, loss_tokens=loss_tokens)
    assert got["loss"] == 0
    assert not got["hidden_grad"].any() and not got["weight_grad"].any()


@pytest.mark.parametrize("divergence", ALL)
def test_gradients_are_finite_differences_of_the_loss(walker: Framework, divergence: str):
    objective = Objective(divergence, 0.3, 0.6, 2.0)
    case = make_case(1, rows=6, vocab=11, masked=False)
    got = answer(walker, case, objective, 4)
    rng = np.random.default_rng(0)
    for name, field in (("hidden_grad", "hidden"), ("weight_grad", "matrix")):
        direction = rng.normal(size=got[name].shape).astype(np.float32)
        ends = []
        for sign in (1, -1):
            moved = (getattr(case, field) + sign * 1e-2 * direction).astype(np.float32)
            ends.append(answer(walker, replace(case, **{field: moved}), objective, 4)["loss"])
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(
            (got[name] * direction).sum(), rel=5e-3, abs=1e-4
        )


@pytest.mark.parametrize("divergence", ALL)
def test_zero_divergence_from_oneself(framework: Framework, divergence: str):
    case = make_case(2, temper="peaked", masked=False)
    twin = replace(case, teacher_hidden=case.hidden, teacher_matrix=case.matrix)
    got = answer(framework, twin, Objective(divergence, 0.3, 1.0, 2.0))
    assert got["kd"] == near(0, abs=1e-5)
    assert got["hidden_grad"] == near(0, abs=1e-5)


def test_agreement_is_of_the_most_likely_tokens(walker: Framework):
    case = make_case(3, temper="onehot", masked=False)
    case = replace(
        case,
        hidden=np.where(np.arange(31)[:, None] % 2, 3 * case.matrix[case.targets], case.hidden),
    )
    same = case.logits.argmax(axis=1) == case.teacher_logits.argmax(axis=1)
    assert 10 < same.sum() < 25
    assert (answer(walker, case, Objective())["agree"] == same).all()


@pytest.mark.parametrize(
    "divergence, temperature, kd_weight",
    [("forward_kl", 1.0, 0.4), ("reverse_kl", 2.0, 0.4), ("reverse_kl", 1.0, 1.0)],
)
def test_what_mlx_sums_in_one_pass_is_what_its_pair_tells(
    divergence: str, temperature: float, kd_weight: float, monkeypatch
):
    """The pass over what was kept, which serves any pair, given those that are spared it in use."""
    monkeypatch.setattr(mlx_vocabulary, "BLOCK_ELEMENTS", {"cpu": 300, "gpu": 300})
    monkeypatch.setattr(divergences, "LINEAR", {})
    objective, case = Objective(divergence, 0.3, kd_weight, temperature), make_case(3, rows=19)
    got, want = answer(FRAMEWORKS["mlx"], case, objective), exact(case, objective)
    for name, array in want.items():
        assert got[name] == near(array, rel=1e-5, abs=2e-6), name


def tied_logits() -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, 203] of student and teacher in which two ids share the first place, or one of them
    has it alone.
    """
    edges = [(0, 202), (99, 100), (19, 20), (9, 150)]
    ties = [
        pair
        for a, b in edges
        for pair in (
            ((a, b), (a, b)),
            ((a, b), (a,)),
            ((a, b), (b,)),
            ((b,), (a, b)),
            ((a,), (a, b)),
        )
    ]
    student, teacher = np.zeros((2, len(ties), 203), np.float32)
    for row, (of_student, of_teacher) in enumerate(ties):
        student[row, list(of_student)] = teacher[row, list(of_teacher)] = 2
    return student, teacher


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_equally_likely_ids_the_lowest_is_the_choice(
    walker: Framework, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """Also where the two lie in different blocks. The mutant that takes any of the student's for
    its choice failed here.
    """
    monkeypatch.setattr(torch_vocabulary, "ARGMAX_IDS", 20)
    student, teacher = tied_logits()
    rows = np.eye(
        len(student), dtype=np.float32
    )  # hidden states that pick a column of the head: logits without rounding
    ones = np.ones(len(student), np.float32)
    case = Case(
        rows, student.T.copy(), rows, teacher.T.copy(), np.zeros(len(student), np.int32), ones
    )
    same = definition.same_choice(student, teacher)
    assert 0 < same.sum() < len(same)
    assert (answer(walker, case, Objective(temperature=temperature))["agree"] == same).all()


def test_a_frozen_head_has_no_gradient_and_the_hidden_states_the_same(walker: Framework):
    case = make_case(4)
    trained, frozen = (
        answer(walker, case, Objective()),
        answer(walker, case, Objective(), train_head=False),
    )
    assert trained["weight_grad"].any() and not frozen["weight_grad"].any()
    assert np.array_equal(trained["hidden_grad"], frozen["hidden_grad"])


def test_a_frozen_bfloat16_head_is_exact_in_float32(walker: Framework):
    case = make_case(5)
    half, teacher_half = (
        walker.array(matrix, "bfloat16") for matrix in (case.matrix, case.teacher_matrix)
    )
    want = exact(
        replace(case, matrix=walker.numpy(half), teacher_matrix=walker.numpy(teacher_half)),
        Objective(),
    )
    got = answer(
        walker,
        case,
        Objective(),
        head=walker.heads.MatrixHead(teacher_half),
        matrix=half,
        train_head=False,
    )
    assert got["kd"] == near(want["kd"], rel=1e-5, abs=1e-6)
    assert got["hidden_grad"] == near(want["hidden_grad"], rel=1e-5, abs=1e-6)


def test_gradients_come_in_the_dtype_of_what_they_are_gradients_of(framework: Framework):
    case = make_case(6)
    hidden, matrix = (framework.array(x, "bfloat16") for x in (case.hidden, case.matrix))
    rest = (
        framework.array(case.targets),
        framework.array(case.weight),
        Objective(kd_weight=0.0),
        31.0,
        8,
        True,
    )
    outputs, gradients = framework.differentiate(
        lambda h, w: tuple(framework.loss.kd_loss(h, w, None, None, *rest)), hidden, matrix
    )
    assert dtype_name(outputs[0]) == "float32"
    assert [dtype_name(gradient) for gradient in gradients] == ["bfloat16", "bfloat16"]
    rounded = replace(case, hidden=framework.numpy(hidden), matrix=framework.numpy(matrix))
    want = exact(rounded, Objective(kd_weight=0.0))
    for gradient, name in zip(gradients, ("hidden_grad", "weight_grad"), strict=True):
        assert framework.numpy(gradient) == near(
            want[name], rel=2**-8, abs=1e-6
        )  # rounded once, at the end


@pytest.mark.parametrize("form", ["matrix", "function"])
def test_a_head_with_bias_and_soft_cap(walker: Framework, form: str):
    case = make_case(8, temper="peaked")
    bias = np.random.default_rng(9).normal(size=203).astype(np.float32)
    matrix, shift = walker.array(case.teacher_matrix), walker.array(bias)

    def cap(logits):
        return 5.0 * walker.xp.tanh(logits / 5.0)

    head = {
        "matrix": walker.heads.MatrixHead(matrix, shift, cap),
        "function": walker.heads.CallableHead(lambda hidden: cap(hidden @ matrix.T + shift)),
    }[form]
    want = exact(case, Objective(), 5 * np.tanh((case.teacher_logits + bias) / 5))
    got = answer(walker, case, Objective(), head=head)
    assert got["kd"] == near(want["kd"], rel=1e-5, abs=1e-5)
    assert got["hidden_grad"] == near(want["hidden_grad"], rel=1e-5, abs=1e-5)


def test_padded_heads_are_cut_and_their_padding_gets_no_gradient(walker: Framework):
    case = make_case(9)
    padded = np.concatenate([case.matrix, np.full((13, 24), 9, np.float32)])
    head = walker.heads.MatrixHead(
        walker.array(np.concatenate([case.teacher_matrix, np.full((5, 16), 9, np.float32)]))
    )
    got = answer(walker, case, Objective(), head=head, matrix=walker.array(padded), vocab=203)
    want = exact(case, Objective())
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["weight_grad"][:203] == near(want["weight_grad"], rel=1e-4, abs=1e-6)
    assert got["weight_grad"].shape == padded.shape and not got["weight_grad"][203:].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_logits_of_minus_infinity_in_the_teacher_add_nothing(walker: Framework, divergence: str):
    case = make_case(10)
    bias = np.where(np.arange(203) % 3 == 0, -np.inf, 0).astype(np.float32)
    want = exact(case, Objective(divergence), case.teacher_logits + bias)
    head = walker.heads.MatrixHead(walker.array(case.teacher_matrix), walker.array(bias))
    got = answer(walker, case, Objective(divergence), head=head)
    assert got["kd"] == near(want["kd"], rel=1e-5, abs=1e-6)
    assert got["hidden_grad"] == near(want["hidden_grad"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_in_a_live_row_is_not_hidden(framework: Framework, poison: float):
    case = make_case(11, masked=False)
    hidden = case.hidden.copy()
    hidden[3] = poison
    got = answer(framework, replace(case, hidden=hidden), Objective())
    assert not np.isfinite(got["loss"])
    assert not np.isfinite(got["hidden_grad"][3]).all()


def test_kd_weight_zero_needs_no_teacher_and_kd_weight_one_no_target(walker: Framework):
    case = make_case(12)
    alone = Objective(kd_weight=0.0, temperature=3.0)
    got, want = answer(walker, case, alone, head=False), exact(case, alone)
    assert not got["kd"].any() and not got["agree"].any()
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert got["weight_grad"] == near(want["weight_grad"], rel=1e-4, abs=1e-6)
    other = replace(case, targets=case.targets[::-1].copy())
    first, second = (answer(walker, c, Objective(kd_weight=1.0)) for c in (case, other))
    assert first["loss"] == second["loss"]
    assert np.array_equal(first["weight_grad"], second["weight_grad"])
    assert not np.array_equal(first["ce"], second["ce"])  # still reported


@pytest.mark.parametrize("divergence", ALL)
def test_scores_are_the_rows_of_the_loss(walker: Framework, divergence: str):
    case = make_case(13)
    objective = Objective(divergence, 0.3, 0.4, 2.0)
    got = answer(walker, case, objective)
    hidden, matrix, teacher_hidden, teacher_matrix, targets, weight = map(
        walker.array, case.__dict__.values()
    )
    head = walker.heads.MatrixHead(teacher_matrix)
    scores = walker.loss.score_rows(
        hidden, matrix, teacher_hidden, head, targets, weight, objective, 8
    )
    for name in ("kd", "ce", "agree"):
        assert np.array_equal(got[name], walker.numpy(getattr(scores, name))), name
    assert scores.loss.item() == pytest.approx(got["loss"] * 31, rel=1e-5)
