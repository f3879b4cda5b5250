"""A teacher's answers from disk are the teacher's answers: for every cut they may serve, on every
backend, after any mishap they say so.
"""

import dataclasses
import importlib
import json
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tiny import family_folder, left_by_a_mac, llama_config, recipe_of

from mlx_distill.backends import choose_backend
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.backends.protocol import Backend
from mlx_distill.data.batches import Batch, make_batch
from mlx_distill.data.narrowing import narrowed
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.data.truncate import truncate
from mlx_distill.divergences import log_softmax
from mlx_distill.errors import CacheError
from mlx_distill.files import sha256_of
from mlx_distill.objective import Objective
from mlx_distill.recipe.recipe import with_values
from mlx_distill.recipe.tables import TeacherTable, TruncationTable
from mlx_distill.recipe.training_tables import BatchTable, SelectionTable
from mlx_distill.teaching.cached_teacher import CachedTeacher
from mlx_distill.teaching.fields import ADDED_LATER, CacheFields
from mlx_distill.teaching.fill import fill, whole_batch
from mlx_distill.teaching.folder import TeacherCache, dates_of
from mlx_distill.teaching.kinds import from_bits, stratified
from mlx_distill.teaching.parts import Part, write_part

ROWS = 96
ALL = ("prompt", "cot", "answer")
BOTH = ("mlx", "torch")
KINDS = ("top_k", "sampled", "hidden")
VOCABULARY = {f"t{i}": i for i in range(ROWS)}
TABLE = BatchTable(micro_batch_size=2, global_batch_size=2, pad_multiple=8)


def sequence(length: int, seed: int) -> TokenSequence:
    tokens = np.random.default_rng(seed).integers(1, ROWS, length).astype(np.int32)
    return TokenSequence(f"s{seed}", tokens, length // 3, length - 2, np.ones(length, bool))


SEQUENCES = [sequence(length, seed) for seed, length in enumerate((9, 12, 7, 15, 31, 21))]
TOKENS = sum(map(len, SEQUENCES))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    family_folder(root / "teacher", llama_config(layers=3, tied=False, vocabulary=ROWS), seed=1)
    family_folder(root / "student", llama_config(layers=2, vocabulary=ROWS), seed=2)
    # random hidden states say little: larger logits make them differ from a student's
    weights = root / "teacher" / "model.safetensors"
    sharpen(weights)
    return root


def sharpen(file: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = load_file(file)
    arrays["lm_head.weight"] = arrays["lm_head.weight"] * 20
    save_file(arrays, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=BOTH)
def backend(request) -> Backend:
    return choose_backend(request.param)


@pytest.fixture(scope="module")
def teacher(backend, root):
    return backend.load_teacher(root / "teacher", "teacher")


def student(backend: Backend, root: Path, learning_rate: float = 1e-3):
    return backend.load_student(
        root / "student",
        "student",
        recipe_of(objective={"chunk_tokens": 7}, optim={"learning_rate": learning_rate}),
    )


def fields(kind: str, **changes) -> CacheFields:
    table = TeacherTable(
        cache=kind,
        **{key: changes.pop(key) for key in ("cache_top_k", "cache_samples") if key in changes},
    )
    return dataclasses.replace(CacheFields.of(table, "f" * 64, VOCABULARY, ROWS), **changes)


def written(
    folder: Path,
    asked: CacheFields,
    backend: Backend,
    teacher,
    sequences=SEQUENCES,
    said: list | None = None,
) -> TeacherCache:
    cache = TeacherCache(folder, asked)
    say = (said if said is not None else []).append
    fill(
        cache,
        sequences,
        lambda: teacher,
        backend,
        TABLE,
        {},
        say,
        lambda label, total: lambda more: None,
    )
    return cache


@pytest.fixture(scope="module")
def caches(backend, teacher, tmp_path_factory) -> dict[str, CachedTeacher]:
    """One of each kind, exact where it can be: K = V in float32."""
    folder = tmp_path_factory.mktemp("caches")
    asked = {
        "top_k": fields("top_k", cache_top_k=ROWS, dtype="float32"),
        "sampled": fields("sampled"),
        "hidden": fields("hidden"),
    }
    return {
        kind: CachedTeacher(written(folder, one, backend, teacher), backend)
        for kind, one in asked.items()
    }


def update(
    backend: Backend, root: Path, batch: Batch, targets, objective: Objective
) -> tuple[LossSums, dict[str, np.ndarray]]:
    """The sums of one batch and how the weights move by gradient descent."""
    from tempfile import TemporaryDirectory

    from safetensors.numpy import load_file

    descent = {
        "learning_rate": 1e9,
        "beta1": 0.0,
        "beta2": 0.0,
        "eps": 1e6,
        "max_grad_norm": 0.0,
    }  # 1000 times the gradient
    recipe = recipe_of(objective={"chunk_tokens": 7})
    one = backend.load_student(
        root / "student", "student", with_values(recipe, optim=descent)
    )  # unchecked
    found = []
    with TemporaryDirectory() as folder:
        one.save_state(Path(folder))
        found.append(load_file(Path(folder) / "weights.safetensors"))
        sums = one.accumulate(batch, targets, objective, float(batch.weight.sum()))
        one.apply(1e9)
        one.save_state(Path(folder))
        found.append(load_file(Path(folder) / "weights.safetensors"))
    return sums, {key: (found[0][key].astype(np.float64) - found[1][key]) / 1e3 for key in found[0]}


def assert_equal(found, expected, tolerance: float) -> None:
    """Sums and gradients of two `update`s."""
    assert found[0].terms.keys() == expected[0].terms.keys()
    a, b = found[0].stacked(), expected[0].stacked()
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    largest = max(np.abs(array).max() for array in expected[1].values())
    for key, array in expected[1].items():
        assert np.abs(found[1][key] - array).max() <= 10 * tolerance * largest, key


CUTS = {
    "whole": {},
    "nearly nothing": {"fraction": 0.2},
    "half": {"fraction": 0.5},
    "most": {"fraction": 0.9},
    "half of the cot": {"span": "cot", "fraction": 0.5},
    "up to </think>": {"keep": "cot"},
    "suffix in context": {"keep": "suffix", "fraction": 0.5, "context": "keep"},
    "middle in context": {"keep": "middle", "fraction": 0.5, "context": "keep"},
}


ENDED = ("half", "most", "half of the cot", "up to </think>", "middle in context")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_cached_and_live_are_equal(backend, root, teacher, caches, kind, divergence):
    objective, batch = Objective(divergence, 0.3, 0.7), make_batch(SEQUENCES, ALL, 8)
    assert (batch.weight == 0).any()
    live = update(backend, root, batch, teacher.targets(batch), objective)
    cached = update(backend, root, batch, caches[kind].targets(batch), objective)
    assert live[0].terms["kd"].min() > 1 and live[0].terms["agree"].sum() > 0
    assert_equal(cached, live, 1e-6 if kind == "hidden" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_tokens_of_a_cache_are_those_of_the_teacher(backend, root, teacher, caches, kind):
    """What was drawn tells the teacher's own entropy, for the cache keeps it."""
    batch, learner = make_batch(SEQUENCES, ALL, 8), student(backend, root)
    live, cached = teacher.targets(batch), caches[kind].targets(batch)
    rules = ("teacher_entropy", "divergence") if kind != "sampled" else ("teacher_entropy",)
    for by in rules:
        expected, found = (
            learner.token_scores(batch, targets, Objective(), by) for targets in (live, cached)
        )
        live_ones = batch.weight > 0
        assert np.ptp(expected[live_ones]) > 0.1
        np.testing.assert_allclose(found[live_ones], expected[live_ones], rtol=1e-3, atol=1e-3)
    left, places = narrowed(batch, expected, SelectionTable(share=0.3, by=by), 8)
    sums = [
        learner.score(left, learner.targets_at(targets, places), Objective(kd_weight=1.0))
        for targets in (live, cached)
    ]
    if kind != "sampled":
        np.testing.assert_allclose(sums[0].stacked(), sums[1].stacked(), rtol=1e-4, atol=1e-4)


def test_dkd_refuses_a_target_that_the_cache_does_not_hold(backend, root, caches):
    batch, learner = make_batch(SEQUENCES, ALL, 8), student(backend, root)
    kept = caches["top_k"].targets(batch)
    order = np.argsort(kept.ids != batch.targets[:, None], axis=1, kind="stable")
    first = {  # three ids, the target being one of them
        name: np.take_along_axis(getattr(kept, name), order, 1)[:, :3]
        for name in ("ids", "log_probs")
    }
    with_target = dataclasses.replace(kept, **first)
    assert np.isfinite(learner.score(batch, with_target, Objective("dkd")).terms["kd"]).all()
    ids = with_target.ids.copy()
    place = np.flatnonzero(batch.positions // batch.tokens.shape[1] == 1)[0]
    ids[place] = (batch.targets[place] + np.arange(1, 4)) % 40
    lacking = dataclasses.replace(with_target, ids=ids)
    with pytest.raises(CacheError, match=rf"example '{batch.ids[1]}'.*raise teacher.cache_top_k"):
        learner.score(batch, lacking, Objective("dkd"))
    learner.score(batch, lacking, Objective("entropy_kl"))


@pytest.mark.parametrize("segments", [("cot",), ("prompt", "answer"), ALL], ids="+".join)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_one_cache_serves_every_cut_and_segment_set(backend, root, teacher, caches, cut, segments):
    sequences = [truncate(one, TruncationTable(**cut)) for one in SEQUENCES]
    sequences = [one for one in sequences if one.supervised(segments).any()]
    if not sequences:
        pytest.fail("the case has nothing to compare") if segments == ALL else None
        return
    batch, learner = make_batch(sequences[::-1], segments, 8), student(backend, root)
    live = learner.score(batch, teacher.targets(batch), Objective())
    for kind in ("hidden", "top_k"):
        found = learner.score(batch, caches[kind].targets(batch), Objective())
        np.testing.assert_allclose(found.stacked(), live.stacked(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", [("cot",), ("answer",), ALL], ids="+".join)
@pytest.mark.parametrize("cut", [CUTS[name] for name in ENDED], ids=ENDED)
def test_one_cache_serves_every_cut_with_an_ending(backend, root, teacher, caches, cut, segments):
    whole = [dataclasses.replace(one, closing=one.cot_end - 1) for one in SEQUENCES]
    table = TruncationTable(**cut, ending="answer")
    sequences = [truncate(one, table) for one in whole] + whole[:1]
    sequences = [one for one in sequences if one.supervised(segments).any()]
    assert any(one.ending for one in sequences)
    batch = make_batch(sequences[::-1], segments, 8, endings=True)
    live = update(backend, root, batch, teacher.targets(batch), Objective())
    assert live[0].ending_tokens.sum() > 0
    for kind in ("hidden", "top_k"):
        cached = update(backend, root, batch, caches[kind].targets(batch), Objective())
        assert_equal(cached, live, 1e-5)
    sampled = student(backend, root).score(batch, caches["sampled"].targets(batch), Objective())
    np.testing.assert_allclose(sampled.terms["ending"], live[0].terms["ending"], rtol=1e-5)


def test_what_follows_a_cut_is_no_target_that_a_cache_must_hold(caches):
    """It learns from the text alone; the row before it is the start of a kept one."""
    whole = [dataclasses.replace(one, closing=one.cot_end - 1) for one in SEQUENCES]
    table = TruncationTable(fraction=0.5, ending="answer")
    cut = [truncate(one, table) for one in whole]
    assert any(one.ending for one in cut)
    caches["top_k"].refuse_unknown_targets(cut, ("cot",))


def test_a_cut_that_drops_context_is_refused_by_id(caches):
    sequences = [
        truncate(one, TruncationTable(keep="suffix", fraction=0.5)) for one in SEQUENCES[:2]
    ]
    with pytest.raises(
        CacheError, match="example 's0': its 4 tokens are not the start of a sequence that is kept"
    ):
        caches["top_k"].targets(make_batch(sequences, ALL))
    with pytest.raises(CacheError, match="example 's99'"):
        caches["hidden"].targets(make_batch([sequence(5, 99)], ALL))


def test_more_answers_are_nearer(backend, root, teacher, tmp_path):
    batch, objective, learner = (
        make_batch(SEQUENCES, ALL),
        Objective(kd_weight=1),
        student(backend, root),
    )
    live, errors = learner.score(batch, teacher.targets(batch), objective).terms["kd"].sum(), []
    for k in (1, 4, 16, 64, ROWS):
        cached = CachedTeacher(
            written(tmp_path, fields("top_k", cache_top_k=k), backend, teacher), backend
        )
        errors.append(
            (live - learner.score(batch, cached.targets(batch), objective).terms["kd"].sum()) / live
        )
    assert all(fewer > more for fewer, more in pairwise(errors[:3])) and errors[0] > 0.02, errors
    assert max(map(abs, errors[3:])) < 1e-4, errors  # what half precision leaves


def test_half_precision_moves_the_loss_by_less_than(backend, root, teacher, tmp_path):
    """1e-4 of its value where all are kept: hundreds of times less than what leaving out all but 64
    of them does.
    """
    batch, objective, learner = (
        make_batch(SEQUENCES, ALL),
        Objective(kd_weight=1),
        student(backend, root),
    )
    found = {}
    for dtype in ("float16", "float32"):
        cached = CachedTeacher(
            written(tmp_path, fields("top_k", cache_top_k=32, dtype=dtype), backend, teacher),
            backend,
        )
        found[dtype] = learner.score(batch, cached.targets(batch), objective).terms["kd"]
    np.testing.assert_allclose(found["float16"], found["float32"], rtol=2e-4)
    assert (found["float16"] != found["float32"]).all()


def test_drawn_answers_are_unbiased(backend, root, teacher, tmp_path):
    """Mean loss and gradient over caches of other seeds come nearer to the live ones, as
    1/sqrt(seeds) at least.
    """
    batch, objective = make_batch(SEQUENCES[:3], ALL), Objective(kd_weight=1)
    live = update(backend, root, batch, teacher.targets(batch), objective)
    value, slope = (
        live[0].terms["kd"].sum(),
        np.concatenate([array.ravel() for array in live[1].values()]),
    )
    values, slopes = [], []
    for seed in range(24):
        asked = fields("sampled", cache_samples=4, seed=seed)
        cached = CachedTeacher(written(tmp_path, asked, backend, teacher, SEQUENCES[:3]), backend)
        sums, moved = update(backend, root, batch, cached.targets(batch), objective)
        assert sums.terms["agree"].sum() == live[0].terms["agree"].sum()
        values.append(sums.terms["kd"].sum())
        slopes.append(np.concatenate([array.ravel() for array in moved.values()]))
    spread = np.std(values, ddof=1)
    assert spread > 0.001 * value and abs(np.mean(values) - value) < 3 * spread / np.sqrt(
        len(values)
    )
    alone = np.mean([np.linalg.norm(one - slope) for one in slopes])
    assert np.linalg.norm(np.mean(slopes, 0) - slope) < 1.5 * alone / np.sqrt(len(slopes))


def test_draws_have_the_frequencies_of_the_teacher(backend, teacher):
    batch = whole_batch(SEQUENCES[:1], 1)
    samples = 20000
    uniform = stratified("any", len(SEQUENCES[0]), fields("sampled", cache_samples=samples))
    drawn, entropy, top = teacher.draw(batch, uniform, ROWS)
    ids, log_probs, tail = teacher.top_k(batch, ROWS, ROWS)
    assert (tail == -np.inf).all() and (ids[:, 0] == top).all()
    np.testing.assert_allclose(
        entropy, -(np.exp(log_probs) * log_probs).sum(1), rtol=1e-5, atol=1e-6
    )
    for row, (some, v) in enumerate(zip(ids, log_probs, strict=True)):
        found = np.bincount(drawn[row], minlength=ROWS) / samples
        assert (
            np.abs(found[some] - np.exp(v)).max() <= 2.01 / samples
        )  # stratified: off by less than a draw at each end
    np.testing.assert_allclose(log_softmax(log_probs), log_probs, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_either_backend_reads_what_the_other_wrote(root, tmp_path, kind):
    backends = {name: choose_backend(name) for name in BOTH}
    teachers = {
        name: one.load_teacher(root / "teacher", "teacher") for name, one in backends.items()
    }
    batch, found = make_batch(SEQUENCES, ALL, 8), {}
    for writer in BOTH:
        written(tmp_path / writer, fields(kind), backends[writer], teachers[writer])
        for reader in BOTH:
            cached = CachedTeacher(TeacherCache(tmp_path / writer, fields(kind)), backends[reader])
            found[writer, reader] = (
                student(backends[reader], root)
                .score(batch, cached.targets(batch), Objective())
                .stacked()
            )
    for sums in found.values():
        np.testing.assert_allclose(sums, found["mlx", "mlx"], rtol=1e-4)


def test_bfloat16_states_are_kept_as_their_bits(backend, root, teacher, tmp_path):
    batch = make_batch(SEQUENCES, ALL)
    states, head = teacher.states(whole_batch(SEQUENCES, 1)), teacher.head_matrix()
    bits = (states.view(np.uint32) >> 16).astype(np.uint16)
    learner, objective = student(backend, root), Objective()
    where = np.searchsorted(whole_batch(SEQUENCES, 1).positions, batch.positions)
    rounded = backend.cached_targets(from_bits(bits)[where], backend.cached_head(head))
    packed = backend.cached_targets(bits[where], backend.cached_head(head))
    expected, found = (learner.score(batch, one, objective).stacked() for one in (rounded, packed))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# What a cache is asked and what it refuses


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheFields)])
def test_a_manifest_that_differs_is_refused_by_field(tmp_path, field):
    backend = choose_backend("torch")
    asked = fields("sampled")
    cache = TeacherCache(tmp_path, asked)
    cache.path.mkdir(parents=True)
    manifest = {"fields": dataclasses.asdict(asked), "made": {}}
    (cache.path / "manifest.json").write_text(json.dumps(manifest))
    TeacherCache(tmp_path, asked)
    manifest["fields"][field] = "other"
    (cache.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CacheError, match=rf"manifest.json: {field} .* asked, 'other' found: .*"
    ) as error:
        written(tmp_path, asked, backend, None)
    assert "\n" not in str(error.value)
    del manifest["fields"][field]
    (cache.path / "manifest.json").write_text(json.dumps(manifest))
    if field in ADDED_LATER:  # a cache that was written before there was this field
        TeacherCache(tmp_path, asked)
        return
    with pytest.raises(CacheError, match=f"{field} .*'nothing' found"):
        TeacherCache(tmp_path, asked)


def test_a_cache_from_before_there_were_dates_keeps_its_name():
    made = CacheFields("top_k", "f" * 16, 0, "a" * 16, 96, top_k=8, dtype="float16")
    assert made.name == "top_k-a2aadb254a26" and not ADDED_LATER.keys() & made.content().keys()
    read = dataclasses.replace(made, arithmetic="1")
    assert read.name != made.name and read.content()["arithmetic"] == "1"


def test_a_date_is_taken_from_a_cache_of_the_same_arithmetic_alone(tmp_path):
    made = CacheFields(
        "top_k", "f" * 16, 0, "a" * 16, 96, top_k=8, dtype="float16", date="2026-11-20"
    )
    (tmp_path / made.name).mkdir()
    (tmp_path / made.name / "manifest.json").write_text(json.dumps({"fields": made.content()}))
    today = dataclasses.replace(made, date="2026-11-26")
    assert dates_of(tmp_path, today) == ["2026-11-20"]
    assert dates_of(tmp_path, dataclasses.replace(today, arithmetic="1")) == []


def test_each_field_makes_another_cache_and_says_what_is_near(tmp_path, root):
    backend = choose_backend("torch")
    teacher, said = backend.load_teacher(root / "teacher", "teacher"), []
    written(tmp_path, fields("top_k"), backend, teacher)
    for field in dataclasses.fields(CacheFields):
        changed = dataclasses.replace(fields("top_k"), **{field.name: "other"})
        assert changed.name.split("-")[1] != fields("top_k").name.split("-")[1]
    written(tmp_path, fields("top_k", quantize_bits=4), backend, teacher, said=said)
    assert said == [f"note: {fields('top_k').name} has quantize_bits 0 (asked: 4)"]
    assert fields("top_k", cache_top_k=500).top_k == ROWS


@pytest.mark.parametrize(
    "kind, name",
    [
        ("top_k", "tokens"),
        ("top_k", "ids"),
        ("top_k", "log_probs"),
        ("top_k", "tail"),
        ("sampled", "ids"),
        ("sampled", "counts"),
        ("sampled", "distinct"),
        ("sampled", "entropy"),
        ("sampled", "top"),
        ("hidden", "states"),
        ("hidden", "head"),
    ],
)
def test_a_flipped_byte_is_found(backend, teacher, tmp_path, kind, name):
    cache = written(tmp_path, fields(kind), backend, teacher)
    file = next(cache.path.glob(f"*/{name}.npy"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheError, match=rf"{name}.npy: SHA-256 \w+… expected, \w+… found"):
        CachedTeacher(TeacherCache(tmp_path, fields(kind)), backend).targets(
            make_batch(SEQUENCES, ALL)
        )
    file.unlink()
    with pytest.raises(CacheError, match=rf"{name}.npy cannot be read"):
        CachedTeacher(TeacherCache(tmp_path, fields(kind)), backend).targets(
            make_batch(SEQUENCES, ALL)
        )


def test_nothing_is_asked_twice(backend, teacher, tmp_path):
    asked, calls = fields("top_k"), []

    def load():
        calls.append(1)
        return teacher

    def ask(sequences) -> TeacherCache:
        cache = TeacherCache(tmp_path, asked)
        fill(
            cache,
            sequences,
            load,
            backend,
            TABLE,
            {},
            calls.append,
            lambda label, total: calls.append(total) or (lambda more: None),
        )
        return cache

    assert ask(SEQUENCES[:4]).size()[:2] == (4, 43) and calls == [1, 4]
    ask([*SEQUENCES[:4], *SEQUENCES[:2]])
    ask([truncate(one, TruncationTable(fraction=0.5)) for one in SEQUENCES[:4]])
    assert calls == [1, 4]
    assert ask(SEQUENCES).size()[:2] == (6, TOKENS) and calls == [1, 4, 1, 2]
    other = dataclasses.replace(
        SEQUENCES[0], tokens=SEQUENCES[1].tokens
    )  # the id of one, the text of another
    cache = ask([other])
    assert calls == [1, 4, 1, 2, 1, 1] and cache.size()[0] == 7
    for one in (SEQUENCES[0], other):
        batch = make_batch([dataclasses.replace(one, allowed=np.ones(len(one), bool))], ALL)
        live = teacher.top_k(whole_batch([one], 1), 64, ROWS)[0]
        assert np.array_equal(
            CachedTeacher(cache, backend).targets(batch).ids, live[batch.positions]
        )


class _Answers:
    """A teacher that says the same of every token, for as many tokens as one likes."""

    vocabulary_rows = ROWS

    def top_k(self, batch: Batch, k: int, rows: int) -> tuple[np.ndarray, ...]:
        count = len(batch.positions)
        ids = np.tile(np.arange(k, dtype=np.int32), (count, 1))
        return ids, np.full((count, k), -5, np.float32), np.full(count, -1, np.float32)


def test_the_work_of_a_row_does_not_grow_with_the_parts(tmp_path, monkeypatch):
    """Examples come in any order: a file is looked at once, and stays neither open nor mapped."""
    monkeypatch.setattr("mlx_distill.teaching.fill.PART_TOKENS", 1)
    torch, asked = choose_backend("torch"), fields("top_k", cache_top_k=4)
    sequences = [sequence(9, seed) for seed in range(40)]
    written(tmp_path, asked, torch, _Answers(), sequences)
    looked_at: list[Path] = []
    load = np.load

    def counting(file: Path, **settings: str) -> np.ndarray:
        looked_at.append(file)
        return load(file, **settings)

    monkeypatch.setattr(np, "load", counting)
    cached = CachedTeacher(TeacherCache(tmp_path, asked), torch)
    before = len(os.listdir("/dev/fd"))
    for seed in range(3):
        for row in np.random.default_rng(seed).permutation(40):
            cached.targets(make_batch([sequences[row]], ALL))
    files = list(cached.cache.path.glob("part-*/*.npy"))
    assert sorted(looked_at) == sorted(files) and len(files) == 20 * 4  # of two rows each
    assert len(os.listdir("/dev/fd")) == before


def test_rows_of_a_part_are_those_of_its_arrays(tmp_path):
    """In whatever order an older version wrote them; a file that was cut since it was checked is
    told.
    """
    found = np.arange(60, dtype=np.float32).reshape(12, 5)
    columns = {"by_rows": np.asfortranarray(found), "by_columns": found, "flat": found[:, 0]}
    write_part(tmp_path / "part-000000", columns, [("a", 0, 12, 0)])
    index = json.loads((tmp_path / "part-000000/index.json").read_text())
    file = tmp_path / "part-000000/by_columns.npy"
    np.save(file, np.asfortranarray(found))
    index["sha256"]["by_columns"] = sha256_of(file)
    (tmp_path / "part-000000/index.json").write_text(json.dumps(index))
    part = Part(tmp_path / "part-000000")
    for name, array in columns.items():
        assert np.array_equal(part.rows(name, 3, 7), array[3:7])
        assert np.array_equal(part.array(name), array)
    os.truncate(tmp_path / "part-000000/by_rows.npy", 200)
    assert np.array_equal(part.rows("by_rows", 0, 3), found[:3])
    with pytest.raises(CacheError, match=r"by_rows\.npy is shorter than it was"):
        part.rows("by_rows", 3, 7)


# Mishaps


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "where", ["numpy:save", "json:dumps", "os:replace", "mlx_distill.files:flush_folder"]
)
def test_a_writer_that_was_stopped_goes_on_and_ends_equal(root, tmp_path, monkeypatch, kind, where):
    backend = choose_backend("torch")
    teacher = backend.load_teacher(root / "teacher", "teacher")
    monkeypatch.setattr("mlx_distill.teaching.fill.PART_TOKENS", 10)
    whole = written(tmp_path / "whole", fields(kind), backend, teacher)
    assert len(list(whole.path.glob("part-*"))) == 3

    class Stopped(BaseException): ...

    module, _, name = where.partition(":")
    owner = importlib.import_module(module)
    function = getattr(owner, name)
    for call in range(1, 12):
        calls = iter(range(1, 1000))

        def stopping(*args, calls=calls, call=call, **kwargs):
            if next(calls) == call:
                raise Stopped
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, stopping)
        try:
            written(tmp_path / "stopped", fields(kind), backend, teacher)
        except Stopped:
            continue
        finally:
            monkeypatch.setattr(owner, name, function)
        break
    written(tmp_path / "stopped", fields(kind), backend, teacher)
    assert call > 2 and contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_two_writers_at_once_write_each_answer_once(root, tmp_path, monkeypatch):
    backend = choose_backend("torch")
    teacher = backend.load_teacher(root / "teacher", "teacher")
    monkeypatch.setattr("mlx_distill.teaching.fill.PART_TOKENS", 10)
    said, loads, inside = [], [], threading.Event()

    def work():
        def load():
            loads.append(1)
            inside.wait(5)
            return teacher

        fill(
            TeacherCache(tmp_path, fields("top_k")),
            SEQUENCES,
            load,
            backend,
            TABLE,
            {},
            said.append,
            lambda *_: lambda more: None,
        )

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not said:
        threading.Event().wait(0.01)
    inside.set()
    for thread in threads:
        thread.join()
    assert len(loads) == 1 and "another process is writing" in said[0] and len(said) == 1
    assert TeacherCache(tmp_path, fields("top_k")).size()[:2] == (6, TOKENS)


def test_a_full_disk_is_one_line_and_loses_nothing(root, tmp_path, monkeypatch):
    backend = choose_backend("torch")
    teacher = backend.load_teacher(root / "teacher", "teacher")
    monkeypatch.setattr("mlx_distill.teaching.fill.PART_TOKENS", 10)
    save, calls = np.save, iter(range(1, 100))

    def full(*args):
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        return save(*args)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        CacheError,
        match=r"part-000001: cannot be written \(No space left on device\); complete parts are intact",
    ):
        written(tmp_path, fields("top_k"), backend, teacher)
    cache = TeacherCache(tmp_path, fields("top_k"))
    assert [path.name for path in cache.path.glob("*part*")] == ["part-000000"] and cache.size()[0]
    assert written(tmp_path, fields("top_k"), backend, teacher).size()[0] == len(SEQUENCES)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mac_leaves_in_a_cache_harms_nothing(root, tmp_path, kind):
    backend = choose_backend("torch")
    teacher, said = backend.load_teacher(root / "teacher", "teacher"), []
    cache = written(tmp_path, fields(kind), backend, teacher, SEQUENCES[:4])
    left_by_a_mac(cache.path)
    again = written(tmp_path, fields(kind), backend, teacher, said=said)
    assert again.size()[:2] == (6, TOKENS) and said == []
    batch, live = make_batch(SEQUENCES, ALL), tmp_path / "live"
    wanted = written(live, fields(kind), backend, teacher)
    found, wanted = (CachedTeacher(one, backend).targets(batch) for one in (again, wanted))
    learner = student(backend, root)
    sums = [learner.score(batch, one, Objective()).stacked() for one in (found, wanted)]
    np.testing.assert_allclose(*sums, rtol=1e-6)


def test_a_cache_may_move(backend, teacher, tmp_path):
    written(tmp_path / "here", fields("hidden"), backend, teacher)
    shutil.move(tmp_path / "here", tmp_path / "there")
    CachedTeacher(TeacherCache(tmp_path / "there", fields("hidden")), backend).targets(
        make_batch(SEQUENCES, ALL)
    )


def test_sparse_answers_at_another_temperature_are_refused(backend, root, caches):
    batch = make_batch(SEQUENCES, ALL)
    with pytest.raises(ValueError, match="temperature"):
        student(backend, root).score(
            batch, caches["top_k"].targets(batch), Objective(temperature=2.0)
        )
