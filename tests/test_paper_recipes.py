"""recipes/paper/: five datasets in two forms, and three studies over any of them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import model_folder

from mlx_distill.commands.base import read
from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.machine import this_machine
from mlx_distill.recipe.load import load_recipe
from mlx_distill.sweeps.sweep import load_sweep
from mlx_distill.terminal.plan import plan_of

FOLDER = Path(__file__).parents[1] / "recipes" / "paper"
DATASETS = ("bespoke-stratos", "nemotron", "openthoughts", "sky-t1", "synthetic-1")
FORMS = ("", "-compat")
RECIPES = [dataset + form for dataset in DATASETS for form in FORMS]
SEGMENTS = [
    ("cot",),
    ("cot", "answer"),
    ("prompt", "cot"),
    ("prompt", "cot", "answer"),
    ("answer",),
    ("prompt", "answer"),
]
STUDIES = {  # what each run of a study has
    "fractions": lambda recipe: recipe.truncation.fraction,
    "segments": lambda recipe: recipe.objective.segments,
    "halves": lambda recipe: recipe.truncation.keep,
}
FOUND = {
    "fractions": [0.1, 0.25, 0.5, 0.75, 1.0],
    "segments": SEGMENTS,
    "halves": ["prefix", "middle", "suffix"],
}
THOUGHT = "<think>\nOne more.\n</think>\n\n{}"
MARKED = (
    "<|begin_of_thought|>\n\nOne more.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\n{}\n\n<|end_of_solution|>"
)


def fields(name):
    """The fields of a recipe, by table and name, but for what it is called."""
    tables = load_recipe(FOLDER / f"{name}.toml").model_dump()
    found = {(table, key): value for table, of in tables.items() for key, value in of.items()}
    return {key: value for key, value in found.items() if key != ("run", "name")}


def differing(a, b):
    ours, theirs = fields(a), fields(b)
    return {".".join(key) for key in ours if ours[key] != theirs[key]}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_papers_settings(name):
    recipe = load_recipe(Path("paper") / name)  # by its name, without a clone
    steps = recipe.data.train_examples / recipe.batch.global_batch_size
    assert recipe.data.source == name.removesuffix("-compat")
    assert recipe.data.train_examples == (40_000 if "openthoughts" in name else 8_000)
    assert (recipe.optim.learning_rate, recipe.optim.weight_decay) == (4e-6, 0.05)
    assert recipe.run.validate_every == recipe.run.checkpoint_every == 0.1 * steps


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_without_its_rows(name, monkeypatch):
    """What a name says of the format is known; nobody has a dataset of that bare name."""
    asked = []
    hub = SimpleNamespace(load_dataset=lambda *names, **options: asked.append(names))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read(Path("paper") / name, []).data.source == name.removesuffix("-compat")
    assert not asked


def test_all_recipes_are_these():
    assert {path.stem for path in FOLDER.glob("*.toml")} == {*RECIPES, *STUDIES}


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_forms_differ_in_what_the_readme_says(dataset):
    compat = load_recipe(FOLDER / f"{dataset}-compat.toml")
    assert differing(dataset, f"{dataset}-compat") == {
        "data.compat",
        "batch.shuffle",
        "batch.global_batch_size",
        "optim.decayed",
        "eval.answer",
        "run.validate_every",
        "run.checkpoint_every",
    }
    assert (compat.data.compat, compat.batch.shuffle, compat.optim.decayed) == (
        "paper",
        False,
        "all",
    )
    assert (compat.batch.global_batch_size, compat.batch.sort_window) == (4, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset", DATASETS[1:])
def test_datasets_differ_in_their_data_alone(dataset, form):
    found = differing(DATASETS[0] + form, dataset + form)
    of_data = {"data.source", "data.stream_rows", "data.train_examples"}
    assert found <= of_data | {"run.validate_every", "run.checkpoint_every"}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_goes_over_each_recipe_with_folders_of_its_own(study):
    folders = set()
    for name in RECIPES:
        sweep = load_sweep(FOLDER / f"{study}.toml", recipe=Path("paper") / name)
        assert [STUDIES[study](point.recipe) for point in sweep.points] == FOUND[study]
        base = fields(name)["data", "compat"]
        assert {point.recipe.data.compat for point in sweep.points} == {base}
        assert sweep.full is not None and sweep.folder == Path("runs/paper") / study / name
        folders |= {point.folder.path for point in sweep.points}
    assert len(folders) == len(RECIPES) * len(FOUND[study])
    assert {path.parent.name for path in folders} == set(RECIPES)


def test_a_study_is_found_by_name_and_has_a_base_of_its_own():
    sweep = load_sweep(Path("paper/fractions"))
    assert sweep.base.data.source == "bespoke-stratos"
    assert sweep.folder == Path("runs/paper/fractions")


@pytest.mark.parametrize(
    ("recipe", "error", "said"),
    [
        ("paper/sky-t2", NotFound, "no recipe at paper/sky-t2; "),
        ("fraction", NotFound, "no recipe at fraction; "),
        (str(FOLDER / "halves.toml"), RecipeError, "is a sweep, which runs a recipe many times"),
    ],
)
def test_another_base_that_is_none(recipe, error, said):
    with pytest.raises(error, match=said):
        load_sweep(FOLDER / "fractions.toml", recipe=Path(recipe))


def row(dataset, asked, answer):
    """As the hub has it."""
    if dataset == "synthetic-1":
        said = {"llm_response": THOUGHT.format(answer), "task_type": "verifiable_math"}
        return {"prompt": asked, **said}
    if dataset == "nemotron":
        user = [{"role": "user", "content": asked}]
        return {"input": user, "output": THOUGHT.format(answer), "reasoning": "on"}
    turns = (("user", asked), ("assistant", MARKED.format(answer)))
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, bytes_tokenizer):
    root = tmp_path_factory.mktemp("pair")
    for name, layers in (("teacher", 2), ("student", 1)):
        model_folder(root / name, bytes_tokenizer("qwen2_5"), layers=layers)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned(name, pair, tmp_path):
    dataset = name.removesuffix("-compat")
    rows = [json.dumps(row(dataset, f"{i} + 1?", i + 1)) + "\n" for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    recipe = load_recipe(
        FOLDER / f"{name}.toml",
        (
            f"teacher.model={pair}/teacher",
            f"student.model={pair}/student",
            f"data.source={dataset}:{tmp_path}/rows.jsonl",
            "data.stream_rows=0",
            "data.train_examples=8",
            "data.validation_examples=2",
        ),
    )
    prepared, plan, _ = plan_of(recipe, this_machine("mlx"), advised=False)
    assert (len(prepared.train), len(prepared.validation)) == (8, 2)
    assert (plan.examples, plan.global_batch_size) == (8, 4 if "-compat" in name else 8)
    assert plan.total_flops > 0 and plan.peak_bytes > 0
