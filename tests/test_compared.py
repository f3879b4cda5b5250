"""`mlx-distill compare`: the verdict, the page, and what cannot be compared."""

import json
from dataclasses import replace

import pytest
from test_evaluate import scored
from typer.testing import CliRunner

from mlx_distill.cli import app
from mlx_distill.errors import DataError, NotFound
from mlx_distill.reporting.compared import Scored, compared, scored_by
from mlx_distill.scoring.score import compare

TASKS = (("aime", 1), ("gsm", 2), ("aime", 3))


def kept(folder, name, marks, **told):
    score = scored({f"{i:03d}": [float(mark)] for i, mark in enumerate(marks)})
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"task": "math:x", "score": score.content(), **told}))
    return str(path), score


def test_the_verdict_is_the_paired_difference(tmp_path):
    a, better = kept(tmp_path, "a", "1" * 30 + "0" * 10)
    b, worse = kept(tmp_path, "b", "1" * 10 + "0" * 30)
    (line, *_), page = compared(scored_by(a), scored_by(b), tmp_path / "out")
    gap = compare(better, worse)
    assert f"{a} is better than {b}: +50.0 points" in line
    assert f"{100 * gap.low:+.1f} to {100 * gap.high:+.1f}, 40 shared problems" in line
    text = page.markdown.read_text(encoding="utf-8")
    assert "75" in text and "more often right | 20 |" in text and "equally often | 20 |" in text
    assert "is worse than" in compared(scored_by(b), scored_by(a), tmp_path / "out")[0][0]
    assert "no clear difference" in compared(scored_by(a), scored_by(a), tmp_path / "out")[0][0]


def test_a_first_task_meets_the_same_one_among_the_others_further_ones(tmp_path):
    marks = [{f"{task}{i}": [float(i < right)] for i in range(4)} for task, right in TASKS]
    aime, gsm, better = (
        Scored(name, scored(mark), (task, "", ""))
        for name, mark, task in zip(("a", "b", "b"), marks, ("aime", "gsm", "aime"), strict=True)
    )
    several = replace(gsm, also={"aime": better})
    for one, other, said in ((aime, several, "a is"), (several, aime, "b is")):
        (line,), page = compared(one, other, tmp_path / "out")
        assert said in line or "no clear difference" in line
        assert "4 shared problems" in line
        assert "Task: aime." in page.markdown.read_text(encoding="utf-8")
    with pytest.raises(DataError, match="share no problem"):
        compared(aime, gsm, tmp_path / "out")


def test_what_was_asked_otherwise_is_not_compared(tmp_path):
    a, _ = kept(tmp_path, "a", "10", prompt="{problem}", answer="anywhere")
    b, _ = kept(tmp_path, "b", "10", prompt="{problem}", answer="after_think")
    with pytest.raises(DataError, match="was scored with answer = 'anywhere'"):
        compared(scored_by(a), scored_by(b), tmp_path / "out")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match="holds no score"):
        scored_by(str(tmp_path / "c.json"))
    with pytest.raises(NotFound, match=r"no run folder and no \.json"):
        scored_by(str(tmp_path / "nothing"))


def test_settings_that_differ_are_said(tmp_path):
    settings = {"max_new_tokens": 256, "temperature": 0.0, "examples": 500}
    a, _ = kept(tmp_path, "a", "10", settings=settings)
    b, _ = kept(tmp_path, "b", "10", settings=settings | {"max_new_tokens": 8, "examples": 2})
    (_, note), page = compared(scored_by(a), scored_by(b), tmp_path / "out")
    said = f"they were not asked alike, {a} and {b}: max_new_tokens = 256 and 8"
    assert note == f"note: {said}"
    assert "not asked alike" in page.markdown.read_text(encoding="utf-8")
    assert len(compared(scored_by(a), scored_by(a), tmp_path / "out")[0]) == 1


def test_the_command_says_a_line_and_where_the_page_lies(tmp_path):
    a, _ = kept(tmp_path, "a", "1100")
    out = tmp_path / "page"
    said = CliRunner().invoke(app, ["compare", a, a, "--out", str(out)])
    assert said.exit_code == 0 and "no clear difference" in said.output
    assert (out / "report.html").exists()
