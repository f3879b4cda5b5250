"""What every backend promises (`backends/protocol.py`), tested through its verbs alone.

Another backend joins by its name in `BACKENDS` and its function in `LOGITS`. Gradients are looked
at through the optimizer: with `SGD` below a step moves each weight by -SCALE times its gradient, so
nothing of a backend's inside is needed. The toy backend, with which the training loop is tested,
keeps the part of the promise that the loop relies on.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny import family_folder, llama_config, recipe_of, texts
from toy_backend import ToyBackend

from mlx_distill import objective as definition
from mlx_distill.backends import choose_backend
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.protocol import Backend, Model, Sampling, Student, Teacher
from mlx_distill.backends.torch import student as torch_student
from mlx_distill.data.batches import Batch, Steps, make_batch
from mlx_distill.data.narrowing import narrowed
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import ModelError, OutOfMemory
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.recipe.training_tables import BatchTable, SelectionTable

BACKENDS = ["mlx", "torch"]
ON_BOTH = ["adamw", "adafactor", "schedule_free_adamw"]
OPTIMIZERS = {"mlx": [*ON_BOTH, "lion"], "torch": ON_BOTH}
LOGITS = {  # [T, V] by the plain model
    "mlx": lambda model, ids: np.array(model.split.model(mx.array([ids])))[0],
    "torch": lambda model, ids: model.split.model(torch.tensor([ids])).logits[0].detach().numpy(),
    "toy": lambda model, ids: model.weights[ids],
}

with_the_toy = pytest.mark.parametrize("backend", [*BACKENDS, "toy"], indirect=True)
with_optimizers = pytest.mark.parametrize(
    "backend, optimizer",
    [(name, optimizer) for name in BACKENDS for optimizer in OPTIMIZERS[name]],
    indirect=["backend"],
)

ROWS = 96
ALL = ("prompt", "cot", "answer")
TUNINGS = ["full", "lora", "dora"]
SCALE = 1e3
SGD = {
    "learning_rate": SCALE * 1e6,
    "beta1": 0.0,
    "beta2": 0.0,
    "eps": 1e6,
    "max_grad_norm": 0.0,
}  # AdamW: lr g / (|g| + eps)
KD = Objective(kd_weight=0.7, temperature=2.0)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    return ToyBackend() if request.param == "toy" else choose_backend(request.param)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a teacher (3 layers, untied) and a student (2 layers, tied) of the same
    vocabulary.
    """
    root = tmp_path_factory.mktemp("models")
    family_folder(root / "teacher", llama_config(layers=3, tied=False, vocabulary=ROWS), seed=1)
    family_folder(root / "student", llama_config(layers=2, vocabulary=ROWS), seed=2)
    return root


@pytest.fixture(scope="module")
def teachers(root: Path) -> Callable[[Backend], Teacher]:
    """The teacher of each backend, loaded once: that nothing changes it is tested below."""
    loaded = {}

    def teacher(backend: Backend) -> Teacher:
        if backend.name not in loaded:
            loaded[backend.name] = backend.load_teacher(root / "teacher", "teacher")
        return loaded[backend.name]

    return teacher


@pytest.fixture
def teacher(backend: Backend, teachers: Callable[[Backend], Teacher]) -> Teacher:
    return teachers(backend)


def recipe(
    tuning: str = "full", optim: dict | None = None, chunk_tokens: int = 7, **student
) -> Recipe:
    made = recipe_of(
        student={"tuning": tuning, **student}, objective={"chunk_tokens": chunk_tokens}
    )
    return with_values(
        made, optim=SGD if optim is None else optim
    )  # unchecked: no recipe of a person asks for SGD


def load_student(
    backend: Backend, root: Path, *args, folder: str = "student", **settings
) -> Student:
    """A student whose adapters, if any, are not zero (a zero lora_b has no gradient for lora_a)."""
    student = backend.load_student(root / folder, "student", recipe(*args, **settings))
    if student.trainable < student.parameters:
        random = np.random.default_rng(11)
        moved = {
            key: array + 0.1 * random.normal(size=array.shape).astype(np.float32)
            for key, array in sorted(weights(student).items())
        }
        with TemporaryDirectory() as state:
            student.save_state(Path(state))
            save_file(moved, Path(state) / "weights.safetensors")
            student.restore_state(Path(state), optimizer=False)
    return student


def sequence(length: int, seed: int) -> TokenSequence:
    tokens = np.random.default_rng(seed).integers(1, ROWS, length).astype(np.int32)
    return TokenSequence(f"s{seed}", tokens, length // 3, length - 2, np.ones(length, bool))


SEQUENCES = [sequence(length, seed) for seed, length in enumerate((9, 12, 7, 15))]


def batch(
    rows: list[TokenSequence] = SEQUENCES, segments: tuple[str, ...] = ALL, pad_multiple: int = 1
) -> Batch:
    return make_batch(rows, segments, pad_multiple)


def weights(student: Student) -> dict[str, np.ndarray]:
    """The trained arrays, by way of a checkpoint."""
    with TemporaryDirectory() as folder:
        student.save_state(Path(folder))
        return load_file(Path(folder) / "weights.safetensors")


def accumulate(
    student: Student, teacher: Teacher | None, batches: list[Batch], objective: Objective = KD
) -> LossSums:
    loss_tokens = sum(float(b.weight.sum()) for b in batches)
    sums = [
        student.accumulate(b, teacher.targets(b) if teacher else None, objective, loss_tokens)
        for b in batches
    ]
    return sum(sums[1:], sums[0])


def gradients(
    student: Student, teacher: Teacher | None, batches: list[Batch], objective: Objective = KD
) -> dict[str, np.ndarray]:
    """Those that one step over `batches` applies, for a student that trains by `SGD`."""
    before = weights(student)
    accumulate(student, teacher, batches, objective)
    student.apply(SGD["learning_rate"])
    return {
        key: (before[key].astype(np.float64) - array) / SCALE
        for key, array in weights(student).items()
    }


def assert_close(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """Each array within `tolerance` of its largest element (or of a hundredth of the largest of
    all).
    """
    assert found.keys() == expected.keys()
    largest = max(np.abs(array).max() for array in expected.values())
    assert largest > 0
    for key, array in expected.items():
        scale = max(np.abs(array).max(), largest / 100)
        assert np.abs(found[key] - array).max() <= tolerance * scale, key


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert found[key].tobytes() == array.tobytes(), key


def assert_sums(found: LossSums, expected: LossSums, tolerance: float = 1e-5) -> None:
    assert found.terms.keys() == expected.terms.keys()
    np.testing.assert_allclose(found.stacked(), expected.stacked(), rtol=tolerance, atol=1e-9)


# Accumulation


@pytest.mark.parametrize("tuning, sizes", [("full", (1, 5, 38, 39, 40)), ("lora", (5, 38))])
def test_chunked_is_whole(
    backend: Backend, root: Path, teacher: Teacher, tuning: str, sizes: tuple[int, ...]
):
    assert len(batch().positions) == 39
    whole = load_student(backend, root, tuning, chunk_tokens=1000)
    sums = whole.score(batch(), teacher.targets(batch()), KD)
    slopes = gradients(whole, teacher, [batch()])
    for chunk_tokens in sizes:
        chunked = load_student(backend, root, tuning, chunk_tokens=chunk_tokens)
        assert_sums(chunked.score(batch(), teacher.targets(batch()), KD), sums)
        assert_close(gradients(chunked, teacher, [batch()]), slopes)


def test_a_chunk_nobody_asked_for_is_the_devices(backend: Backend, root: Path):
    chosen = {"mlx": 128, "torch": 512}
    assert (
        load_student(backend, root, chunk_tokens=0).chunk_tokens == chosen[backend.device().backend]
    )


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_two_batches_are_their_union(backend: Backend, root: Path, teacher: Teacher, tuning: str):
    parts = [
        batch(SEQUENCES[:1]),
        batch(SEQUENCES[1:]),
    ]  # 8 and 31 loss positions: a mean of means would show
    one, two = load_student(backend, root, tuning), load_student(backend, root, tuning)
    assert_sums(accumulate(one, teacher, parts), accumulate(two, teacher, [batch()]))
    assert one.apply(0.0) == pytest.approx(two.apply(0.0), rel=1e-5)
    assert_close(gradients(one, teacher, parts), gradients(two, teacher, [batch()]))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_gradient_is_the_slope_of_the_loss(
    backend: Backend, root: Path, teacher: Teacher, tuning: str
):
    student, objective = load_student(backend, root, tuning), Objective(kd_weight=0.5)

    def loss() -> float:
        sums = student.score(batch(), teacher.targets(batch()), objective)
        return float(objective.total(sums.terms).sum() / sums.tokens.sum())

    before = loss()
    accumulate(student, teacher, [batch()], objective)
    step = 1e-3
    norm = student.apply(step * SGD["eps"])
    assert before - loss() == pytest.approx(step * norm**2, rel=0.05)


@pytest.mark.parametrize("tuning", ["full", "dora"])
def test_micro_batching_changes_nothing(
    backend: Backend, root: Path, teacher: Teacher, tuning: str
):
    optim = {"learning_rate": 1e-3, "eps": 1e-6, "weight_decay": 0.1}
    results = []
    for size in (1, 2, 4):
        student = load_student(backend, root, tuning, optim)
        steps = Steps(
            SEQUENCES,
            ("cot", "answer"),
            BatchTable(micro_batch_size=size, global_batch_size=4, pad_multiple=4, sort_window=1),
            seed=0,
            steps=3,
        )
        for step in steps:
            assert len(step.batches) == 4 // size
            for part in step.batches:
                student.accumulate(part, teacher.targets(part), KD, step.loss_tokens)
            student.apply(1e-3)
        results.append(weights(student))
    start = weights(load_student(backend, root, tuning))
    assert max(np.abs(results[0][key] - start[key]).max() for key in start) > 2e-3
    for result in results[1:]:
        for key, array in results[0].items():
            np.testing.assert_allclose(result[key], array, rtol=0, atol=1e-5, err_msg=key)


@with_the_toy
def test_padding_and_dead_positions_do_not_matter(backend: Backend, root: Path, teacher: Teacher):
    tight = batch()
    loose = batch(pad_multiple=64)
    dead = loose.weight == 0
    assert loose.tokens.shape[1] == 64 and dead.sum() == 25
    random = np.random.default_rng(0)
    loose.positions[dead] = random.integers(0, loose.tokens.size, dead.sum())
    loose.targets[dead], loose.segment[dead] = (
        random.integers(0, ROWS, dead.sum()),
        random.integers(0, 3, dead.sum()),
    )
    loose.tokens[np.arange(64) >= loose.lengths[:, None]] = 77
    one, two = load_student(backend, root), load_student(backend, root)
    assert_sums(
        two.score(loose, teacher.targets(loose), KD), one.score(tight, teacher.targets(tight), KD)
    )
    assert_close(gradients(two, teacher, [loose]), gradients(one, teacher, [tight]))


def test_what_a_rule_says_of_each_token(backend: Backend, root: Path, teacher: Teacher):
    """An entropy at temperature 1, whatever the objective's is; its divergence."""
    asked, student = batch(pad_multiple=8), load_student(backend, root)
    logits = [
        np.concatenate([LOGITS[backend.name](model, row.tolist()) for row in asked.tokens])
        for model in (student, teacher)
    ]
    of_student, of_teacher = (array[asked.positions].astype(np.float64) for array in logits)

    def entropy(z: np.ndarray) -> np.ndarray:
        u = definition.log_softmax(z)
        return -(np.exp(u) * u).sum(axis=1)

    expected = {
        "student_entropy": entropy(of_student),
        "teacher_entropy": entropy(of_teacher),
        "divergence": definition.divergence(of_student, of_teacher, KD),
    }
    for by, scores in expected.items():
        found = student.token_scores(asked, teacher.targets(asked), KD, by)
        assert np.ptp(scores) > 0.01
        live = asked.weight > 0
        np.testing.assert_allclose(found[live], scores[live], rtol=1e-4, atol=1e-5, err_msg=by)


@with_the_toy
@pytest.mark.parametrize("multiple", [1, 8])
def test_chosen_tokens_alone_are_as_if_the_others_weighed_nothing(
    backend: Backend, root: Path, teacher: Teacher, multiple: int
):
    whole, table = (
        make_batch(ENDED, ALL, multiple, True),
        SelectionTable(share=0.3, by="divergence"),
    )
    scores = np.random.default_rng(1).normal(size=whole.taught).astype(np.float32)
    left, places = narrowed(whole, scores, table, multiple)
    kept = np.zeros(len(whole.positions), bool)
    kept[places[left.weight[: len(places)] > 0]] = True
    kept[whole.taught :] = True
    masked = dataclasses.replace(whole, weight=np.where(kept, whole.weight, 0))
    assert len(left.positions) < 0.7 * len(whole.positions)
    total = float(left.weight.sum())
    assert total == masked.weight.sum()
    found, moved = [], []
    for one in (left, masked):
        student = load_student(backend, root)
        targets = teacher.targets(whole)
        targets = student.targets_at(targets, places) if one is left else targets
        before = weights(student)
        found.append(student.accumulate(one, targets, KD, total))
        student.apply(SGD["learning_rate"])
        moved.append({key: before[key] - array for key, array in weights(student).items()})
    assert_sums(*found)
    assert_close(*moved, tolerance=1e-4)


ENDED = [dataclasses.replace(one, ending=3) for one in SEQUENCES[:3]] + SEQUENCES[3:]


@with_the_toy
@pytest.mark.parametrize("segments", [("cot",), ("prompt", "answer"), ("answer",)], ids="+".join)
@pytest.mark.parametrize("kd_weight", [0.0, 0.7, 1.0])
def test_what_follows_a_cut_learns_from_the_text_alone(
    backend: Backend,
    root: Path,
    teacher: Teacher,
    segments: tuple[str, ...],
    kd_weight: float,
):
    """One batch is two: what comes before the endings, with the teacher, and the endings without."""
    objective, together = Objective(kd_weight=kd_weight), make_batch(ENDED, segments, 8, True)
    before, after = [], []
    for one in ENDED:
        stop = len(one) - one.ending
        before.append(
            dataclasses.replace(one, tokens=one.tokens[:stop], allowed=one.allowed[:stop], ending=0)
        )
        if one.ending:
            after.append(dataclasses.replace(one, ending=0, allowed=np.arange(len(one)) >= stop))
    parts, total = [], float(together.weight.sum())
    asked = teacher if objective.needs_teacher else None
    one, two = load_student(backend, root), load_student(backend, root)
    found = one.accumulate(together, asked and asked.targets(together), objective, total)
    if any(sequence.supervised(segments).any() for sequence in before):
        batch = make_batch(before, segments, 8)
        parts.append(two.accumulate(batch, asked and asked.targets(batch), objective, total))
    alone = two.accumulate(make_batch(after, ALL, 8), None, Objective(kd_weight=0.0), total)
    assert together.taught == sum(part.tokens.sum() for part in parts)
    np.testing.assert_array_equal(found.ending_tokens, alone.tokens)
    np.testing.assert_allclose(found.terms["ending"], alone.terms["ce"], rtol=1e-5)
    for name in ("kd", "ce", "agree"):
        expected = sum(part.terms[name] for part in parts) if parts else np.zeros(3)
        np.testing.assert_allclose(found.terms[name], expected, rtol=1e-5, atol=1e-9)
    before_weights = weights(one)
    for student in (one, two):
        student.apply(SGD["learning_rate"])
    moved, expected = (
        {key: (before_weights[key].astype(np.float64) - array) for key, array in made.items()}
        for made in map(weights, (one, two))
    )
    assert_close(moved, expected, 2e-5)


@with_the_toy
def test_sums_belong_to_their_segments(backend: Backend, root: Path, teacher: Teacher):
    student = load_student(backend, root)
    whole = student.score(batch(), teacher.targets(batch()), KD)
    assert (
        whole.tokens.tolist() == [np.sum(batch().segment == s) for s in range(3)]
        and whole.terms["kd"].dtype == np.float64
    )
    for index, name in enumerate(ALL):
        part = student.score(batch(segments=(name,)), teacher.targets(batch(segments=(name,))), KD)
        assert list(part.terms) == ["kd", "ce", "agree"]
        np.testing.assert_allclose(part.stacked()[:, index], whole.stacked()[:, index], rtol=1e-5)
        assert np.array_equal(part.stacked().sum(axis=1), part.stacked()[:, index])


@with_the_toy
def test_score_is_accumulates_sums_and_changes_nothing(
    backend: Backend, root: Path, teacher: Teacher
):
    one, two = load_student(backend, root), load_student(backend, root)
    other, before = batch(SEQUENCES[:2]), weights(one)
    accumulate(two, teacher, [batch()])
    scored = one.score(batch(), teacher.targets(batch()), KD)
    assert_sums(scored, accumulate(one, teacher, [batch()]), 1e-6)
    one.score(other, teacher.targets(other), KD)
    assert_same(weights(one), before)
    assert one.apply(SGD["learning_rate"]) == two.apply(SGD["learning_rate"])
    assert_same(weights(one), weights(two))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_plain_fine_tuning_needs_no_targets(
    backend: Backend, root: Path, teacher: Teacher, tuning: str
):
    one, two = load_student(backend, root, tuning), load_student(backend, root, tuning)
    sums = one.score(batch(), None, Objective(kd_weight=0))
    assert not (sums.terms["kd"].any() or sums.terms["agree"].any()) and sums.terms["ce"].all()
    with_teacher = two.score(batch(), teacher.targets(batch()), Objective(kd_weight=0))
    np.testing.assert_allclose(sums.terms["ce"], with_teacher.terms["ce"], rtol=1e-6)
    assert_close(
        gradients(one, None, [batch()], Objective(kd_weight=0)),
        gradients(two, teacher, [batch()], Objective(kd_weight=0)),
    )


@with_the_toy
def test_a_student_that_is_its_teacher_has_no_divergence(backend: Backend, root: Path):
    student, teacher = (
        load_student(backend, root),
        backend.load_teacher(root / "student", "teacher"),
    )
    sums = student.score(batch(), teacher.targets(batch()), Objective(kd_weight=1))
    assert np.abs(sums.terms["kd"]).max() < 1e-5
    assert np.array_equal(sums.terms["agree"], sums.tokens)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bfloat16_is_for_computing_only(
    backend: Backend, root: Path, teacher: Teacher, tuning: str
):
    """What trains stays in float32, where a small update is not swallowed, and the gradient is
    nearly that of float32.
    """
    half, single = (
        load_student(backend, root, tuning, compute_dtype=dtype)
        for dtype in ("bfloat16", "float32")
    )
    before = weights(half)
    assert {array.dtype for array in before.values()} == {np.dtype(np.float32)}
    found, expected = gradients(half, teacher, [batch()]), gradients(single, teacher, [batch()])
    assert_close(found, expected, 0.1)
    with pytest.raises(AssertionError):
        assert_close(found, expected, 1e-4)
    small = load_student(backend, root, tuning, {"learning_rate": 1e-6}, compute_dtype="bfloat16")
    accumulate(small, teacher, [batch()])
    small.apply(1e-6)
    moved = np.concatenate(
        [(weights(small)[key] != array).ravel() for key, array in before.items()]
    )
    assert moved.mean() > 0.5


def test_a_teacher_computes_in_what_is_asked_for(backend: Backend, root: Path, teacher: Teacher):
    """Its answers in half a float32 are nearly those in a whole one, and not quite; three more bits
    of float16 are nearer.
    """
    student, folder = load_student(backend, root), root / "teacher"
    found = [
        student.score(batch(), asked.targets(batch()), Objective(kd_weight=1)).terms["kd"].sum()
        for asked in (
            teacher,
            backend.load_teacher(folder, "teacher", dtype="float32"),
            backend.load_teacher(folder, "teacher", dtype="bfloat16"),
            backend.load_teacher(folder, "teacher", dtype="float16"),
        )
    ]
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], rel=0.1)
    assert found[2] != pytest.approx(found[0], rel=1e-5)
    assert 0 < abs(found[3] - found[0]) < abs(found[2] - found[0])


def test_a_teacher_that_float16_cannot_hold_is_refused(
    backend: Backend, root: Path, tmp_path: Path
):
    shutil.copytree(root / "teacher", tmp_path / "large")
    file = tmp_path / "large" / "model.safetensors"
    stored = load_file(file)
    stored["model.norm.weight"] = 1e6 * stored["model.norm.weight"]
    save_file(stored, file, {"format": "pt"})
    backend.load_teacher(tmp_path / "large", "large", dtype="bfloat16")
    with pytest.raises(ModelError, match=r"large: .*logits are not finite"):
        backend.load_teacher(tmp_path / "large", "large", dtype="float16")


def test_the_model_at_rest_holds_its_own_weights(backend: Backend, root: Path, teacher: Teacher):
    """Not those a forward pass was traced or computed with, even after a refusal in the middle of
    one.
    """
    student, good = load_student(backend, root, compute_dtype="bfloat16"), batch()
    bad, targets = dataclasses.replace(good, positions=good.positions + 1000), teacher.targets(good)
    before = LOGITS[backend.name](student, [1, 2, 3])
    for method, arguments in (
        (student.accumulate, (targets, KD, 1.0)),
        (student.score, (targets, KD)),
    ):
        method(good, *arguments)
        assert LOGITS[backend.name](student, [1, 2, 3]).tobytes() == before.tobytes()
        with pytest.raises(IndexError):
            method(bad, *arguments)
        assert LOGITS[backend.name](student, [1, 2, 3]).tobytes() == before.tobytes()


# Refusals


@with_the_toy
def test_indices_out_of_range_are_refused(backend: Backend, root: Path, teacher: Teacher):
    student, fresh, good = load_student(backend, root), load_student(backend, root), batch()
    targets = teacher.targets(good)
    for field, place, value in (
        ("positions", 3, -1),
        ("positions", 0, good.tokens.size),
        ("targets", 5, -1),
        ("targets", 5, ROWS),
        ("tokens", (0, 0), ROWS),
    ):
        array = getattr(good, field).copy()
        array[place] = value
        bad = dataclasses.replace(good, **{field: array})
        with pytest.raises(IndexError, match=f"{field} .*outside of 0\\.\\."):
            student.accumulate(bad, targets, KD, 1.0)
        with pytest.raises(IndexError, match=field):
            student.score(bad, targets, KD)
        if field != "targets":
            with pytest.raises(IndexError, match=field):
                teacher.targets(bad)
    assert_same(
        gradients(student, teacher, [good]), gradients(fresh, teacher, [good])
    )  # nothing of it stayed


@with_optimizers
def test_a_gradient_that_is_not_finite_changes_nothing(
    backend: Backend, root: Path, teacher: Teacher, optimizer: str
):
    optim = {"optimizer": optimizer, "weight_decay": 0.1}
    student, fresh = (
        load_student(backend, root, optim=optim),
        load_student(backend, root, optim=optim),
    )
    for poison in (np.nan, 1e38):
        for one in (student, fresh):
            accumulate(one, teacher, [batch()])
            one.apply(1e-3)
        before, bad = weights(student), batch()
        bad.weight[2] = poison
        student.accumulate(bad, teacher.targets(bad), KD, 1e-5)  # 1e43 is infinite in float32
        assert not math.isfinite(student.apply(1e-3))
        assert_same(weights(student), before)
    for one in (student, fresh):
        accumulate(one, teacher, [batch()])
        one.apply(1e-3)
    assert_same(weights(student), weights(fresh))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_student_of_schedule_free_adamw_is_the_mean_of_what_trains(
    backend: Backend, root: Path, teacher: Teacher, tuning: str, tmp_path: Path
):
    """Validated, kept and exported; looking at it leaves no bit of what trains changed. The mutant
    that validates what trains failed here.
    """
    asked = {"optimizer": "schedule_free_adamw", "learning_rate": 1e-2, "weight_decay": 0.1}
    looked, blind = (load_student(backend, root, tuning, asked) for _ in range(2))
    for _ in range(3):
        for one in (looked, blind):
            accumulate(one, teacher, [batch()])
            one.apply(1e-2)
        sums = looked.score(batch(), teacher.targets(batch()), KD)
    for one, name in ((looked, "looked"), (blind, "blind")):
        (tmp_path / name).mkdir()
        one.save_state(tmp_path / name)
    mean, state = (
        load_file(tmp_path / "looked" / f"{k}.safetensors") for k in ("weights", "optimizer")
    )
    assert_same(state, load_file(tmp_path / "blind" / "optimizer.safetensors"))
    assert state["step"] == 3 and state["weight_sum"] == pytest.approx(3e-4)
    for key, array in mean.items():
        y, z = (state[f"{key}.{name}"].astype(np.float64) for name in "yz")
        np.testing.assert_allclose(array, y - (z - y) / 9, rtol=1e-5, atol=1e-7, err_msg=key)
    assert any(np.abs(array - state[f"{key}.y"]).max() > 1e-3 for key, array in mean.items())
    alone = load_student(backend, root, tuning)
    alone.restore_state(tmp_path / "looked", optimizer=False)
    assert_sums(alone.score(batch(), teacher.targets(batch()), KD), sums)
    exported = []
    for one, name in ((looked, "a"), (alone, "b")):
        (tmp_path / name).mkdir()
        one.export(tmp_path / name, [2])
        exported.append(load_file(tmp_path / name / "model.safetensors"))
    assert_same(*exported)


# Hidden states


def matched(backend: Backend, root: Path, teacher: Teacher, *args, **objective) -> Student:
    made = load_student(backend, root, *args)
    object.__setattr__(made, "recipe", with_values(made.recipe, objective=objective))
    made.match_hidden(teacher)
    return made


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A teacher whose states are wider than the student's."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    family_folder(folder, llama_config(layers=3, width=48, tied=False, vocabulary=ROWS), seed=4)
    return folder


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("projected", [False, True])
def test_hidden_states_are_compared_as_defined(
    backend: Backend, root: Path, wide: Path, kind: str, projected: bool
):
    """With transformers' own states, whichever backend computes; of two layers the mean."""
    of_teacher = wide if projected else root / "teacher"
    teacher = backend.load_teacher(of_teacher, "teacher")
    fields = {"hidden_weight": 0.3, "hidden_distance": kind, "hidden_layers": (1, 1)}
    student = matched(backend, root, teacher, **fields)
    asked = make_batch(ENDED, ALL, 8, True)
    objective = Objective(kd_weight=0.7, hidden_weight=0.3, hidden_distance=kind)
    sums = student.score(asked, teacher.targets(asked), objective)

    def states(folder: Path, layer: int) -> np.ndarray:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        out = model(torch.tensor(asked.tokens), output_hidden_states=True)
        found = out.hidden_states[layer].detach().numpy()
        return found.reshape(-1, found.shape[-1])[asked.positions[: asked.taught]]

    ours = states(root / "student", 1).astype(np.float64)
    if projected:
        ours = ours @ weights(student)["hidden_projection.1"].astype(np.float64)
    rows = definition.hidden_distance(ours, states(of_teacher, 2), kind)
    counted = asked.weight[: asked.taught] * rows
    expected = np.bincount(asked.segment[: asked.taught], counted, 3)
    np.testing.assert_allclose(sums.terms["hidden"], expected, rtol=1e-4)
    assert expected.min() > 0.01


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_gradient_of_hidden_states_is_the_slope_of_the_loss(
    backend: Backend, root: Path, wide: Path, tuning: str, kind: str
):
    """Of the projection, too, which is kept in a checkpoint and exported with nothing."""
    teacher = backend.load_teacher(wide, "teacher")
    fields = {"hidden_weight": 5.0, "hidden_distance": kind, "hidden_layers": (1, 2)}
    student = matched(backend, root, teacher, tuning, **fields)
    objective = Objective(kd_weight=0.5, hidden_weight=5.0, hidden_distance=kind)

    def loss() -> float:
        sums = student.score(batch(), teacher.targets(batch()), objective)
        return float(objective.total(sums.terms).sum() / sums.tokens.sum())

    before, first = loss(), weights(student)
    accumulate(student, teacher, [batch()], objective)
    step = 1e-3
    norm = student.apply(step * SGD["eps"])
    assert before - loss() == pytest.approx(step * norm**2, rel=0.05)
    moved = weights(student)
    for layer in (1, 2):
        name = f"hidden_projection.{layer}"
        assert np.abs(moved[name] - first[name]).max() > 1e-6
    with TemporaryDirectory() as folder:
        student.export(Path(folder), [2])
        files = [load_file(path) for path in Path(folder).rglob("*.safetensors")]
        assert files and not any("hidden_projection" in name for one in files for name in one)
        student.save_state(Path(folder))
        again = matched(backend, root, teacher, tuning, **fields)
        again.restore_state(Path(folder))
        assert_same(weights(again), moved)
    for one in (student, again):
        accumulate(one, teacher, [batch()], objective)
        one.apply(step * SGD["eps"])
    assert_same(weights(again), weights(student))


def test_both_backends_move_hidden_states_alike(root: Path, wide: Path):
    fields = {"hidden_weight": 1.0, "hidden_distance": "cosine", "hidden_layers": (2,)}
    objective, found = Objective(kd_weight=0.5, hidden_weight=1.0, hidden_distance="cosine"), []
    for name in BACKENDS:
        backend = choose_backend(name)
        teacher = backend.load_teacher(wide, "teacher")
        student = matched(backend, root, teacher, **fields)
        found.append(gradients(student, teacher, [batch()], objective))
    assert_close(*found, tolerance=1e-3)


def test_a_layer_that_there_is_not_is_refused(backend: Backend, root: Path, teacher: Teacher):
    with pytest.raises(ModelError, match="asks for layer 3, but it has 2: name layers from 1 to 2"):
        matched(backend, root, teacher, hidden_weight=1.0, hidden_layers=(1, 3))


# Clipping


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_gradient_is_clipped_to_its_norm(
    backend: Backend, root: Path, teacher: Teacher, tuning: str
):
    free = gradients(load_student(backend, root, tuning), teacher, [batch()])
    norm = math.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in free.values()))
    for limit in (norm / 3, norm * 3, 0.0):
        student = load_student(backend, root, tuning, SGD | {"max_grad_norm": limit})
        before = weights(student)
        accumulate(student, teacher, [batch()])
        assert student.apply(SGD["learning_rate"]) == pytest.approx(norm, rel=1e-5)
        scale = 1 / 3 if limit == norm / 3 else 1
        after = weights(student)
        assert_close(
            {key: (before[key] - after[key]) / SCALE for key in before},
            {key: scale * array for key, array in free.items()},
            3e-5,
        )


# The vocabulary


def cut_folder(source: Path, target: Path, rows: int) -> Path:
    """The same model with the first `rows` rows of its embedding and head."""
    target.mkdir()
    config = (
        (source / "config.json")
        .read_text()
        .replace(f'"vocab_size": {ROWS}', f'"vocab_size": {rows}')
    )
    (target / "config.json").write_text(config)
    tensors = load_file(source / "model.safetensors")
    cut = {key: array[:rows] if len(array) == ROWS else array for key, array in tensors.items()}
    save_file(cut, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_padded_heads_are_cut_to_the_common_ids(
    backend: Backend, root: Path, tmp_path: Path, tuning: str
):
    common = 75
    rows = [dataclasses.replace(s, tokens=s.tokens % common) for s in SEQUENCES]

    def folder(name: str, size: int) -> Path:
        cut = tmp_path / f"{name}{size}"
        return cut if cut.exists() else cut_folder(root / name, cut, size)

    def compared(teacher_rows: int, student_rows: int) -> tuple[LossSums, dict[str, np.ndarray]]:
        teacher = backend.load_teacher(folder("teacher", teacher_rows), "teacher")
        student = load_student(backend, folder("student", student_rows), tuning, folder="")
        assert (teacher.vocabulary_rows, student.vocabulary_rows) == (teacher_rows, student_rows)
        student.compare_first(common)
        return (
            student.score(batch(rows), teacher.targets(batch(rows)), KD),
            gradients(student, teacher, [batch(rows)]),
        )

    expected = compared(common, common)
    for teacher_rows, student_rows in ((ROWS, 80), (80, ROWS), (ROWS, ROWS)):
        sums, slopes = compared(teacher_rows, student_rows)
        assert_sums(sums, expected[0])
        padded = {key for key, array in slopes.items() if len(array) == student_rows}
        assert_close(slopes | {key: slopes[key][:common] for key in padded}, expected[1])
        assert not any(slopes[key][common:].any() for key in padded)


# The teacher


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_leaves_the_teacher_alone(backend: Backend, root: Path, checkpointing: bool):
    """Bit for bit, even where teacher and student are one folder and the student's blocks are
    checkpointed.
    """
    teacher = backend.load_teacher(root / "student", "teacher")
    observer = load_student(backend, root)
    before = (
        observer.score(batch(), teacher.targets(batch()), KD),
        LOGITS[backend.name](teacher, [1, 2, 3]),
    )
    student = load_student(
        backend, root, optim={"learning_rate": 1e-2}, gradient_checkpointing=checkpointing
    )
    start = weights(student)
    for _ in range(3):
        accumulate(student, teacher, [batch()])
        student.apply(1e-2)
    assert max(np.abs(array - start[key]).max() for key, array in weights(student).items()) > 1e-2
    after = (
        observer.score(batch(), teacher.targets(batch()), KD),
        LOGITS[backend.name](teacher, [1, 2, 3]),
    )
    assert (
        before[0].terms["kd"].tobytes() == after[0].terms["kd"].tobytes()
        and before[1].tobytes() == after[1].tobytes()
    )


@pytest.mark.parametrize("tuning", ["full", "dora"])
def test_gradient_checkpointing_changes_no_gradient(
    backend: Backend, root: Path, teacher: Teacher, tuning: str
):
    plain, frugal = (
        load_student(backend, root, tuning, gradient_checkpointing=on) for on in (False, True)
    )
    assert_sums(accumulate(frugal, teacher, [batch()]), accumulate(plain, teacher, [batch()]), 1e-6)
    plain.apply(0.0), frugal.apply(0.0)
    assert_close(gradients(frugal, teacher, [batch()]), gradients(plain, teacher, [batch()]), 1e-6)
    assert_same(generate_greedily(frugal), generate_greedily(plain))


def generate_greedily(model: Model) -> dict[str, np.ndarray]:
    [ids] = texts(model, [[1, 2, 3]], 8)
    return {"ids": np.array(ids)}


# State


@pytest.mark.parametrize(
    "backend, optimizer, tuning",
    [
        *((name, optimizer, "full") for name in BACKENDS for optimizer in OPTIMIZERS[name]),
        *((name, "adamw", tuning) for name in BACKENDS for tuning in ("lora", "dora")),
    ],
    indirect=["backend"],
)
def test_a_restored_student_takes_the_same_next_steps(
    backend: Backend, root: Path, teacher: Teacher, tuning: str, optimizer: str, tmp_path: Path
):
    """To the bit on a CPU, whatever the restoring student had done before; the gradient is clipped,
    so its norm counts.
    """
    optim = {"optimizer": optimizer, "weight_decay": 0.1, "max_grad_norm": 0.1}
    student, other = (
        load_student(backend, root, tuning, optim),
        load_student(backend, root, tuning, optim),
    )
    parts = [batch(SEQUENCES[:2]), batch(SEQUENCES[2:])]
    for part in parts:
        accumulate(student, teacher, [part])
        student.apply(1e-2)
    student.save_state(tmp_path)
    saved = weights(student)
    accumulate(other, teacher, [parts[1]])
    other.apply(3e-2)
    accumulate(other, teacher, [parts[0]])  # held and not applied: must not survive
    other.restore_state(tmp_path)
    assert_same(weights(other), saved)
    for _ in range(2):
        norms = []
        for one in (student, other):
            accumulate(one, teacher, parts)
            norms.append(one.apply(5e-3))
        assert norms[0] == norms[1] > 0.1
        assert_same(weights(other), weights(student))
    files = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert student.state_bytes() <= files < 1.2 * student.state_bytes() + 20_000


def test_weights_are_restored_without_the_optimizer(
    backend: Backend, root: Path, teacher: Teacher, tmp_path: Path
):
    optim = {"weight_decay": 0.1}
    student, fresh = (
        load_student(backend, root, optim=optim),
        load_student(backend, root, optim=optim),
    )
    accumulate(student, teacher, [batch()])
    student.apply(1e-2)
    student.save_state(tmp_path)
    fresh.restore_state(tmp_path, optimizer=False)
    assert_same(weights(fresh), weights(student))
    for one in (student, fresh):
        accumulate(one, teacher, [batch(SEQUENCES[:1])])
        one.apply(1e-2)
    with pytest.raises(AssertionError):  # so the test above does look at the optimizer
        assert_close(weights(fresh), weights(student), 1e-4)


def test_another_students_state_is_refused(backend: Backend, root: Path, tmp_path: Path):
    load_student(backend, root, "lora").save_state(tmp_path)
    with pytest.raises(ModelError, match="its arrays are not those of this student"):
        load_student(backend, root).restore_state(tmp_path)


def test_counts(backend: Backend, root: Path, teacher: Teacher):
    full, lora = (
        load_student(backend, root),
        load_student(backend, root, "lora", rank=4, lora_targets=["q_proj"]),
    )
    tensors = load_file(root / "student" / "model.safetensors")
    assert (
        full.trainable
        == full.parameters
        == lora.parameters
        == sum(array.size for array in tensors.values())
    )
    assert lora.trainable == 2 * 4 * (32 + 32)
    assert teacher.parameters == sum(
        array.size for array in load_file(root / "teacher" / "model.safetensors").values()
    )
    backend.reset_peak_memory()
    accumulate(full, teacher, [batch()])
    assert backend.memory().peak_bytes >= backend.memory().active_bytes > 4 * full.parameters
    test = backend.self_test()
    assert test.loss_error() < 1e-5 and test.matmul_rate(64, 1) > 0


NO_MEMORY = {  # what allocators said
    "mlx": [
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
        RuntimeError("[malloc_or_wait] Unable to allocate 68719476736 bytes."),
    ],
    "torch": [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError("Unable to allocate 64.0 GiB for an array"),
    ],
}
LOADS = {"mlx": (mx, "load"), "torch": (torch_student, "load_file")}


@pytest.mark.parametrize(
    "backend, error",
    [(name, error) for name in BACKENDS for error in NO_MEMORY[name]],
    indirect=["backend"],
)
def test_a_checkpoint_that_does_not_fit_is_no_damaged_one(
    backend: Backend, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error
):
    def failing(path):
        raise error

    student = load_student(backend, root)
    monkeypatch.setattr(*LOADS[backend.name], failing)
    with pytest.raises(OutOfMemory, match=r"loading .* does not fit the (GPU's )?memory"):
        student.restore_state(tmp_path)


# Generation

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [40, 41], [5, 6, 7, 8]]


def naive(
    backend: Backend,
    model: Model,
    prompt: list[int],
    count: int,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Greedy generation by the plain model over the whole text so far."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and not (len(ids) > len(prompt) and ids[-1] in stop_ids):
        ids.append(int(LOGITS[backend.name](model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("which", ["teacher", "full", "dora"])
def test_greedy_generation_is_the_naive_loop(
    backend: Backend, root: Path, teacher: Teacher, which: str
):
    model = (
        teacher
        if which == "teacher"
        else load_student(backend, root, which, optim={"learning_rate": 1e-2})
    )
    if which != "teacher":  # what is generated with are the weights of now
        accumulate(model, teacher, [batch()])
        model.apply(1e-2)
    expected = [naive(backend, model, prompt, 10) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) > 1
    for batch_size in (1, 2, 8):
        assert texts(model, PROMPTS, 10, batch_size=batch_size) == expected


def test_stop_ids_end_a_generation(backend: Backend, teacher: Teacher):
    free = [naive(backend, teacher, prompt, 10) for prompt in PROMPTS]
    stop_ids = frozenset({free[0][2], free[3][4]})
    found = texts(teacher, PROMPTS, 10, batch_size=3, stop_ids=stop_ids)
    assert found == [naive(backend, teacher, prompt, 10, stop_ids) for prompt in PROMPTS]
    assert found[0][-1] in stop_ids and len(found[0]) <= 3
    assert {len(ids) for ids in found} != {10}
    assert texts(teacher, PROMPTS[:1], 1, batch_size=3) == [free[0][:1]]


@pytest.fixture
def forward_passes(
    backend: Backend, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> list[bool]:
    """An entry for each forward pass of the teacher."""
    kind, calls = type(teacher.split.model), []
    forward = {"mlx": "__call__", "torch": "forward"}[backend.name]
    plain = getattr(kind, forward)

    def counted(*args, **kwargs):
        calls.append(True)
        return plain(*args, **kwargs)

    monkeypatch.setattr(kind, forward, counted)
    return calls


def test_a_finished_text_does_not_wait_for_the_others(
    backend: Backend, teacher: Teacher, forward_passes: list[bool]
):
    """Of the next batch everywhere, and of its own where the backend can."""
    calls = forward_passes
    written = teacher.generate(PROMPTS, Sampling(10, batch_size=1))
    place, ids = next(written)
    first = len(calls)
    assert len(list(written)) == len(PROMPTS) - 1 and len(calls) > 2 * first > 0
    assert ids == naive(backend, teacher, PROMPTS[place], 10)


def test_sampling_is_a_function_of_the_seed(backend: Backend, teacher: Teacher):
    def sample(seed: int, temperature: float = 1.0, top_p: float = 1.0) -> list[list[int]]:
        drawn = {"temperature": temperature, "top_p": top_p, "seed": seed}
        return texts(teacher, PROMPTS, 12, batch_size=8, **drawn)

    assert sample(1) == sample(1) != sample(2)
    greedy = [naive(backend, teacher, prompt, 12) for prompt in PROMPTS]
    assert sample(3) != greedy
    assert sample(4, top_p=1e-6) == sample(5, temperature=1e-6) == greedy


def test_a_text_depends_on_nothing_that_it_is_drawn_beside(backend: Backend, teacher: Teacher):
    drawn = {"temperature": 1.0, "seed": 1}
    together = texts(teacher, PROMPTS, 12, batch_size=8, **drawn)
    for place, prompt in enumerate(PROMPTS):
        assert texts(teacher, [prompt], 12, batch_size=1, **drawn) == [together[place]]
    twice = [PROMPTS[0]] * 3
    first, second, again = texts(teacher, twice, 12, batch_size=2, samples=(0, 1, 0), **drawn)
    assert first == again == together[0] != second


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_text_that_generate_gives(
    backend: Backend, teacher: Teacher, temperature: float
):
    drawn = {"temperature": temperature, "seed": 1}
    for prompt in PROMPTS:
        (whole,) = texts(teacher, [prompt], 12, batch_size=1, **drawn)
        stops = frozenset(whole[5:6])
        (ended,) = texts(teacher, [prompt], 12, batch_size=1, stop_ids=stops, **drawn)
        assert list(teacher.stream(prompt, Sampling(12, **drawn))) == whole
        assert list(teacher.stream(prompt, Sampling(12, stop_ids=stops, **drawn))) == ended


def test_a_stream_that_is_left_computes_no_more(
    backend: Backend, teacher: Teacher, forward_passes: list[bool]
):
    stream = teacher.stream(PROMPTS[0], Sampling(10_000))
    first = [next(stream) for _ in range(3)]
    stream.close()
    before = len(forward_passes)
    assert before < 1_000, "it was left after three"
    time.sleep(0.05)
    assert len(forward_passes) == before
    assert first == naive(backend, teacher, PROMPTS[0], 3)
    assert list(teacher.stream(PROMPTS[0], Sampling(3))) == first


def test_texts_are_drawn_as_often_as_their_probability_says(backend: Backend, teacher: Teacher):
    """The first token of many samples against the model's own distribution, cut as transformers
    cuts it: temperature before `top_p`.
    """
    count, prompt = 600, PROMPTS[0]
    logits = LOGITS[backend.name](teacher, prompt)[-1].astype(np.float64) / 0.5
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    kept = order[np.cumsum(probs[order]) - probs[order] < 0.8]
    expected = np.zeros_like(probs)
    expected[kept] = probs[kept] / probs[kept].sum()
    found = texts(
        teacher,
        [prompt] * count,
        1,
        batch_size=count,
        temperature=0.5,
        top_p=0.8,
        samples=tuple(range(count)),
    )
    drawn = np.bincount([ids[0] for ids in found], minlength=len(probs))
    assert not drawn[expected == 0].any() and len(kept) > 3
    deviation = np.sqrt(count * expected * (1 - expected)) + 1
    assert (np.abs(drawn - count * expected) < 4 * deviation).all()
