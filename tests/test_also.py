"""The further tasks of a run's `[eval]`."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from mlx_distill import pipeline
from mlx_distill.errors import RunError
from mlx_distill.recipe.load import load_recipe
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
