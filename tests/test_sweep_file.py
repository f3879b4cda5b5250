"""Sweep files: which runs they make, what these are called, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest

from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.sweeps.sweep import load_sweep

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.toml"))
BASE = (
    '[teacher]\nmodel = "t"\n[student]\nmodel = "s"\n'
    '[data]\nsource = "rows.jsonl"\ntrain_examples = 40\n[optim]\nsteps = 30\n[eval]\ntask = '
    '"jsonl:rows.jsonl"\n'
)


@pytest.fixture
def write(tmp_path):
    """Writes a base recipe and a sweep over it; returns the sweep's path."""

    def write(text: str, base: str = BASE, name: str = "mine") -> Path:
        (tmp_path / "base.toml").write_text(base)
        path = tmp_path / f"{name}.toml"
        path.write_text(f'recipe = "base.toml"\n{text}')
        return path

    return write


def load(path: Path, *overrides: str):
    return load_sweep(path, overrides)


def test_every_combination_of_the_axes_at_every_seed_seed_by_seed(write):
    sweep = load(
        write(
            "seeds = [3, 4]\n[axes]\ntruncation.fraction = [0.5, 1.0]\nobjective.kd_weight = "
            "[0.5, 0.0]\n"
        )
    )
    found = [
        (one.recipe.run.seed, one.recipe.truncation.fraction, one.recipe.objective.kd_weight)
        for one in sweep.points
    ]
    assert found == [
        (seed, fraction, weight)
        for seed in (3, 4)
        for fraction in (0.5, 1.0)
        for weight in (0.5, 0.0)
    ]
    assert sweep.points[1].settings == {"truncation.fraction": 0.5, "objective.kd_weight": 0.0}
    assert {one.label for one in sweep.points} == {""} and sweep.axes["truncation.fraction"] == [
        0.5,
        1.0,
    ]
    assert [one.recipe.run.seed for one in load(write("[axes]\noptim.steps = [1]\n")).points] == [
        42
    ]  # the base's


def test_arms_stand_beside_the_axes(write):
    sweep = load(
        write(
            '[axes]\ntruncation.fraction = [1.0]\n[[arms]]\nname = "last '
            'half"\ntruncation.fraction = 0.5\ntruncation.keep = "suffix"\n'
        )
    )
    last = sweep.points[-1]
    assert (last.label, last.recipe.truncation.keep, last.recipe.truncation.fraction) == (
        "last half",
        "suffix",
        0.5,
    )
    assert last.settings == {"truncation.fraction": 0.5, "truncation.keep": "suffix"}


def test_token_matched_arms_read_as_many_tokens_as_whole_sequences(write):
    points = load(write("token_matched = [0.25, 0.5]\n")).points
    found = [
        (one.recipe.truncation.fraction, one.recipe.data.train_examples, one.recipe.optim.steps)
        for one in points
    ]
    assert found == [(0.25, 160, 120), (0.5, 80, 60)] and {one.label for one in points} == {
        "token-matched"
    }
    by_epochs = load(
        write("token_matched = [0.5]\n", BASE.replace("steps = 30", "epochs = 2"))
    ).points
    assert (
        by_epochs[0].recipe.data.train_examples,
        by_epochs[0].recipe.optim.steps,
        by_epochs[0].recipe.optim.epochs,
    ) == (80, 0, 2)


def test_set_and_overrides_change_the_base_in_this_order(write):
    path = write(
        "[set]\noptim.steps = 7\noptim.learning_rate = 1e-3\n[axes]\ntruncation.fraction = [0.5]\n"
    )
    (point,) = load(path, "optim.learning_rate=1e-2").points
    assert (point.recipe.optim.steps, point.recipe.optim.learning_rate) == (7, 1e-2)


def test_names_say_what_differs_from_the_base_and_nothing_else(write):
    text = (
        "[set]\ntruncation.fraction = 0.5\n[axes]\ntruncation.fraction = [0.5, "
        "1.0]\nobjective.segments = [['cot'], ['prompt', 'cot']]\n"
    )
    names = [one.name for one in load(write(text)).points]
    assert names == [
        "seed=42",
        "segments=prompt+cot_seed=42",
        "fraction=1.0_seed=42",
        "fraction=1.0_segments=prompt+cot_seed=42",
    ]


def test_names_tell_apart_what_would_look_the_same(write):
    text = (
        '[[arms]]\nname = "a"\nteacher.model = "org/a b"\n[[arms]]\nname = "b"\nteacher.model = '
        '"org/a-b"\n'
        '[[arms]]\nname = "c"\nstudent.model = "org/a-b"\n[[arms]]\nname = "d"\neval.temperature '
        "= 0.5\n"
        '[[arms]]\nname = "e"\nobjective.temperature = 0.5\n'
        '[[arms]]\nname = "f"\nstudent.lora_targets = ["q_proj"]\nstudent.tuning = "lora"\n'
    )
    names = [one.name for one in load(write(text)).points]
    assert len(set(names)) == 6 and all("/" not in name and " " not in name for name in names)
    assert names[2].startswith("student.model=") and names[3:5] == [
        "eval.temperature=0.5_seed=42",
        "objective.temperature=0.5_seed=42",
    ]
    long = (
        load(write('[[arms]]\nname = "a"\ndata.where = {x = "%s"}\n' % ("y" * 300))).points[0].name
    )
    assert len(long) < 140


def test_equal_runs_of_two_sweeps_are_one_run(write):
    shared = 'runs = "runs/all"\n'
    one = load(write(shared + "[axes]\ntruncation.fraction = [0.5, 1.0]\n", name="one")).points
    two = load(
        write(shared + "[axes]\nobjective.segments = [['cot'], ['answer']]\n", name="two")
    ).points
    paths = [[point.folder.path for point in points] for points in (one, two)]
    assert paths[0][1] == paths[1][0] == Path("runs/all/seed=42")
    assert one[1].recipe.digest() == two[0].recipe.digest()


def test_the_teachers_cache_is_read_where_it_can_serve(write):
    """Without a teacher, or with the context dropped, its answers are of no use; asked for in a
    condition, it is insisted on.
    """
    cached = '[set]\nteacher.cache = "top_k"\nteacher.cache_top_k = 3\ntruncation.fraction = 0.5\n'
    arms = (
        '[[arms]]\nname = "prefix"\n[[arms]]\nname = "suffix"\ntruncation.keep = "suffix"\n'
        '[[arms]]\nname = "alone"\nobjective.kd_weight = 0.0\n'
    )
    kinds = [
        (one.label, one.recipe.teacher.cache, one.recipe.teacher.cache_top_k)
        for one in load(write(cached + arms)).points
    ]
    assert kinds == [("prefix", "top_k", 3), ("suffix", "off", 64), ("alone", "off", 64)]
    with pytest.raises(RecipeError, match="drops the context"):
        load(
            write(
                '[set]\ntruncation.fraction = 0.5\n[[arms]]\nname = "a"\ntruncation.keep = '
                '"suffix"\nteacher.cache = "top_k"\n'
            )
        )
    swept = load(
        write("[axes]\nteacher.cache_top_k = [2, 4]\n[set]\nteacher.cache = 'top_k'\n")
    ).points
    assert [(one.recipe.teacher.cache_top_k, one.recipe.teacher.cache) for one in swept] == [
        (2, "top_k"),
        (4, "top_k"),
    ]
    assert len({one.name for one in swept}) == 2


def test_teacher_and_base_are_scored_where_all_runs_share_them(write):
    assert load(write("seeds = [1, 2]\n[axes]\ntruncation.fraction = [0.5, 1.0]\n")).shared == {
        "base",
        "teacher",
    }
    for other in (
        'student.model = ["a/b", "c/d"]',
        "prune.layers = [1, 2]",
        'student.compute_dtype = ["float32", "bfloat16"]',
    ):
        assert load(write(f"[axes]\n{other}\n")).shared == {"teacher"}, other
    # which channels stay is measured on other texts under another seed; rounds begin with all
    measured = "[set]\nprune.channels = 64\n[axes]\nprune.rounds = "
    assert load(write(f"{measured}[0]\n")).shared == {"base", "teacher"}
    assert load(write(f"seeds = [1, 2]\n{measured}[0]\n")).shared == {"teacher"}
    assert load(write(f"{measured}[0, 2]\n")).shared == {"teacher"}
    assert load(write(f"seeds = [1, 2]\n{measured}[2, 4]\n")).shared == {"base", "teacher"}
    assert (
        load(
            write("[set]\neval.score_base = false\n[axes]\nteacher.quantize_bits = [0, 4]\n")
        ).shared
        == set()
    )
    assert not any(
        one.recipe.eval.score_base for one in load(write("[axes]\noptim.steps = [1]\n")).points
    )


def test_the_full_condition_is_named_by_values_and_rather_of_the_grid(write):
    arms = '[[arms]]\nname = "again"\ntruncation.fraction = 1.0\noptim.steps = 5\n'
    text = "[axes]\ntruncation.fraction = [0.5, 1.0]\n[full]\ntruncation.fraction = 1.0\n"
    assert load(write(text + arms)).full.settings == {"truncation.fraction": 1.0}
    named = load(write(arms + "[full]\noptim.steps = 5\n")).full
    assert (named.label, named.settings["optim.steps"]) == ("again", 5)
    assert load(write("[axes]\ntruncation.fraction = [0.5]\n")).full is None


def test_an_arm_knows_its_place_on_the_axes(write):
    """So that it can be drawn against them."""
    points = load(
        write(
            "token_matched = [0.5]\n[axes]\ntruncation.fraction = [0.5, 1.0]\nobjective.kd_weight "
            "= [0.5, 0.0]\n"
        )
    ).points
    matched = {
        "truncation.fraction": 0.5,
        "objective.kd_weight": 0.5,
        "data.train_examples": 80,
        "optim.steps": 60,
    }
    assert points[-1].settings == matched and points[-1].label == "token-matched"


def test_one_run_under_one_label_is_one_point(write):
    assert (
        len(
            load(
                write("seeds = [1, 1]\n[axes]\ntruncation.fraction = [1, 1.0, 0.5]\n", BASE)
            ).points
        )
        == 2
    )
    same = '[[arms]]\nname = "a"\n[[arms]]\nname = "b"\n'
    assert [(one.label, one.name) for one in load(write(same)).points] == [
        ("a", "seed=42"),
        ("b", "seed=42"),
    ]


ERRORS = {
    "unknown key": ("axis = 1\n", ("mine.toml: a sweep has no 'axis'", "did you mean 'axes'?")),
    "unknown field": (
        "[axes]\ntruncation.fracton = [1.0]\n",
        ("[truncation] has no field 'fracton'", "did you mean 'fraction'?"),
    ),
    "no table": ("[axes]\nfraction = [1.0]\n", ("[axes] fraction should be table.field",)),
    "no list": (
        "[axes]\ntruncation.fraction = 0.5\n",
        ("[axes] truncation.fraction should be a list of values, found 0.5",),
    ),
    "empty list": ("[axes]\ntruncation.fraction = []\n", ("should be a list of values, found []",)),
    "wrong value": (
        "[axes]\ntruncation.fraction = [0.5, 2.0]\n",
        ("[truncation] fraction should be", "found 2.0", "at truncation.fraction = 2.0"),
    ),
    "contradiction": (
        "[axes]\nobjective.jsd_beta = [0.1]\n",
        ("nothing reads it", "at objective.jsd_beta = 0.1"),
    ),
    "nameless arm": ("[[arms]]\ntruncation.fraction = 0.5\n", ("[[arms]] number 1 has no name",)),
    "nothing": ("seeds = [1]\n", ("nothing to run",)),
    "wrong seeds": (
        'seeds = ["a"]\n[axes]\noptim.steps = [1]\n',
        ("[seeds] 0 should be a valid integer, found 'a'",),
    ),
    "other problems": ("[axes]\neval.seed = [1, 2]\n", ("same problems",)),
    "no task": ('[set]\neval.task = ""\n[axes]\noptim.steps = [1]\n', ("[eval] task is empty",)),
    "matched of all": (
        "token_matched = [0.5]\n[set]\ndata.train_examples = 0\n",
        ("train_examples is 0",),
    ),
    "matched by a suffix": (
        "token_matched = [0.5]\n[set]\ntruncation.keep = 'suffix'\n",
        ("token_matched needs a cut",),
    ),
    "matched whole": ("token_matched = [1.0]\n", ("is the whole sequence itself",)),
    "seed axis": (
        "[axes]\nrun.seed = [1, 2]\n",
        ("run.seed does not make runs that can be compared: use seeds",),
    ),
    "named arm": (
        "[[arms]]\nname = 'a'\nrun.folder = 'x'\n",
        ("run.folder does not make", "use runs"),
    ),
    "nobody is full": (
        "[axes]\noptim.steps = [1]\n[full]\noptim.stepz = 1\n",
        ("[full] asks for optim.stepz = 1", "no run"),
    ),
    "a date": (
        "[axes]\ntruncation.fraction = [1979-05-27]\n",
        ("[truncation] fraction should be", "1979-05-27"),
    ),
    "mistyped set": (
        "[set]\ntruncation.keep = 'sufix'\n[axes]\noptim.steps = [1]\n",
        ("base.toml", "did you mean 'suffix'?"),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_line_that_says_where(write, case):
    text, parts = ERRORS[case]
    with pytest.raises(RecipeError) as caught:
        load(write(text))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_more_runs_than_anyone_waits_for_are_refused(write):
    axes = (
        f"[axes]\noptim.steps = {list(range(1, 102))}\ndata.train_examples = "
        f"{list(range(1, 101))}\n"
    )
    with pytest.raises(RecipeError, match="make 10,100 runs, a sweep can have 10,000"):
        load(write(axes))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("07:32:00", "a list of values, found datetime.time(7, 32)"),
        ("[[0.5]]", "a valid number, found [0.5]"),
        ("[2]", "from 1e-06 to 1.0, found 2"),
        ("[1e-999]", "the number 1e-999 is out of a float's range"),
        ("[" * 300 + "]" * 300, "nested more than 100 levels deep"),
        ("[" + "9" * 5000 + "]", "a number of more than 4,300 digits"),
        ("[0x" + "f" * 200 + "]", "…"),
    ],
)
def test_an_axis_that_cannot_be_is_one_short_line(write, value, said):
    with pytest.raises(RecipeError) as error:
        load(write(f"[axes]\ntruncation.fraction = {value}\n"))
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_long_name_in_another_script_fits_a_folder(write):
    (point,) = load(write(f"[axes]\ndata.split = ['{'数' * 80}']\n")).points
    assert len(point.name.encode()) < 140


def test_a_base_whose_table_is_none(write):
    with pytest.raises(RecipeError, match=r"base.toml: \[truncation\] must be a table, found 5"):
        load(
            write(
                "[set]\ntruncation.fraction = 0.5\n[axes]\noptim.steps = [1]\n",
                f"truncation = 5\n{BASE}",
            )
        )


def test_a_base_that_is_not_there(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('recipe = "bse.toml"\n[axes]\noptim.steps = [1]\n')
    (tmp_path / "base.toml").write_text(BASE)
    with pytest.raises(NotFound, match=r"no recipe at .*bse.toml; did you mean .*base.toml"):
        load(path)
    path.write_text("[axes]\noptim.steps = [1]\n")
    with pytest.raises(RecipeError, match="recipe is empty"):
        load(path)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_shipped_sweeps_load_and_share_runs(path):
    sweep, base = load(path), load_recipe(ROOT / "recipes" / "cot50.toml")
    assert len(sweep.points) >= 18 and len({one.recipe.run.seed for one in sweep.points}) >= 3
    assert all(one.recipe.eval.examples >= 500 for one in sweep.points)
    assert sweep.base.optim == base.optim and sweep.base.teacher.cache == "hidden"


def test_the_shipped_sweeps_are_90_runs_in_all():
    names = {
        point.folder.path: point.recipe.digest() for path in SWEEPS for point in load(path).points
    }
    assert len(SWEEPS) == 3 and len(names) == 90


def test_the_readmes_sweep_is_one(tmp_path):
    blocks = re.findall(
        r"```toml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8"), re.S
    )
    (text,) = [block for block in blocks if block.startswith("recipe = ")]
    shutil.copy(ROOT / "recipes" / "cot50.toml", tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.toml").write_text(text)
    points = load(tmp_path / "sweeps" / "mine.toml").points
    assert len(points) == 3 * (5 * 2 + 1 + 1)
    assert {one.recipe.teacher.cache for one in points if one.recipe.objective.kd_weight} == {
        "hidden"
    }
