"""Teacher and base are asked once for all runs that ask them the same, and never for another question."""

import json
import os
from pathlib import Path

import pytest

from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.generations import FILE
from mlx_distill.scoring.task_scores import TaskScores


@pytest.fixture
def score(command_line, tiny_recipe, tmp_path):
    """A run's name and settings → what it said, and its folder; all share one cache."""

    def run(name: str, *settings: str, switch: str = "") -> tuple[str, RunFolder]:
        rows = tiny_recipe.parent / "rows.jsonl"
        asked = (
            f'run.name="{name}"',
            f"run.folder={tmp_path / 'runs'}",
            "optim.steps=1",
            f"eval.task=jsonl:{rows}",
            "eval.examples=3",
            "eval.max_new_tokens=4",
            *settings,
        )
        home = {"XDG_CACHE_HOME": str(tmp_path / "home"), "MLX_DISTILL_SCORES": switch}
        words = [word for one in asked for word in ("--set", one)]
        ended = command_line("run", tiny_recipe, *words, environments=[home])
        assert ended.code == 0, ended.err
        return ended.out, RunFolder(tmp_path / "runs" / name)

    return run


def kept_files(folder: Path) -> list[Path]:
    return sorted((folder / "home" / "mlx-distill" / "scores").glob("*"))


def test_a_second_run_asks_neither_teacher_nor_base(score, tmp_path):
    first, one = score("first")
    assert "of an earlier run" not in first and len(kept_files(tmp_path)) == 2
    for file in kept_files(tmp_path):
        os.utime(file, (0, 0))
    second, other = score("second", "optim.learning_rate=0.5")
    assert second.count("answers of an earlier run") == 2
    assert all(file.stat().st_mtime > 0 for file in kept_files(tmp_path))  # used, hence kept on
    scores = [folder.read(TaskScores).scores for folder in (one, other)]
    for part in ("teacher", "base"):
        assert scores[0][part] == scores[1][part]
    assert scores[0]["student"] != scores[1]["student"]
    for folder in (one, other):  # pages show what they wrote
        lines = (folder.path / FILE).read_text().splitlines()
        models = [json.loads(line)["model"] for line in lines]
        assert sorted(models) == sorted(["base", "student", "teacher"] * 3)
    alone, last = score("alone", "optim.learning_rate=0.5", switch="off")
    assert "of an earlier run" not in alone
    made = last.read(TaskScores).scores
    assert made["teacher"].correct == scores[1]["teacher"].correct
    assert len(kept_files(tmp_path)) == 2


@pytest.mark.parametrize(
    "settings", [["eval.max_new_tokens=5"], ["eval.examples=2"], ["eval.batch_size=1"]]
)
def test_another_question_is_asked(score, tmp_path, settings):
    score("first")
    said, _ = score("second", *settings)
    assert "of an earlier run" not in said and len(kept_files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["a word", "torn"])
def test_a_damaged_file_is_made_again(score, tmp_path, damage):
    _, one = score("first")
    for file in kept_files(tmp_path):
        text = file.read_text()
        row = json.loads(text)["generations"][0]
        wrong = text.replace(json.dumps(row["correct"]), json.dumps(not row["correct"]), 1)
        file.write_text(wrong if damage == "a word" else text[: len(text) // 2])
    said, other = score("second")
    assert said.count("is not as it was written and is made again") == 2
    scores = [folder.read(TaskScores).scores for folder in (one, other)]
    assert scores[0]["teacher"].correct == scores[1]["teacher"].correct
    assert score("third")[0].count("answers of an earlier run") == 2
