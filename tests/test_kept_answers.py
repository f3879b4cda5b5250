"""A teacher that is asked about each sequence once says what it would say again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import family_folder, llama_config, recipe_of

from mlx_distill.backends import choose_backend
from mlx_distill.cost import kept_answers as costs
from mlx_distill.cost.dense import Dense
from mlx_distill.cost.flops import flops_counter
from mlx_distill.cost.kept_answers import NOTHING, kept_answers
from mlx_distill.cost.plan import make_plan
from mlx_distill.data.batches import Steps, make_batch, validation_batches
from mlx_distill.data.prepare import Prepared
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.data.truncate import truncate
from mlx_distill.machine import Machine
from mlx_distill.objective import Objective
from mlx_distill.recipe.tables import TruncationTable
from mlx_distill.recipe.training_tables import BatchTable
from mlx_distill.teaching.kept_answers import KeptAnswers

ROWS, WIDTH = 96, 32
CPU = Machine("mlx", "cpu", "float32", 10**9, "physical memory")
TABLE = BatchTable(micro_batch_size=2, global_batch_size=4, pad_multiple=8)
CONFIG = llama_config(layers=3, tied=False, vocabulary=ROWS, width=WIDTH)


def sequence(name: str, length: int) -> TokenSequence:
    tokens = np.random.default_rng(length).integers(1, ROWS, length).astype(np.int32)
    return TokenSequence(name, tokens, length // 3, length - 2, np.ones(length, bool))


WHOLE = tuple(sequence(f"t{length}", length) for length in (9, 12, 7, 15, 31, 21, 18))
TRAIN = tuple(truncate(one, TruncationTable(fraction=0.6)) for one in WHOLE)
HELD_OUT = tuple(sequence(f"v{length}", length) for length in (8, 11, 13))
PREPARED = Prepared(TRAIN, WHOLE, HELD_OUT, {}, {})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    family_folder(root / "teacher", CONFIG, seed=1)
    family_folder(root / "student", llama_config(layers=2, vocabulary=ROWS), seed=2)
    return root


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_each_sequence_is_asked_about_once_and_losses_are_those_of_asking_again(name, root):
    backend = choose_backend(name)
    teacher = backend.load_teacher(root / "teacher", "t")
    student = backend.load_student(root / "student", "s", recipe_of())
    asked: list[str] = []
    states = teacher.states
    teacher.states = lambda batch: asked.extend(batch.ids) or states(batch)
    kept, objective = KeptAnswers(teacher, backend, TRAIN + HELD_OUT, TABLE), Objective(kd_weight=1)
    steps = Steps(TRAIN, ("cot", "answer"), TABLE, seed=3, epochs=3)
    batches = [batch for step in steps for batch in step.batches]
    batches += validation_batches(HELD_OUT, TABLE) * 2
    for batch in batches:
        found, wanted = (
            student.score(batch, one.targets(batch), objective) for one in (kept, teacher)
        )
        for term, values in wanted.terms.items():
            np.testing.assert_allclose(found.terms[term], values, rtol=1e-5, atol=1e-6)
    assert sorted(asked) == sorted(one.id for one in TRAIN + HELD_OUT)
    other = make_batch([sequence("new", 10)], ("cot",))
    np.testing.assert_array_equal(
        student.score(other, kept.targets(other), objective).terms["kd"],
        student.score(other, teacher.targets(other), objective).terms["kd"],
    )
    assert "new" not in asked
    false = replace(TRAIN[0], tokens=TRAIN[0].tokens[::-1].copy())  # another text under its id
    other = make_batch([false], ("cot",))
    np.testing.assert_array_equal(
        student.score(other, kept.targets(other), objective).terms["kd"],
        student.score(other, teacher.targets(other), objective).terms["kd"],
    )


def test_what_it_says_does_not_depend_on_what_was_asked_first(root):
    """A run that is continued begins elsewhere."""
    backend = choose_backend("mlx")
    teacher = backend.load_teacher(root / "teacher", "t")
    first, second = (KeptAnswers(teacher, backend, one, TABLE) for one in (TRAIN, TRAIN[::-1]))
    batches = [make_batch([one], ("cot", "answer")) for one in TRAIN]
    said = [np.array(first.targets(batch).hidden) for batch in batches]
    again = [np.array(second.targets(batch).hidden) for batch in reversed(batches)]
    for one, other in zip(said, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)


def kept(prepared: Prepared = PREPARED, ranks: int = 1, **tables):
    given = {"teacher": {"model": "t"}, "optim": {"epochs": 2}, "batch": TABLE.model_dump()}
    recipe = recipe_of(
        **{
            table: given.get(table, {}) | values
            for table, values in ({table: {} for table in given} | tables).items()
        }
    )
    return kept_answers(recipe, prepared, Dense.of(CONFIG, "t"), CPU, ranks)


def test_kept_is_what_is_asked_about_again():
    assert kept().sequences == TRAIN + HELD_OUT and kept().training
    assert kept().bytes == 4 * WIDTH * sum(map(len, TRAIN + HELD_OUT))
    for once in (
        {"optim": {"epochs": 1}},
        {"optim": {"steps": 3}},
        {"objective": {"kd_weight": 0.0}},
    ):
        assert kept(**once).sequences == HELD_OUT and not kept(**once).training
    assert kept(optim={"steps": 4}).training  # of 4 examples each, of 7


@pytest.mark.parametrize(
    "tables",
    [
        {"teacher": {"keep_answers": "off"}},
        {"teacher": {"cache": "hidden"}},
        {"objective": {"hidden_weight": 1.0}},
        {"rollouts": {"by": "student", "refresh_every": 2}},
    ],
)
def test_nothing_is_kept_of_what_is_not_asked_again_or_asked_for_more(tables):
    assert kept(**tables) == NOTHING


def test_nothing_is_kept_that_takes_too_much_or_by_several_ranks(monkeypatch):
    assert kept(ranks=2) == NOTHING
    size = kept().bytes
    monkeypatch.setattr(costs, "total_memory_bytes", lambda: 20 * size)
    assert kept().bytes == size
    monkeypatch.setattr(costs, "total_memory_bytes", lambda: 20 * size - 1)
    assert kept() == NOTHING


def test_a_plan_and_the_steps_count_the_teachers_pass_once(root):
    recipe = recipe_of(
        teacher={"model": "t"},
        optim={"epochs": 3},
        batch=TABLE.model_dump(),
        objective={"segments": ["cot", "answer"]},
    )
    configs = CONFIG, llama_config(layers=2, vocabulary=ROWS)
    plan = make_plan(recipe, PREPARED, *configs, CPU)
    shape = Dense.of(CONFIG, "t").shape
    assert plan.flops["teacher"] == shape.trunk([len(one) for one in TRAIN])
    assert plan.kept_bytes == kept(optim={"epochs": 3}).bytes
    again = make_plan(
        recipe.model_copy(
            update={"teacher": recipe.teacher.model_copy(update={"keep_answers": "off"})}
        ),
        PREPARED,
        *configs,
        CPU,
    )
    assert again.flops["teacher"] >= 3 * plan.flops["teacher"]
    assert plan.peak.teacher == again.peak.teacher + plan.kept_bytes
    count = flops_counter(recipe, root / "teacher", root / "student", once=True)
    steps = Steps(TRAIN, ("cot", "answer"), TABLE, seed=recipe.run.seed, epochs=3)
    assert sum(count(step)["teacher"] for step in steps) == plan.flops["teacher"]
