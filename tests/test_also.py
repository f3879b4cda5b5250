"""The further tasks of a run's `[eval]`."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mlx_distill import pipeline
from mlx_distill.errors import RunError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.reporting.compared import compared, scored_by
from mlx_distill.reporting.runs_page import report
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.also import further_scores
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.verify.tasks import task_of
from mlx_distill.view import View


def test_a_further_task_is_not_asked_of_a_model_that_is_no_more_the_runs(
    tiny_recipe: Path, tmp_path: Path
):
    rows = tiny_recipe.parent / "rows.jsonl"
    asked = (f"eval.task=jsonl:{rows}", "eval.examples=2", "eval.max_new_tokens=3")
    settings = (f"run.folder={tmp_path}", "optim.steps=1", "eval.score_teacher=false", *asked)

    def run(*more: str) -> Path:
        recipe = load_recipe(tiny_recipe, (*settings, *more))
        return pipeline.run(recipe, View(Console(file=io.StringIO())))

    folder = run()
    (tmp_path / "other.jsonl").write_text(rows.read_text())
    config = folder / "student" / "config.json"
    whole = config.read_text()
    config.write_text(whole + " ")
    also = f'eval.also=["jsonl:{tmp_path}/other.jsonl"]'
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        run(also)
    config.write_text(whole)
    run(also)
    assert sorted(path.suffix for path in (folder / "evals").iterdir()).count(".json") == 2


@pytest.fixture
def two_tasks(tiny_recipe: Path, tmp_path: Path):
    """Name and settings → a run that answers two tasks, and what it said."""
    rows = tiny_recipe.parent / "rows.jsonl"
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text())
    settings = (
        f"run.folder={tmp_path / 'runs'}",
        "optim.steps=1",
        f"eval.task=jsonl:{rows}",
        f'eval.also=["jsonl:{other}"]',
        "eval.examples=3",
        "eval.max_new_tokens=3",
    )

    def run(name: str, *more: str) -> tuple[Path, str]:
        recipe = load_recipe(tiny_recipe, (*settings, f"run.name={name}", *more))
        console = Console(file=io.StringIO(), width=80)
        folder = pipeline.run(recipe, View(console))
        return folder, console.file.getvalue()

    return run


def test_a_runs_page_and_its_last_lines_show_every_task(two_tasks):
    folder, said = two_tasks("one")
    before, after = said.split("\non jsonl:")
    assert before.count("student after") == after.count("student after") == 1
    page = (folder / "report.md").read_text()
    section = page[page.index("Scores on jsonl:") :].split("\n## ")[0]
    for label in ("student before", "trained student", "teacher"):
        assert label in section
    unfinished = "of the student's answers did not finish in 3 tokens"
    assert before.count(unfinished) == 0 and " ".join(after.split()).count(unfinished) == 2
    assert page.count(unfinished) == 2 and unfinished in section
    kept = further_scores(folder, load_recipe(folder / "recipe.toml").eval)
    assert [sorted(one.scores) for one in kept] == [["base", "student", "teacher"]]
    assert f"{kept[0].scores['student'].problems}" in section


def test_scores_of_other_settings_or_in_broken_files_are_not_shown(two_tasks):
    folder, _ = two_tasks("one")
    two_tasks("one", "eval.max_new_tokens=4")
    settings = load_recipe(folder / "recipe.toml").eval
    assert settings.max_new_tokens == 4
    (now,) = further_scores(folder, settings)
    assert all(score.mean_tokens > 3 for score in now.scores.values())
    files = [
        file for file in folder.glob("evals/*.json") if '"max_new_tokens": 4' in file.read_text()
    ]
    assert len(files) == 3
    for file in files:
        file.write_text(file.read_text()[:-40])
    assert further_scores(folder, settings) == []
    report([folder], folder)
    assert "Scores on" not in (folder / "report.md").read_text()


def test_what_an_earlier_run_in_the_folder_left_is_not_shown(two_tasks):
    """`--fresh` leaves evals/, which serve teacher and base again."""
    folder, _ = two_tasks("one")
    settings = load_recipe(folder / "recipe.toml").eval
    weights = folder / "student" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert further_scores(folder, settings)[0].scores.keys() == {"base", "teacher"}
    shutil.rmtree(folder / "student")
    assert further_scores(folder, settings)[0].scores.keys() == {"base", "teacher"}


def test_problems_that_changed_are_asked_and_others_are_not(two_tasks, tmp_path):
    first, other = tmp_path / "first.jsonl", tmp_path / "other.jsonl"
    first.write_text(other.read_text())
    task = f"eval.task=jsonl:{first}"
    folder, _ = two_tasks("one", task)
    _, said = two_tasks("one", task)
    assert "other problems" not in said and "goes on" not in said
    for file in (first, other):
        file.write_text(file.read_text().replace('{"prompt": "', '{"prompt": "Again: '))
    _, said = two_tasks("one", task)
    assert said.count("has other problems now than when it was scored") == 4  # the task, three also
    asked = {one.id for one in task_of(load_recipe(folder / "recipe.toml").eval).problems}
    further = further_scores(folder, load_recipe(folder / "recipe.toml").eval)[0].scores
    for score in (*RunFolder(folder).read(TaskScores).whole.values(), *further.values()):
        assert score.correct.keys() == asked


def test_compare_says_a_line_for_each_task(two_tasks, tmp_path):
    one, other = (scored_by(str(two_tasks(name)[0])) for name in ("one", "other"))
    lines, page = compared(one, other, tmp_path / "page")
    assert len(lines) == 2 and all(" on jsonl:" in line for line in lines)
    assert lines[0] != lines[1]
    assert page.markdown.read_text().count("Problem by problem") == 2
    alone = scored_by(str(two_tasks("alone", "eval.also=[]")[0]))
    lines, _ = compared(one, alone, tmp_path / "page")
    assert len(lines) == 1 and " on jsonl:" not in lines[0]
