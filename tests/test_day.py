"""A chat template that reads the clock: a run that goes on tomorrow, a cache that is found again,
scores of the same day.
"""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import recipe_file

from mlx_distill import pipeline, stages
from mlx_distill.data import day as days
from mlx_distill.errors import DataError, RunError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring import score as scoring
from mlx_distill.view import View

pytestmark = pytest.mark.usefixtures("without_charts")
SETTINGS = (
    "optim.steps=2",
    "eval.examples=1",
    "eval.max_new_tokens=2",
    "eval.score_teacher=false",
    "eval.score_base=false",
)


@pytest.fixture(scope="module")
def clock_recipe(tmp_path_factory, bytes_tokenizer) -> Path:
    return recipe_file(tmp_path_factory.mktemp("clock"), bytes_tokenizer("clock"))


@pytest.fixture
def call(clock_recipe, tmp_path, monkeypatch):
    """A function of the pipeline on a day; what it returned and said."""

    def call(function, today, *settings):
        monkeypatch.setattr(days, "today", lambda: today)
        folders = f"run.folder={tmp_path}/runs", f"teacher.cache_folder={tmp_path}/answers"
        used = folders if any("teacher.cache=" in setting for setting in settings) else folders[:1]
        recipe = load_recipe(clock_recipe, (*SETTINGS, *used, *settings))
        console = Console(file=io.StringIO(), width=300)
        with View(console) as view:
            return function(recipe, view, "mlx"), console.file.getvalue()

    return call


def teach(recipe, view, backend):
    (folder,) = stages.teach([recipe], view, backend)
    return folder


def content(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def prompt(folder: Path) -> str:
    return "".join(
        piece["text"] for piece in content(folder, "sample.json") if piece["segment"] == "prompt"
    )


def test_a_run_goes_on_tomorrow_with_its_own_day(call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            RunFolder, "write_student", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            call(pipeline.run, "2026-01-02")
    folder, said = call(pipeline.run, "2026-01-03")
    assert (
        "continuing after step 2" in said
        and content(folder, "manifest.json")["prompt_date"] == "2026-01-02"
    )
    assert "Today Date: 02 Jan 2026" in prompt(folder) and "prompts say the date 2026-01-02" in said


def test_a_run_from_before_days_were_kept_says_the_day_of_its_manifest(call):
    folder, _ = call(pipeline.run, "2026-01-02")
    manifest = content(folder, "manifest.json")
    del manifest["prompt_date"], manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"created": "2026-01-02 10:00:00"}))
    _, said = call(pipeline.run, "2026-01-05")
    assert "prompts say the date 2026-01-02" in said


def test_a_cache_is_found_again_tomorrow_and_gives_its_day(call):
    first, _ = call(teach, "2026-01-02", "teacher.cache=top_k")
    assert content(first, "manifest.json")["fields"]["date"] == "2026-01-02"
    parts = sorted(first.glob("part-*"))
    again, said = call(teach, "2026-01-03", "teacher.cache=top_k")
    assert again == first and sorted(first.glob("part-*")) == parts and "asking" not in said
    folder, said = call(pipeline.run, "2026-01-04", "teacher.cache=top_k")
    assert "Today Date: 02 Jan 2026" in prompt(folder) and "prompts say the date 2026-01-02" in said


def test_two_days_are_two_caches(call):
    first, _ = call(teach, "2026-01-02", "teacher.cache=top_k")
    other, _ = call(teach, "2026-01-02", "teacher.cache=top_k", "data.date=2026-01-01")
    assert first != other and content(other, "manifest.json")["fields"]["date"] == "2026-01-01"


def test_scores_are_asked_on_the_day_of_the_run(call, monkeypatch):
    asked = []
    score = scoring.score
    monkeypatch.setattr(
        scoring,
        "score",
        lambda *given, **named: asked.append((given, named)) or score(*given, **named),
    )
    call(pipeline.run, "2026-01-02")
    assert asked and all(
        "2026-01-02" in given or "2026-01-02" in named.values() for given, named in asked
    )


def test_runs_of_a_sweep_say_the_day_of_the_first_of_them(call, tmp_path):
    days.share_day(tmp_path / "runs")
    call(pipeline.run, "2026-01-02", "run.name=first")
    for name, today in (("tomorrow", "2026-01-03"), ("later", "2026-02-01")):
        assert "Today Date: 02 Jan 2026" in prompt(call(pipeline.run, today, f"run.name={name}")[0])
    dated, _ = call(pipeline.run, "2026-01-03", "run.name=dated", "data.date=2025-12-31")
    assert "Today Date: 31 Dec 2025" in prompt(dated)
    assert (tmp_path / "runs" / days.SHARED).read_text() == "2026-01-02\n"
    kept, _ = call(teach, "2026-01-03", "run.name=taught", "teacher.cache=top_k")
    assert content(kept, "manifest.json")["fields"]["date"] == "2026-01-02"


def test_a_sweep_takes_the_day_of_a_teacher_cache_or_of_a_run_that_has_begun(call, tmp_path):
    call(teach, "2026-01-02", "teacher.cache=top_k")
    days.share_day(tmp_path / "runs")
    call(pipeline.run, "2026-01-03", "run.name=cached", "teacher.cache=top_k")
    live, _ = call(pipeline.run, "2026-01-03", "run.name=live")
    assert "Today Date: 02 Jan 2026" in prompt(live)
    days.share_day(tmp_path / "others", RunFolder(live).kept_day())
    assert (
        days.shared_day(tmp_path / "others")
        == days.agreed_day(tmp_path / "others", "2026-01-03")
        == "2026-01-02"
    )


def test_a_kept_day_that_is_none_is_one_line(tmp_path):
    days.share_day(tmp_path)
    assert (
        days.shared_day(tmp_path) == ""
        and days.agreed_day(tmp_path / "alone", "2026-01-03") == "2026-01-03"
    )
    (tmp_path / days.SHARED).write_text("yesterday")
    with pytest.raises(RunError, match="prompt_date holds 'yesterday', expected a day like"):
        days.shared_day(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"prompt_date": "soon"}')
    with pytest.raises(
        RunError, match=r"prompt_date in .*manifest.json holds 'soon', expected a day"
    ):
        RunFolder(tmp_path / "run").kept_day()


def test_a_day_that_nothing_reads_is_refused(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, (f"run.folder={tmp_path}", "data.date=2026-01-02"))
    with (
        View(Console(file=io.StringIO())) as view,
        pytest.raises(DataError, match="reads no clock; leave it empty"),
    ):
        pipeline.run(recipe, view, "mlx")
