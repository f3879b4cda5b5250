"""What stands before a first run: `init`, recipes by name, and messages that name what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_distill.cli import app
from mlx_distill.data.detection import about_format, detected
from mlx_distill.data.reading import read_examples
from mlx_distill.embedded.task import generate
from mlx_distill.errors import DataError, ModelError, NotFound, RecipeError, RunError
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.shipped import SHIPPED, shipped_names
from mlx_distill.recipe.tables import DataTable
from mlx_distill.sweeps.sweep import load_sweep
from mlx_distill.terminal.init import init

TEXT = "<think>one and one</think>2"
ROLES = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": TEXT}]
SHAREGPT = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": TEXT}]
FOUND = [
    ("columns", {"prompt": "1+1?", "cot": "one and one", "answer": "2"}),
    ("columns", {"question": "1+1?", "reasoning": "one and one", "answer": "2"}),
    ("columns", {"Problem": "1+1?", "Solution": "one and one", "Answer": "2", "source": "x"}),
    ("response", {"prompt": "1+1?", "response": TEXT}),
    ("response", {"question": "1+1?", "answer": TEXT}),
    ("alpaca", {"instruction": "1+1?", "input": "", "output": TEXT}),
    ("messages", {"messages": ROLES}),
    ("messages", {"conversations": ROLES}),
    ("conversations", {"conversations": SHAREGPT}),
    ("gsm8k", {"question": "1+1?", "answer": "one and one\n#### 2"}),
]


def rows_in(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def problems(folder: Path, count: int = 30) -> str:
    """Rows of somebody's own, under names of their own."""
    return rows_in(
        folder,
        *(
            {"question": one.prompt, "reasoning": one.cot, "answer": one.answer}
            for one in generate("train", count, 5)
        ),
    )


@pytest.mark.parametrize("format_, row", FOUND)
def test_format_and_columns_are_found_from_the_first_rows(tmp_path, format_, row):
    data = DataTable(source=rows_in(tmp_path, row))
    found = detected(data)
    assert found.format == format_
    (example,) = read_examples(data)
    assert (example.prompt, example.cot, example.answer) == ("1+1?", "one and one", "2")
    assert f'format = "{format_}"' in about_format(data, found)


def test_columns_that_a_recipe_names_stay(tmp_path):
    row = {"prompt": "no", "q": "1+1?", "cot": "one and one", "answer": "2"}
    (example,) = read_examples(DataTable(source=rows_in(tmp_path, row), prompt_column="q"))
    assert example.prompt == "1+1?"


def test_rows_that_nothing_reads_say_so_and_claim_nothing(tmp_path):
    data = DataTable(source=rows_in(tmp_path, {"x": 1}))
    assert about_format(data, detected(data)) == ""
    with pytest.raises(DataError, match="no column 'prompt', found x"):
        list(read_examples(data))


def test_prompts_alone_are_found_where_a_model_answers_them(tmp_path):
    data = DataTable(source=rows_in(tmp_path, {"prompt": "1+1?"}))
    assert detected(data, written=True).format == "prompts"
    assert detected(data).format == "columns"


def test_init_writes_a_recipe_that_loads_and_says_what_the_rows_hold(tmp_path):
    said: list[str] = []
    source = problems(tmp_path)
    path = init(tmp_path / "new", "embedded:teacher", "embedded:student", source, said.append)
    recipe = load_recipe(path)
    assert (recipe.data.source, recipe.data.format) == (source, "columns")
    assert (recipe.data.prompt_column, recipe.data.cot_column) == ("question", "reasoning")
    assert recipe.run.name == "rows"
    assert any("30 usable examples" in line for line in said)
    with pytest.raises(RunError, match="is there already"):
        init(tmp_path / "new", "a", "b", source, said.append)


def test_init_writes_nothing_for_rows_without_reasoning(tmp_path):
    source = rows_in(tmp_path, {"prompt": "1+1?", "response": "2"})
    with pytest.raises(DataError, match="no reasoning"):
        init(tmp_path / "new", "a", "b", source, print)
    with pytest.raises(NotFound):
        init(tmp_path / "new", "a", "b", str(tmp_path / "none.jsonl"), print)
    assert not (tmp_path / "new").exists()


def test_init_leaves_a_named_dataset_its_settings(tmp_path):
    rows_in(tmp_path, {"question": "1+1?", "answer": "one and one\n#### 2"})
    source = f"gsm8k:{tmp_path}/rows.jsonl"
    path = init(tmp_path / "new", "embedded:teacher", "embedded:student", source, print)
    recipe = load_recipe(path)
    assert (recipe.data.source, recipe.data.format) == (source, "auto")
    assert [one.answer for one in read_examples(recipe.data)] == ["2"]


def test_a_student_without_tokenizer_json_says_what_to_copy(tmp_path):
    weights = SHIPPED.parent / "embedded" / "weights" / "student"
    shutil.copytree(weights, tmp_path / "student")
    (tmp_path / "student" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json; copy it from the model"):
        load_tokenizer(tmp_path / "student")


def test_a_table_with_semicolons_is_read(tmp_path):
    (tmp_path / "rows.csv").write_text('question;reasoning;answer\n1+1?;"one; and one";2\n')
    (example,) = read_examples(DataTable(source=str(tmp_path / "rows.csv")))
    assert (example.prompt, example.cot, example.answer) == ("1+1?", "one; and one", "2")


def test_recipes_and_sweeps_are_found_by_name_without_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped_names():
        assert load_recipe(Path(name)).run.name == name
    for name in shipped_names(sweeps=True):
        assert load_sweep(Path(name)).name == name
    (tmp_path / "cot50").mkdir()  # a folder is no recipe
    assert load_recipe(Path("cot50")).student.model == "embedded:student"


def test_recipes_are_in_the_package_once():
    clone = Path(__file__).parents[1] / "recipes"
    assert clone.is_symlink() and clone.resolve() == SHIPPED


def test_run_and_sweep_name_each_other():
    sweep = SHIPPED / "sweeps" / "fraction.toml"
    with pytest.raises(RecipeError, match=f"`mlx-distill sweep {sweep}` runs it"):
        load_recipe(sweep)
    recipe = SHIPPED / "cot50.toml"
    with pytest.raises(RecipeError, match=f"`mlx-distill run {recipe}` runs it"):
        load_sweep(recipe)


def test_resume_is_answered():
    command = [sys.executable, "-m", "mlx_distill", "run", "cot50", "--resume"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "runs continue by themselves" in ended.stderr


def test_no_help_text_has_what_markup_would_swallow():
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        texts = [command.help, *(getattr(one, "help", "") for one in command.params)]
        assert not [text for text in texts if text and "[" in text], name
