"""The loop: what is logged, when it validates and saves, which checkpoint is best, and what stops
it. With a toy backend.
"""

import dataclasses
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from endings import logged
from rich.console import Console
from safetensors.numpy import load_file
from toy_backend import WORDS, ToyBackend, ToyStudent, ToyTeacher, table

from mlx_distill import objective as definition
from mlx_distill import pipeline
from mlx_distill.backends.loss_sums import LossSums
from mlx_distill.data.batches import Steps, validation_batches
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DivergedError
from mlx_distill.objective import Objective
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.reporting.run_charts import charts_of
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.rows import LOGS, ValidationRow
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.training import loop
from mlx_distill.training.loop import Interrupted, Training
from mlx_distill.view import View

pytestmark = pytest.mark.usefixtures("without_charts")


def sequences(count, seed=0):
    random = np.random.default_rng(seed)
    for index in range(count):
        prompt, cot, answer = map(int, random.integers(2, 6, 3))
        tokens = random.integers(0, WORDS, prompt + cot + answer).astype(np.int32)
        yield TokenSequence(
            f"example-{seed}-{index}", tokens, prompt, prompt + cot, np.ones(len(tokens), bool)
        )


def make_recipe(folder, **tables):
    base = {
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "data": {"source": "rows.jsonl"},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4, "pad_multiple": 4},
        "optim": {"learning_rate": 1.0, "schedule": "constant", "warmup_fraction": 0.0, "steps": 6},
        "run": {"name": "toy", "folder": str(folder), "checkpoint_every": 2, "validate_every": 3},
    }
    return Recipe.model_validate(
        {name: base.get(name, {}) | tables.get(name, {}) for name in base | tables}
    )


@pytest.fixture
def training(tmp_path):
    """A `Training` of the toy; tables are fields of the recipe that differ."""

    def make(**tables) -> Training:
        recipe = make_recipe(tmp_path, **tables)
        steps = Steps(
            list(sequences(10)),
            recipe.objective.segments,
            recipe.batch,
            recipe.run.seed,
            steps=recipe.optim.steps,
            selection=recipe.selection,
        )
        teacher = ToyTeacher(table(1)) if recipe.teacher.model else None
        return Training(
            recipe,
            ToyBackend(),
            ToyStudent(table(2)),
            teacher,
            steps,
            validation_batches(list(sequences(5, seed=1)), recipe.batch),
            RunFolder.open(recipe),
            View(Console(file=io.StringIO())),
            lambda step: {"student": 1.0 * step.tokens},
        )

    return make


def write_script(losses):
    """A stand-in for `validation_terms` that says these losses, one after the other."""
    rows = iter(losses)
    return lambda *_: {"loss": next(rows)}


# what a step logs


def direct(student, teacher, step, objective):
    """Every supervised position of a step, one by one: segment, divergence, cross-entropy, gradient
    of its row of logits.
    """
    for batch in step.batches:
        for position, target, segment, weight in zip(
            batch.positions, batch.targets, batch.segment, batch.weight, strict=True
        ):
            if weight:
                before = batch.tokens.ravel()[position]
                rows = student[None, before], teacher[None, before]
                yield (
                    int(segment),
                    before,
                    definition.divergence(*rows, objective)[0],
                    definition.cross_entropy(rows[0], np.array([target]))[0],
                    definition.grad(*rows, np.array([target]), objective)[0],
                )


def test_loss_terms_are_sums_over_the_step_divided_by_its_loss_tokens(training):
    made = training(
        objective={
            "segments": ["prompt", "cot"],
            "kd_weight": 0.3,
            "divergence": "reverse_kl",
            "temperature": 2.0,
        }
    )
    step, student = made.source.step(0), table(2)
    segment, before, kd, ce, gradient = zip(
        *direct(student, table(1), step, made.objective), strict=True
    )
    segment, kd, ce = map(np.array, (segment, kd, ce))
    assert len(step.batches) == 2 and len(kd) == step.loss_tokens
    made.train()
    row = logged(made.run.path, "metrics.jsonl")[0]
    assert row["kd"] == pytest.approx(kd.sum() / step.loss_tokens, rel=1e-12)
    assert row["ce"] == pytest.approx(ce.sum() / step.loss_tokens, rel=1e-12)
    assert row["loss"] == pytest.approx(
        (0.3 * kd.sum() + 0.7 * ce.sum()) / step.loss_tokens, rel=1e-12
    )
    assert row["kd_prompt"] == pytest.approx(kd[segment == 0].mean(), rel=1e-12)
    assert row["kd_cot"] == pytest.approx(kd[segment == 1].mean(), rel=1e-12)
    assert "kd_answer" not in row
    whole = np.zeros((WORDS, WORDS))
    for place, part in zip(before, gradient, strict=True):
        whole[place] += part / step.loss_tokens
    assert row["grad_norm"] == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    assert (row["loss_tokens"], row["tokens"]) == (step.loss_tokens, step.tokens)


def test_tokens_that_carry_loss_are_counted_whatever_they_weigh(training):
    """As with `data.compat = "paper"`, or weights of problems by their pass rate."""
    made = training(objective={"segments": ["cot"]}, optim={"steps": 2})
    light = [dataclasses.replace(one, weight=1 / len(one)) for one in sequences(10)]
    made.source = Steps(light, ("cot",), made.recipe.batch, made.recipe.run.seed, steps=2)
    state = made.train()
    counts = [np.count_nonzero([*b.weight]) for i in (0, 1) for b in made.source.step(i).batches]
    assert state.loss_tokens_seen == sum(counts) > 2 * made.source.step(0).loss_tokens
    rows = logged(made.run.path, "metrics.jsonl")
    assert sum(row["loss_tokens"] for row in rows) == sum(counts)


@pytest.mark.parametrize("by", ["student_entropy", "teacher_entropy", "divergence", "random"])
@pytest.mark.parametrize("position_weight", ["flat", "rising"])
def test_a_step_learns_the_tokens_that_a_rule_chooses(training, by, position_weight):
    """The mutant that divides by the number of candidates failed here."""
    selection = {"share": 0.4, "by": by, "position_weight": position_weight}
    made = training(selection=selection, objective={"segments": ["cot"], "kd_weight": 1.0})
    step, tables, count, loss = (
        made.source.step(0),
        {"student": table(2), "teacher": table(1)},
        0,
        0,
    )
    for batch in step.batches:
        before = batch.tokens.ravel()[batch.positions]
        student, teacher = tables["student"][before], tables["teacher"][before]
        kd = definition.divergence(student, teacher, made.objective)
        log_p = definition.log_softmax(student if by == "student_entropy" else teacher)
        scores = kd if by == "divergence" else -(np.exp(log_p) * log_p).sum(axis=1)
        rows = batch.positions // batch.tokens.shape[1]
        for row in range(len(batch.ids)):
            (among,) = np.nonzero((batch.weight > 0) & (rows == row))
            chosen = among  # at random: they were chosen as the batch was made
            if by != "random":
                best = np.argsort(-scores[among], kind="stable")
                chosen = np.sort(among[best[: math.ceil(0.4 * len(among))]])
            n = len(chosen)
            rising = 2 * np.arange(1, n + 1) / (n + 1)
            loss += (kd[chosen] * (rising if position_weight == "rising" else 1)).sum()
            count += n
    made.train()
    row = logged(made.run.path, "metrics.jsonl")[0]
    assert row["loss_tokens"] == step.positions == count
    assert row["loss"] == pytest.approx(loss / count, rel=1e-6)


def test_every_step_has_one_row_with_all_that_is_promised(training):
    made = training()
    made.train()
    rows = logged(made.run.path, "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens_seen"] for row in rows] == list(
        np.cumsum([step.tokens for step in made.source])
    )
    promised = {
        "loss",
        "kd",
        "ce",
        "kd_cot",
        "grad_norm",
        "learning_rate",
        "tokens_seen",
        "tokens_per_second",
        "active_bytes",
        "cache_bytes",
        "peak_bytes",
        "footprint_bytes",
        "flops",
    }
    # the first step compiles, so that it tells nothing of the rate
    assert [row["tokens_per_second"] is None for row in rows] == [True, *[False] * 5]
    assert all(promised <= row.keys() for row in rows)
    assert made.student.rates == [row["learning_rate"] for row in rows] == [1.0] * 6


@pytest.mark.parametrize(
    "losses, patience, ends, best",
    [
        ([5, 3, 2, 4, 2, 9], 2, 4, 2),  # an equal loss is no better one
        ([1, 3, 4, 0, 0, 0], 1, 2, 1),  # what was before training does not count
        ([5, 4, 5, 3, 4, 2, 1], 2, 6, 6),
        ([5, 3, 4, 4, 4, 4, 4], 0, 6, 1),
    ],
)
def test_training_ends_when_validation_no_longer_falls(
    training, monkeypatch, losses, patience, ends, best
):
    tables = {"optim": {"patience": patience}, "run": {"validate_every": 1}}
    monkeypatch.setattr(loop, "validation_terms", write_script(losses))
    made = training(**tables)
    state = made.train()
    assert (state.step, state.best_step) == (ends, best)
    said = made.view.console.file.getvalue()
    assert (f"training ends after step {ends} of 6: validation was best" in said) == (ends < 6)
    again = training(**tables)  # its checkpoint says the same, and nothing is asked again
    assert again.train().step == ends
    assert len(logged(made.run.path, "metrics.jsonl")) == ends


def test_a_new_term_is_logged_shown_and_drawn_by_its_name(training, monkeypatch):
    """A student that also learns hidden states, half of whose distance counts."""
    monkeypatch.setattr(Objective, "weights", property(lambda self: {"ce": 0.5, "hidden": 0.5}))
    plain = ToyStudent.rows

    def rows(self, batch, targets, objective) -> LossSums:
        sums = plain(self, batch, targets, objective)
        return dataclasses.replace(sums, terms=sums.terms | {"hidden": 3.0 * sums.tokens})

    monkeypatch.setattr(ToyStudent, "rows", rows)
    made = training()
    made.train()
    metrics, validated = (made.run.rows(kind) for kind in LOGS)
    row, held_out = metrics[0].numbers, validated[0].numbers
    assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * 3)
    assert [row[name] for name in ("hidden", "hidden_cot")] == [3, 3]
    assert [held_out[name] for name in ("hidden", "hidden_prompt", "hidden_answer")] == [3] * 3
    said = made.view.console.file.getvalue()
    assert "hidden 3.0000  " in said and "hidden_cot 3.0000" in said
    drawn = charts_of(SimpleNamespace(metrics=metrics, validation=validated, recipe=None))
    assert "hidden" in [series.label for series in drawn[0].series]
    assert "hidden" in [chart.title for chart in drawn[1:]]


def test_plain_fine_tuning_asks_no_teacher_and_logs_no_divergence(training):
    made = training(teacher={"model": ""}, objective={"kd_weight": 0.0})
    made.train()
    row, validated = (
        logged(made.run.path, "metrics.jsonl")[0],
        logged(made.run.path, "validation.jsonl")[0],
    )
    assert row["loss"] == row["ce"]
    assert not {name for name in row | validated if name.startswith(("kd", "kl", "agree"))}


# validation


def test_validation_is_forward_kl_and_ce_of_whole_sequences_by_segment(training):
    """Whatever the recipe trains with: temperature, direction and supervised segments change
    nothing but `loss`.
    """
    first = training(
        objective={"divergence": "reverse_kl", "temperature": 3.0, "segments": ["answer"]}
    )
    first._validate()
    row = logged(first.run.path, "validation.jsonl")[0]
    step = SimpleNamespace(batches=first.validation)
    segment, _, kl, ce, _ = map(
        np.array, zip(*direct(table(2), table(1), step, Objective()), strict=True)
    )
    for index, name in enumerate(("prompt", "cot", "answer")):
        assert row[f"kl_{name}"] == pytest.approx(kl[segment == index].mean(), rel=1e-12)
        assert row[f"ce_{name}"] == pytest.approx(ce[segment == index].mean(), rel=1e-12)
        assert row[f"tokens_{name}"] == (segment == index).sum()
        assert 0 <= row[f"agree_{name}"] <= 1
    assert row["kl"] == pytest.approx(kl.mean(), rel=1e-12)
    assert row["loss"] == pytest.approx((0.5 * kl + 0.5 * ce)[segment == 2].mean(), rel=1e-12)
    assert len(kl) == sum(len(sequence) - 1 for sequence in sequences(5, seed=1))


def test_validation_is_the_same_at_every_fraction(tiny_recipe, tmp_path):
    first = []
    for fraction in (0.5, 0.75, 1.0):
        overrides = (
            f"truncation.fraction={fraction}",
            f"run.folder={tmp_path}/{fraction}",
            "optim.steps=1",
            "eval.task=",
        )
        folder = pipeline.run(
            load_recipe(tiny_recipe, overrides), View(Console(file=io.StringIO()))
        )
        rows = logged(folder, "validation.jsonl")
        first.append({name: value for name, value in rows[0].items() if name != "seconds"})
        assert rows[0]["tokens_cot"] > 0 and rows[0]["tokens_answer"] > 0
        supervised = logged(folder, "metrics.jsonl")[0]["loss_tokens"]
        first[-1]["trained on"] = supervised
    trained_on = [row.pop("trained on") for row in first]
    assert first[0] == first[1] == first[2]
    assert trained_on[0] < trained_on[1] < trained_on[2]


@pytest.mark.parametrize(
    ("validate", "checkpoint", "validated", "kept"),
    [
        (3, 2, [0, 3, 6], [2, 4, 6]),
        (0, 0, [0, 6], [6]),
        (4, 0, [0, 4, 6], [6]),
        (1, 6, [0, 1, 2, 3, 4, 5, 6], [6]),
        (7, 5, [0, 6], [5, 6]),
    ],
)
def test_cadence_of_validation_and_checkpoints(
    training, monkeypatch, validate, checkpoint, validated, kept
):
    """The last step always has both. No validation improves on the first here, but the last, so
    only the cadence saves.
    """
    monkeypatch.setattr(
        loop.Training,
        "_validate",
        lambda self: self.run.append(ValidationRow(step=self.state.step)),
    )
    made = training(
        run={
            "validate_every": validate,
            "checkpoint_every": checkpoint,
            "keep_checkpoints": "all",
            "export": "last",
        }
    )
    made.train()
    assert [row["step"] for row in logged(made.run.path, "validation.jsonl")] == validated
    assert made.run.steps() == kept


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(training, monkeypatch):
    monkeypatch.setattr(
        loop, "validation_terms", write_script([0.1, 3.0, 1.0, 2.0])
    )  # step 0 is the base model: never the best
    made = training(run={"validate_every": 2, "checkpoint_every": 0})
    weights = {}
    made.stop_asked = lambda: weights.update({made.state.step: made.student.weights.copy()})
    state = made.train()
    assert (state.best_step, state.best_loss) == (4, 1.0)
    assert made.run.steps() == [4, 6]
    made.student.restore_state(made.run.checkpoint(4))
    assert np.array_equal(made.student.weights, weights[4])


@pytest.mark.parametrize(("export", "expected"), [("best", 2), ("last", 6)])
def test_export_takes_the_checkpoint_that_the_recipe_names(
    tiny_recipe, tmp_path, monkeypatch, export, expected
):
    """The real student, with validation losses that the test makes up; the exported weights are
    compared with the checkpoint's.
    """
    from safetensors.numpy import load_file

    monkeypatch.setattr(loop, "validation_terms", lambda sums, *_: terms())
    losses = iter([9.0, 1.0, 2.0, 3.0])
    terms = lambda: {"loss": next(losses)}  # noqa: E731
    recipe = load_recipe(
        tiny_recipe,
        (f"run.folder={tmp_path}", f"run.export={export}", "run.validate_every=2", "eval.task="),
    )
    folder = RunFolder(pipeline.run(recipe, View(Console(file=io.StringIO()))))
    assert folder.read(Manifest).exported_step == expected
    student = load_file(folder.student / "model.safetensors")
    kept = {
        step: load_file(folder.checkpoint(step) / "weights.safetensors") for step in folder.steps()
    }
    same = {
        step: all(np.array_equal(student[name], array) for name, array in arrays.items())
        for step, arrays in kept.items()
    }
    assert same == {2: expected == 2, 6: expected == 6}


# stopping


def bad_at(count, what, value):
    """Say `value` at the `count`-th call of `what`."""
    calls = iter(range(1, 10**6))
    return lambda now, batch=None: value if now == what and next(calls) == count else None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_examples_and_leaves_weights_and_checkpoint(
    training, value
):
    made = training()
    made.student.poison = bad_at(8, "accumulate", value)  # the second micro-batch of step 4
    with pytest.raises(DivergedError) as error:
        made.train()
    ids = made.source.step(3).batches[1].ids
    assert str(error.value).startswith(
        f"step 4: the loss is {value} on examples {', '.join(ids)}; the weights were not touched"
    )
    assert not set(made.source.step(3).batches[0].ids) & set(
        str(error.value).replace(",", " ").replace(";", " ").split()
    )
    assert "the checkpoint of step 3 is intact" in str(error.value) and "learning_rate" in str(
        error.value
    )
    assert made.run.last_state().step == 3
    assert np.array_equal(
        load_file(made.run.checkpoint(3) / "weights.safetensors")["weights"], made.student.weights
    )
    assert [row["step"] for row in logged(made.run.path, "metrics.jsonl")] == [1, 2, 3]


def test_a_gradient_norm_that_is_not_finite_names_all_examples_of_the_step(training):
    made = training()
    made.student.poison = bad_at(1, "apply", math.inf)
    with pytest.raises(DivergedError) as error:
        made.train()
    assert str(error.value).startswith("step 1: the gradient norm is inf on examples ")
    assert all(
        name in str(error.value) for batch in made.source.step(0).batches for name in batch.ids
    )
    assert "no checkpoint was written yet" in str(error.value)
    assert np.array_equal(made.student.weights, table(2))


@pytest.mark.parametrize(
    ("call", "start", "said"),
    [
        (1, "validation after step 0: the loss is nan", "own weights"),
        (4, "validation after step 3: the loss is nan", "learning_rate"),
    ],
)
def test_a_validation_loss_that_is_not_finite_stops_and_is_never_the_best(
    training, call, start, said
):
    made = training()
    made.student.poison = bad_at(call, "score", math.nan)
    with pytest.raises(DivergedError) as error:
        made.train()
    assert str(error.value).startswith(start) and said in str(error.value)
    assert made.run.last_state().best_step == -1


def test_a_diverging_run_exits_with_2_and_one_line_and_keeps_its_checkpoint(
    tiny_recipe, command_line, tmp_path
):
    words = [
        "run",
        tiny_recipe,
        "--set",
        f"run.folder={tmp_path}",
        "--set",
        "eval.task=",
        "--set",
        "optim.schedule=constant",
    ]
    far = [
        "--set",
        "optim.learning_rate=1000",
        "--set",
        "optim.weight_decay=1000",
        "--set",
        "optim.decayed=all",
        "--set",
        "optim.warmup_fraction=0.0",
        "--set",
        "run.checkpoint_every=1",
        "--set",
        "run.validate_every=0",
    ]
    result = command_line(*words, *far)
    assert result.code == 2
    assert result.err.startswith("error: step 2: ") and len(result.err.strip().splitlines()) == 1
    assert "on examples " in result.err and "the checkpoint of step 1 is intact" in result.err
    assert RunFolder(tmp_path / "tiny").steps() == [1]


def test_a_stop_is_answered_after_the_step_with_a_checkpoint(training):
    made = training()
    made.stop_asked = lambda: made.state.step == 5
    with pytest.raises(Interrupted, match=r"saved at step 5 in .*toy"):
        made.train()
    again = training()
    again.train()
    through = training(run={"name": "through"})
    through.train()
    assert np.array_equal(again.student.weights, through.student.weights)
    assert again.student.rates == through.student.rates[5:]


def test_a_resumed_state_knows_best_step_tokens_and_time(training, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        loop.time, "perf_counter", lambda: float(next(ticks))
    )  # each look at the clock takes a second
    through = training(run={"name": "through"})
    expected = through.train()
    made = training()
    made.stop_asked = lambda: made.state.step == 3
    with pytest.raises(Interrupted):
        made.train()
    state = training().train()
    assert {**vars(state), "recipe_digest": ""} == {**vars(expected), "recipe_digest": ""}
    # six steps and what their source takes, three validations
    assert state.elapsed_seconds == 6 * (1 + 1) + 3 * 2


def test_a_checkpoint_of_another_recipe_is_not_continued(training):
    made = training()
    made.train()
    other = dataclasses.replace(made.state, recipe_digest="0123456789abcdef")
    made.run.save_checkpoint(other, made.student.save_state, "last")
    with pytest.raises(Exception, match="another recipe"):
        training().train()
