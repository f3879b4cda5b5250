"""The loss from K of the teacher's answers, on both backends, against its definition in float64."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import torch
from test_loss import tied_logits

from mlx_distill import objective as definition
from mlx_distill.backends.mlx import heads as mlx_heads
from mlx_distill.backends.mlx import loss as mlx_loss
from mlx_distill.backends.mlx import teacher as mlx_teacher
from mlx_distill.backends.mlx import vocabulary as mlx_vocabulary
from mlx_distill.backends.protocol import SparseTargets
from mlx_distill.backends.torch import heads as torch_heads
from mlx_distill.backends.torch import loss as torch_loss
from mlx_distill.backends.torch import teacher as torch_teacher
from mlx_distill.backends.torch import vocabulary as torch_vocabulary
from mlx_distill.divergences import DIVERGENCES
from mlx_distill.objective import Objective

ROWS, VOCAB, WIDTH = 13, 203, 24
NAMES = ("loss", "kd", "ce", "agree", "hidden_grad", "weight_grad")
OBJECTIVES = [
    Objective(divergence, 0.3, kd_weight, dkd_target=0.7, dkd_rest=1.3)
    for divergence in (*DIVERGENCES, "dkd")
    for kd_weight in (0.5, 1.0)
]


def case(seed: int, scale: float = 0.3) -> tuple[np.ndarray, ...]:
    """Hidden states, head, teacher's logits, targets, weights (some 0)."""
    random = np.random.default_rng(seed)
    hidden, head = (
        random.normal(size=(ROWS, WIDTH)).astype(np.float32),
        (scale * random.normal(size=(VOCAB, WIDTH))).astype(np.float32),
    )
    teacher = 10 * scale * random.normal(size=(ROWS, VOCAB))
    weight = (random.integers(0, 3, ROWS) > 0) * random.uniform(0.5, 2, ROWS)
    return (
        hidden,
        head,
        teacher,
        random.integers(0, VOCAB, ROWS).astype(np.int32),
        weight.astype(np.float32),
    )


def top_k(teacher: np.ndarray, k: int) -> SparseTargets:
    v = definition.log_softmax(teacher)
    ids = np.argsort(-v, axis=1, kind="stable")
    rest = np.take_along_axis(v, ids[:, k:], 1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(1))
    kept = np.take_along_axis(v, ids[:, :k], 1).astype(np.float32)
    ids, zeros = ids.astype(np.int32), np.zeros(len(v), np.float32)
    return SparseTargets(ids[:, :k].copy(), kept, tail.astype(np.float32), zeros, ids[:, 0].copy())


def known(targets: np.ndarray, sparse: SparseTargets, objective: Objective) -> np.ndarray:
    """The targets; for dkd ones that are among the kept ids."""
    rows = np.arange(len(targets))
    among = sparse.ids[rows, targets % sparse.ids.shape[1]]
    return among if objective.divergence == "dkd" else targets


def padded(seed: int, teacher: np.ndarray) -> SparseTargets:
    """As what was drawn is kept: some ids are -1, there is no tail, and a constant is added."""
    random, sparse = np.random.default_rng(seed), top_k(teacher, 9)
    dead = random.integers(0, 2, sparse.ids.shape) * (np.arange(9) > 0) > 0
    log_probs = np.where(dead, -np.inf, sparse.log_probs)
    log_probs -= np.log(np.exp(log_probs).sum(1, keepdims=True))
    offset, tail = (
        random.normal(size=len(teacher)).astype(np.float32),
        np.full(len(teacher), -np.inf, np.float32),
    )
    return SparseTargets(
        np.where(dead, -1, sparse.ids).astype(np.int32), log_probs, tail, offset, sparse.top
    )


def exact(
    hidden, head, targets, weight, sparse: SparseTargets, objective: Objective
) -> dict[str, np.ndarray]:
    hidden, head, weight = (array.astype(np.float64) for array in (hidden, head, weight))
    logits, live = hidden @ head.T, weight != 0
    arguments = (logits, sparse.ids, sparse.log_probs, sparse.tail, objective)
    if objective.divergence == "dkd":
        arguments += (targets,)
    kd, slope = (
        definition.coarse_divergence(*arguments) + sparse.offset,
        definition.coarse_divergence_grad(*arguments),
    )
    ce, ce_slope = (
        definition.cross_entropy(logits, targets),
        definition.cross_entropy_grad(logits, targets),
    )
    k = objective.kd_weight
    slope = (k * slope + (1 - k) * ce_slope) * weight[:, None] / 7
    loss = ((k * kd + (1 - k) * ce) * weight).sum() / 7
    agree = logits.argmax(1) == sparse.top
    return dict(
        zip(
            NAMES,
            (loss, kd * live, ce * live, agree * live, slope @ head, slope.T @ hidden),
            strict=True,
        )
    )


def on_torch(
    hidden,
    head,
    targets,
    weight,
    sparse: SparseTargets,
    objective: Objective,
    chunk: int,
    score: bool = False,
):
    columns = torch_heads.SparseHead(
        *map(
            torch.from_numpy, (sparse.ids, sparse.log_probs, sparse.tail, sparse.offset, sparse.top)
        )
    )
    hidden, head = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    rest = (None, columns, torch.from_numpy(targets), torch.from_numpy(weight), objective)
    if score:
        return [x.numpy() for x in torch_loss.score_rows(hidden, head, *rest, chunk)[1:]]
    rows = torch_loss.kd_loss(hidden, head, *rest, 7, chunk, True)
    rows.loss.backward()
    return dict(
        zip(
            NAMES,
            (*(x.detach().numpy() for x in rows), hidden.grad.numpy(), head.grad.numpy()),
            strict=True,
        )
    )


def on_mlx(
    hidden,
    head,
    targets,
    weight,
    sparse: SparseTargets,
    objective: Objective,
    chunk: int,
    score: bool = False,
):
    columns = mlx_heads.SparseHead(
        *map(mx.array, (sparse.ids, sparse.log_probs, sparse.tail, sparse.offset, sparse.top))
    )
    rest = (None, columns, mx.array(targets), mx.array(weight), objective)
    if score:
        return [
            np.array(x)
            for x in mlx_loss.score_rows(mx.array(hidden), mx.array(head), *rest, chunk)[1:]
        ]

    def total(hidden, head):
        rows = mlx_loss.kd_loss(hidden, head, *rest, 7, chunk, True)
        return rows.loss, rows

    (_, rows), gradients = mx.value_and_grad(total, argnums=(0, 1))(
        mx.array(hidden), mx.array(head)
    )
    return dict(zip(NAMES, map(np.array, (*rows, *gradients)), strict=True))


RUN = {"torch": on_torch, "mlx": on_mlx}
BY_BLOCK = pytest.mark.parametrize("run", ["torch", "torch by blocks", "mlx", "mlx by blocks"])


@pytest.fixture
def by_block(run, monkeypatch):
    if run == "mlx by blocks":  # of 15 ids
        monkeypatch.setattr(mlx_vocabulary, "BLOCK_ELEMENTS", {"cpu": 70, "gpu": 70})
    if run == "torch by blocks":  # of positions
        monkeypatch.setattr(torch_loss, "torch_rows", lambda *_: 2)
    return RUN[run.split()[0]]


def assert_near(found: dict, expected: dict, tolerance: float = 2e-6) -> None:
    for name in NAMES:
        scale = max(1.0, np.abs(expected[name]).max())
        assert np.abs(found[name] - expected[name]).max() <= tolerance * scale, name


@BY_BLOCK
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 64, VOCAB - 1, VOCAB])
def test_top_k_is_its_definition(run, by_block, objective, k):
    for scale in (0.3, 2.0):
        hidden, head, teacher, targets, weight = case(k, scale)
        sparse = top_k(teacher, k)
        targets = known(targets, sparse, objective)
        expected = exact(hidden, head, targets, weight, sparse, objective)
        for chunk in (5, 100):
            assert_near(
                by_block(hidden, head, targets, weight, sparse, objective, chunk),
                expected,
                2e-6 if scale < 1 else 1e-5,
            )


@BY_BLOCK
@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 1.0])
def test_drawn_answers_are_their_definition(run, by_block, kd_weight):
    hidden, head, teacher, targets, weight = case(3)
    sparse, objective = padded(4, teacher), Objective(kd_weight=kd_weight)
    expected = exact(hidden, head, targets, weight, sparse, objective)
    assert_near(by_block(hidden, head, targets, weight, sparse, objective, 5), expected)
    for name, column in zip(
        ("kd", "ce", "agree"),
        by_block(hidden, head, targets, weight, sparse, objective, 5, score=True),
        strict=True,
    ):
        np.testing.assert_allclose(column, expected[name], rtol=1e-5, atol=1e-6)


@BY_BLOCK
def test_of_equally_likely_ids_the_lowest_is_the_choice(run, by_block, monkeypatch):
    monkeypatch.setattr(torch_vocabulary, "ARGMAX_IDS", 20)
    student, teacher = tied_logits()
    count = len(student)
    rows, targets, weight = (
        np.eye(count, dtype=np.float32),
        np.zeros(count, np.int32),
        np.ones(count, np.float32),
    )
    found = by_block(rows, student.T.copy(), targets, weight, top_k(teacher, 2), Objective(), 5)
    assert (found["agree"] == definition.same_choice(student, teacher)).all()


def asked_of(log_probs, k):
    """What each backend's teacher keeps for top_k, and names as its first choice for sampled, as
    numpy.
    """
    uniform = np.full((len(log_probs), 2), 0.5, np.float32)
    on_torch, on_mlx = torch.from_numpy(log_probs), mx.array(log_probs)
    kept = [x.numpy() for x in torch_teacher._top_k(on_torch, k)]
    yield kept, torch_teacher._draw(on_torch, torch.from_numpy(uniform))[-1].numpy()
    kept = [np.array(x) for x in mlx_teacher._top_k(on_mlx, k)]
    yield kept, np.array(mlx_teacher._draw(on_mlx, mx.array(uniform))[-1])


@pytest.mark.parametrize("vocab", [5, 203, 1203])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_teacher_that_is_asked_for_some_ids_names_the_first_of_equals(vocab, k):
    """`topk` and `argpartition` alone leave any of them in front."""
    logits = np.random.default_rng(vocab).integers(0, 3, (40, vocab))
    log_probs = definition.log_softmax(logits).astype(np.float32)
    for (ids, values, tail), top in asked_of(log_probs, k):
        assert (ids[:, 0] == log_probs.argmax(1)).all() and (top == ids[:, 0]).all()
        assert (np.diff(np.sort(ids)) > 0).all()  # each once
        assert (values == np.take_along_axis(log_probs, ids, 1)).all() and (
            np.diff(values) <= 0
        ).all()
        left = 1 - np.exp(values.astype(np.float64)).sum(1)
        np.testing.assert_allclose(np.exp(tail), left, rtol=1e-5, atol=1e-6)


@BY_BLOCK
def test_rows_of_no_weight_may_hold_anything(run, by_block):
    hidden, head, teacher, targets, weight = case(5)
    hidden[weight == 0] = np.nan
    for name, array in by_block(
        hidden, head, targets, weight, top_k(teacher, 5), Objective(), 5
    ).items():
        assert np.isfinite(array).all(), name


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("k", [1, 7, VOCAB - 1, VOCAB])
def test_the_definition_has_the_gradient_that_it_says(objective, k):
    _, _, teacher, _, _ = case(k)
    sparse, logits = top_k(teacher, k), np.random.default_rng(k).normal(size=teacher.shape)
    rest = (sparse.ids, sparse.log_probs, sparse.tail, objective)
    if objective.divergence == "dkd":
        rest += (known(np.arange(ROWS), sparse, objective),)
    direction = np.random.default_rng(1).normal(size=logits.shape)
    step = 1e-5 * direction
    slope = (
        definition.coarse_divergence(logits + step, *rest)
        - definition.coarse_divergence(logits - step, *rest)
    ) / 2e-5
    gradient = definition.coarse_divergence_grad(logits, *rest)
    np.testing.assert_allclose((gradient * direction).sum(1), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_ids_are_the_whole_divergence_and_fewer_are_a_lower_bound(divergence):
    objective = Objective(divergence, 0.3)
    _, _, teacher, _, _ = case(9)
    logits = np.random.default_rng(2).normal(size=teacher.shape)
    whole, found = definition.divergence(logits, teacher, objective), []
    for k in (1, 4, 16, 64, VOCAB):
        sparse = top_k(teacher, k)
        found.append(
            definition.coarse_divergence(
                logits, sparse.ids, sparse.log_probs, sparse.tail, objective
            )
        )
    np.testing.assert_allclose(found[-1], whole, rtol=1e-6)
    gradient = definition.coarse_divergence_grad(
        logits, sparse.ids, sparse.log_probs, sparse.tail, objective
    )
    np.testing.assert_allclose(
        gradient, definition.divergence_grad(logits, teacher, objective), rtol=1e-5, atol=1e-8
    )
    if divergence in ("log_tvd", "entropy_kl"):  # grouping loses log_tvd's ids, and moves a weight
        return
    for fewer, more in pairwise(found):
        assert (fewer <= more + 1e-7).all() and fewer.sum() < more.sum()


def test_mass_outside_of_the_kept_ids_costs():
    """A student with half of its mass elsewhere: renormalising both to the kept ids would say 0."""
    teacher, student = np.log([[0.5, 0.5 - 2e-9, 1e-9, 1e-9]]), np.log([[0.25, 0.25, 0.25, 0.25]])
    sparse = top_k(teacher, 2)
    found = definition.coarse_divergence(
        student, sparse.ids, sparse.log_probs, sparse.tail, Objective()
    )
    assert found[0] == pytest.approx(np.log(2), abs=1e-6)
