"""The report: the numbers on it are those of the files, what is missing is said, and the page needs
nothing else.
"""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from drawn import Drawn
from made_runs import PARTS, make_recipe, make_tokens

from mlx_distill.errors import NotFound, RunError
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import with_values
from mlx_distill.reporting.commands import score_command
from mlx_distill.reporting.kept_run import method_of
from mlx_distill.reporting.page import TITLE_END
from mlx_distill.reporting.run_recipe import toml
from mlx_distill.reporting.runs_page import report
from mlx_distill.runs.small_files import SmallFiles
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.words import amount, duration, points

RECIPES = Path(__file__).parents[1] / "recipes"


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def change_json(path, change):
    """As a person changes a file, who takes its seal off."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content.pop("sha256", None)
    change(content)
    write_json(path, content)


def page_of(*runs, out):
    """The HTML page, and its text as a reader sees it."""
    html = report(list(runs), out).html.read_text(encoding="utf-8")
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return html, " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_run):
    root = tmp_path_factory.mktemp("runs")
    plain = write_run(root / "cot50-ce", kd_weight=0.0, student=311, seed=1)
    return {
        "plain": plain,
        "main": write_run(root / "cot50", compare=(str(plain),)),
        "out": root / "out",
    }


def test_the_numbers_on_the_page_are_those_of_the_files(runs):
    made = json.loads((runs["main"] / "manifest.json").read_text())
    cot = made["data"]["segments"]["cot"]
    _, text = page_of(runs["main"], out=runs["out"])
    validation = [
        json.loads(line) for line in (runs["main"] / "validation.jsonl").read_text().splitlines()
    ]
    metrics = [
        json.loads(line) for line in (runs["main"] / "metrics.jsonl").read_text().splitlines()
    ]
    for expected in (
        "The student solves 71.2 % of 500 problems, up from 23.8 % before; the teacher solves "
        "97.4 %.",
        "73.1 % of the teacher's accuracy and 64.4 % of its lead",  # 356/487 and 237/368
        "student after 71.2 % 67.1 % to 75.0 %",
        "student before better +47.4",
        "teacher worse −26.2",
        "cot50-ce better +9.0",
        f"chain of thought {validation[0]['kl_cot']:.2f} → {validation[-1]['kl_cot']:.3f}",
        f"answer {100 * validation[0]['agree_answer']:.1f} % → "
        f"{100 * validation[-1]['agree_answer']:.1f} %",
        "training time 4 min 12 s 500 of 500 steps",
        "peak memory 412 MB active 61.4 MB, footprint 181 MB",
        f"tokens read {metrics[-1]['tokens_seen'] / 1e6:.2f} M",
        "arithmetic 4.9 TFLOP teacher 1.8 T, student 2.7 T, head 400 G",
        "read 24 dropped: its prompt alone outlasts the cut 14 kept 10 for training 6 for "
        "validation 4",
        "Not used: column source in 2,064 rows, key name in 1 turn.",
        f"chain of thought {cot['before']:,} {cot['after']:,} "
        f"{100 * cot['after'] / cot['before']:.1f} % {cot['supervised']:,}",
        "student's step 450",
        f"teacher {made['models']['teacher']['name']} · {made['models']['teacher']['fingerprint']}",
        f"processor {made['machine']['processor']}",
        f"pydantic {made['versions']['pydantic']}",
    ):
        assert expected in text, expected


def test_the_page_says_how_answers_were_compared(tmp_path, write_run):
    run = write_run(tmp_path / "run")
    files = SmallFiles(run)
    files.update(TaskScores, compared={"mathematics": 1480, "text": 20})
    _, text = page_of(run, out=tmp_path / "out")
    assert "Answers are compared with the expected ones: 1,480 as mathematics, 20 as text." in text
    files.update(TaskScores, compared={})
    assert "Answers are compared" not in page_of(run, out=tmp_path / "out")[1]


def test_bars_and_error_bars_are_as_long_as_the_scores(runs):
    html, _ = page_of(runs["main"], out=runs["out"])
    scores = json.loads((runs["main"] / "eval.json").read_text())["scores"]
    for model, score in scores.items():
        bar = re.search(
            rf'<div class="bar {model}".*?width:([\d.]+)%.*?left:([\d.]+)%;width:([\d.]+)%',
            html,
            re.S,
        )
        value, low, width = map(float, bar.groups())
        assert (value, low, low + width) == pytest.approx(
            [100 * score[key] for key in ("accuracy", "low", "high")], abs=2e-3
        )


def test_the_page_needs_nothing_but_itself(runs):
    html, _ = page_of(runs["main"], runs["plain"], out=runs["out"])
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b", html)
    assert not re.search(r"\b(?:src|href|action)\s*=|url\(|@import|https?:", html)


def test_a_compared_run_is_named_by_what_sets_it_apart(runs):
    _, text = page_of(runs["main"], out=runs["out"])
    assert (
        "cot50 is better than cot50-ce (same recipe with kd_weight = 0.0): +9.0 points, "
        "95 % interval +6.4 to +11.5, which excludes zero (500 shared problems)."
    ) in text
    markdown = (runs["out"] / "report.md").read_text(encoding="utf-8")
    assert "cot50 is better than cot50-ce" in markdown
    row = r"| cot50 | cot50-ce (same recipe with kd\_weight = 0.0) | 62.2 % | 57.9 % to 66.3 % | 500 | 1.0 % | 98.8 % | 143.2 |"
    assert row in markdown


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        (300, "new is worse than old"),
        (
            356,
            "No clear difference between new and old (same recipe with kd_weight = 0.0): 0.0 "
            "points, 95 % interval −0.6 to +0.6, which includes zero",
        ),
        (380, "new is better than old"),
    ],
)
def test_the_verdict_is_computed(tmp_path, student, sentence, write_run):
    old = write_run(tmp_path / "old", kd_weight=0.0, student=356, steps=50)
    new = write_run(tmp_path / "new", student=student, compare=(str(old),), steps=50)
    assert sentence in page_of(new, out=tmp_path)[1]


def test_what_cannot_be_compared_is_said(tmp_path, write_run):
    other = write_run(tmp_path / "other", steps=50)
    change_json(
        other / "eval.json",
        lambda content: content["scores"]["student"].update(correct={"elsewhere": [1.0]}),
    )
    unscored = write_run(tmp_path / "unscored", steps=50)
    (unscored / "eval.json").unlink()
    run = write_run(
        tmp_path / "run",
        compare=(str(other), str(unscored), "no/such/run", str(tmp_path)),
        steps=50,
    )
    _, text = page_of(run, out=tmp_path)
    assert "other was scored on other problems, so it is not compared with run." in text
    assert "unscored has no score, so run and unscored are not compared." in text
    assert "no/such/run is to be compared, but there is no such run folder." in text
    assert f"no run in {tmp_path}: it holds neither recipe.toml nor manifest.json" in text


def test_a_compared_run_is_found_from_the_recipes_folder_and_the_working_folder(
    tmp_path, monkeypatch, write_run
):
    write_run(tmp_path / "recipes" / "kept", kd_weight=0.0, student=311, steps=50)
    run = write_run(tmp_path / "runs" / "run", compare=("kept",), steps=50)
    assert "there is no such run folder" in page_of(run, out=tmp_path)[1]
    monkeypatch.chdir(tmp_path / "recipes")
    assert "run is better than kept" in page_of(run, out=tmp_path)[1]


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("recipe.toml", "No recipe.toml: the recipe is not known."),
        ("manifest.json", "No manifest.json: versions, machine, data and cost are not known."),
        ("metrics.jsonl", "No metrics.jsonl: there are no training curves."),
        ("validation.jsonl", "No validation.jsonl: there are no validation curves."),
        ("eval.json", "No eval.json: this run was not scored."),
        ("sample.json", "No sample.json: no example is shown."),
    ],
)
def test_a_missing_part_is_one_line(tmp_path, part, line, write_run):
    run = write_run(tmp_path / "run", steps=50)
    (run / part).unlink()
    assert line in page_of(run, out=tmp_path)[1]
    text = (tmp_path / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert line in text
    # which segments are supervised the recipe says
    assert ("of the supervised segments:" in text) == (
        part not in ("recipe.toml", "validation.jsonl")
    )


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "content",
    ["", "{", "null", "[]", "{}", "[[1]]", '{"scores": {"student": {"accuracy": 1}}}', "\udcff"],
)
def test_a_broken_part_is_no_crash(tmp_path, part, content, write_run):
    run = write_run(tmp_path / "run", steps=20)
    (run / part).write_bytes(content.encode("utf-8", "surrogateescape"))
    page_of(run, out=tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl", "generations.jsonl"])
def test_a_digit_that_was_changed_after_the_run_is_said(whole_run, tmp_path, name):
    run = Path(shutil.copytree(whole_run("full"), tmp_path / "run"))
    said = f"{run / name} is damaged: its SHA-256 is not the one it was saved with."
    assert "is damaged" not in page_of(run, out=tmp_path)[1]
    text = (run / name).read_text()
    place = text.index("seconds") + 12
    changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
    (run / name).write_text(changed)
    assert said in page_of(run, out=tmp_path)[1]
    assert said in (tmp_path / "report.md").read_text().replace("\\", "")


def test_nothing_known_is_nothing_invented(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    write_json(run / "manifest.json", {})
    _, text = page_of(run, out=tmp_path)
    before_footer = text.partition("Intervals are")[0]
    assert not re.search(r"\d", before_footer), before_footer
    assert text.count("not recorded") == 5
    assert report([run], tmp_path).headline == "bare has not been scored."


def test_the_kl_after_is_that_of_the_exported_step(tmp_path, write_run):
    run = write_run(tmp_path / "run", steps=100)
    measured = ((0, 2.0), (50, 0.25), (100, 0.5))
    write_lines(
        run / "validation.jsonl",
        [{"step": step, "kl": 9.0, "kl_cot": kl, "tokens_cot": 10.0} for step, kl in measured],
    )
    (run / "eval.json").unlink()
    headline = (
        "run has not been scored; its validation KL to the teacher went from 2.00 to {} "
        "nats per token."
    )
    assert report([run], tmp_path).headline == headline.format("0.250")
    change_json(run / "manifest.json", lambda manifest: manifest.pop("exported_step"))
    assert report([run], tmp_path).headline == headline.format("0.500")
    sentence = (
        "supervised segments: 2.00 nats per token before training, 0.500 at the student's step."
    )
    assert (
        sentence in (tmp_path / "report.md").read_text(encoding="utf-8")
        and sentence in page_of(run, out=tmp_path)[1]
    )
    write_lines(run / "validation.jsonl", [{"step": 50, "kl": 0.25}])
    assert report([run], tmp_path).headline == "run has not been scored."
    assert "before training" not in page_of(run, out=tmp_path)[1]


def test_an_unfinished_run_says_so(tmp_path, write_run):
    run = write_run(tmp_path / "run", steps=50)
    assert "not finished" not in page_of(run, out=tmp_path)[1]
    change_json(
        run / "manifest.json",
        lambda manifest: (manifest.pop("finished"), manifest.update(steps=400)),
    )
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 51, "lo')
    _, text = page_of(run, out=tmp_path)
    assert "This run is not finished: it stands at step 50 of 400" in text
    assert "metrics.jsonl: 1 unreadable line left out." in text


def test_text_of_the_run_is_escaped(tmp_path, write_run):
    run = write_run(tmp_path / "run", steps=20)
    evil = "<script>alert('1')</script>\"><b>"
    change_json(
        run / "manifest.json",
        lambda manifest: (
            manifest.update(device=evil, dtype=evil),
            manifest["data"]["dropped"].update({evil: 1}),
            manifest["machine"].update({evil: evil}),
        ),
    )
    change_json(run / "eval.json", lambda content: content.update(task=evil))
    change_json(
        run / "sample.json",
        lambda sample: sample.insert(
            1, {"text": evil, "segment": "cot", "kept": True, "supervised": True}
        ),
    )
    html, text = page_of(run, out=tmp_path)
    assert "<script" not in html and "<b>tell" not in html
    assert text.count(" ".join(evil.split())) == 8
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_example_shows_segments_cut_and_loss(runs):
    html, text = page_of(runs["main"], out=runs["out"])
    card = html.partition('<div class="card text">')[2].partition("</div>")[0]
    looks = re.findall(r'<span class="([a-z ]+)">', card)
    assert looks == ["prompt read", "cot loss", "cot cut", "answer cut"]
    assert card.count('<b class="edge">cut</b>') == 1
    sample = [token.content() for token in make_tokens()]
    assert unescape(re.sub(r'<b class="edge">cut</b>|</?span[^>]*>', "", card)) == "".join(
        piece["text"] for piece in sample
    )
    tokens = [
        sum(piece["segment"] == "cot" and piece[key] for piece in sample)
        for key in ("kept", "supervised")
    ]
    assert (
        f"chain of thought {sum(p['segment'] == 'cot' for p in sample)} tokens, {tokens[0]} kept, "
        f"{tokens[1]} with loss" in text
    )


def write_texts(run, texts):
    """texts: model → problem → (text, whether it is right)."""
    rows = [
        {
            "model": model,
            "key": "k",
            "problem": problem,
            "sample": sample,
            "prompt": f"ask <b>{problem}</b>",
            "gold": "7",
            "compared": "text",
            "text": text if sample == 0 else "another sample",
            "correct": right,
            "finished": "</think>" in text,
            "well_formed": right,
            "tokens": 3,
            "seconds": 0.1,
        }
        for model, said in texts.items()
        for problem, (text, right) in said.items()
        for sample in (0, 1)
    ]
    write_lines(run / "generations.jsonl", rows)


def test_the_page_shows_what_was_written_for_three_problems(tmp_path, write_run):
    """One that base and student differ on, one that the student got wrong, one that it got right."""
    run = write_run(tmp_path / "run")
    right, wrong = ("<think>so</think>7", True), ("<think>so</think>8", False)
    endless = ("<think>and so " + "on " * 3000, False)
    write_texts(
        run,
        {
            "teacher": {name: right for name in "abcde"},
            "base": {"a": right, "b": right, "c": endless, "d": wrong, "e": wrong},
            "student": {"a": right, "b": right, "c": endless, "d": right, "e": wrong},
        },
    )
    (run / "student").mkdir()
    write_json(run / "student" / "config.json", {})
    html, text = page_of(run, out=tmp_path / "out")
    shown = re.findall(r"asked ask <b>(\w)</b> expected 7", text)
    assert shown == ["d", "c", "a"]
    assert (
        "student before wrong <think>so</think> 8 student after right <think>so</think> 7" in text
    )
    assert "student after unfinished <think>and so on" in text
    assert "[… 5,014 characters …]" in text and "another sample" not in text
    assert f"mlx-distill chat {run} --prompt 'ask <b>d</b>'" in text and "<b>d</b>" not in html
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert "ask &lt;b>d&lt;/b> (expected: 7)" in markdown and "student after, right:" in markdown
    assert f"    mlx-distill chat {run} --prompt 'ask <b>d</b>'" in markdown


def test_a_long_text_keeps_its_answer(tmp_path, write_run):
    """Wherever `</think>` stands in it."""
    run = write_run(tmp_path / "run")
    long = f"<think>{'so ' * 1000}</think>{'and ' * 2000}7"
    write_texts(run, {"student": {"a": (long, True)}})
    _, text = page_of(run, out=tmp_path / "out")
    assert "(no </think>)" not in text and "</think> and and" in text
    assert "and and 7" in text and "[… 4,001 characters …]" in text


def test_texts_of_a_model_without_a_score_are_not_shown(tmp_path, write_run):
    """They may be of an earlier scoring, with other settings."""
    run = write_run(tmp_path / "run")
    said = {"a": ("<think>so</think>7", True)}
    write_texts(run, {model: said for model in ("teacher", "base", "student")})
    change_json(run / "eval.json", lambda content: content["scores"].pop("student"))
    assert "What they wrote" not in page_of(run, out=tmp_path / "out")[1]


def test_a_run_without_texts_or_student_shows_neither(tmp_path, write_run):
    run = write_run(tmp_path / "run")
    (run / "generations.jsonl").write_text('{"model": "student"}\nnot a row\n')
    _, text = page_of(run, out=tmp_path / "out")
    assert "What they wrote" not in text and "Try it" not in text


def test_several_runs_have_a_row_and_a_curve_each(runs):
    html, text = page_of(runs["main"], runs["plain"], out=runs["out"])
    assert report([runs["main"], runs["plain"]], runs["out"]).headline == (
        "cot50 scores highest of 2 runs: its student solves 71.2\u00a0% of 500 problems."
    )
    assert "cot50 is better than cot50-ce: +9.0 points" in text
    overlay = html.partition("<h2>Training</h2>")[2].partition("</figure>")[0]
    for svg in re.findall(r"<svg.*?</svg>", overlay):
        assert [role for role, _, _ in Drawn(svg).lines] == ["run-1", "run-2"]
    folds = ["Copy as TOML", "All fields"]
    assert re.findall(r"<summary>([^<]*)<", html) == ["cot50", *folds, "cot50-ce", *folds]
    markdown = (runs["out"] / "report.md").read_text(encoding="utf-8")
    assert re.search(
        r"^\| cot50 \| 500 \| .* \| 4 min 12 s \| 412 MB \| 4.9 TFLOP \|", markdown, re.M
    )


def test_a_tie_has_no_winner(tmp_path, write_run):
    first, second = (
        write_run(tmp_path / "first", steps=20),
        write_run(tmp_path / "second", steps=20),
    )
    headline = report([first, second], tmp_path).headline
    assert headline.startswith(
        "first and second share the highest score of 2 runs: their students solve 71.2"
    )


def test_runs_are_grouped_by_task_and_the_best_of_each_is_named(tmp_path, write_run):
    scores = {"first": 300, "second": 356, "third": 200, "fourth": 200, "unscored": 1}
    made = [write_run(tmp_path / name, student=n, steps=20) for name, n in scores.items()]
    for run in made[2:]:
        change_json(run / "eval.json", lambda content: content.update(task="gsm8k:x"))
    (made[4] / "eval.json").unlink()
    (made[4] / "student").mkdir()
    write_json(made[4] / "student" / "config.json", {})
    html, text = page_of(*made, out=tmp_path)
    assert report(made, tmp_path).headline == (
        "5 runs on 2 tasks: on embedded:chain second scores highest, 71.2\u00a0% of 500 problems; "
        "on gsm8k:x third and fourth score highest, 40.0\u00a0% of 500 problems."
    )
    assert "second is better than first" in text and "third is" not in text
    titles = re.findall(r"<h2>([^<]*)<", html)
    assert titles[:3] == ["Scores on embedded:chain", "Scores on gsm8k:x", "Not scored"]
    chain, gsm8k, unscored = (html.partition(f"<h2>{title}")[2] for title in titles[:3])
    assert re.findall(
        r'<div class="who" role="cell"><b>([^<]*)', chain.partition("</section>")[0]
    ) == [
        "student before",
        "first",
        "second",
        "teacher",
    ]
    assert "third" in gsm8k.partition("</section>")[0]
    greyed = unscored.partition("</section>")[0]
    assert '<td class="faded" data-head="run">unscored' in greyed
    assert f"mlx-distill eval {made[4]}" in greyed
    assert html.count('<details class="faded"><summary>unscored') == 1
    assert "% of the teacher&#39;s accuracy" in html and "% of the teacher&#39;s lead" in html


def test_an_unscored_run_says_what_scores_it(tmp_path, write_run):
    run = write_run(tmp_path / "a run", steps=20)
    (run / "eval.json").unlink()
    command = f"mlx-distill run '{run}/recipe.toml'"  # it has no student yet
    assert command in page_of(run, out=tmp_path / "out")[1]
    (run / "student").mkdir()
    write_json(run / "student" / "config.json", {})
    command = f"mlx-distill eval '{run}'"
    assert command in page_of(run, out=tmp_path / "out")[1]
    assert f"    {command}" in (tmp_path / "out" / "report.md").read_text().splitlines()
    recipe = make_recipe("a run")
    unasked = with_values(recipe, eval={"task": ""})
    assert score_command(run, unasked) == f"{command} --set task=embedded:chain"
    other = with_values(unasked, data={"source": "x.jsonl"})
    assert score_command(run, other) == f"{command} --set task=jsonl:FILE"
    assert score_command(tmp_path, None) == ""
    assert "This scores it" not in page_of(write_run(tmp_path / "b", steps=20), out=tmp_path)[1]


def test_what_did_not_change_says_so(tmp_path, write_run):
    run = write_run(tmp_path / "run", steps=20)
    rows = [
        {"step": step, **{name: kl for name in ("kl", "kl_cot", "ce", "ce_cot")}, "tokens_cot": 1.0}
        for step, kl in ((0, 0.01912), (20, 0.01909))
    ]
    write_lines(run / "validation.jsonl", rows)
    change_json(run / "manifest.json", lambda manifest: manifest.update(exported_step=20))
    _, text = page_of(run, out=tmp_path / "out")
    assert "supervised segments: unchanged at 0.0191 nats per token." in text
    assert "chain of thought unchanged, 0.0191" in text and "0.0191 → 0.0191" not in text
    assert "0.0191 → 0.0191" not in (tmp_path / "out" / "report.md").read_text()
    (run / "eval.json").unlink()
    assert "KL to the teacher is unchanged at 0.0191 nats" in report([run], tmp_path / "o").headline
    other = write_run(tmp_path / "other", steps=20)
    assert "0.0191 unchanged" in page_of(run, other, out=tmp_path / "out")[1]


def test_what_is_supervised_stands_out_and_the_rest_is_faded(runs):
    html, _ = page_of(runs["main"], out=runs["out"])
    chart = html.partition("<b>KL to the teacher</b>")[2].partition("</figure>")[0]
    looks = re.findall(r'<li class="(\w+) (\w*)">', chart)
    assert looks == [("prompt", "faded"), ("cot", "bold"), ("answer", "faded"), ("accent", "faded")]
    for svg in re.findall(r"<svg.*?</svg>", chart):
        widths = dict(re.findall(r"stroke: var\(--(\w+)\)[^\"]*stroke-width: ([\d.]+)", svg))
        assert float(widths["prompt"]) < 2 < 2.5
        assert "stroke: var(--cot); stroke-width: 2.8" in svg
    tokens = html.partition("<h2>Data</h2>")[2].partition("</section>")[0]
    assert re.findall(r'class="(\w+)" data-head="tokens"', tokens) == [
        "faded",
        "strong",
        "faded",
        "sum",
    ]


@pytest.mark.parametrize("teacher", [True, False])
def test_an_unsupervised_segment_that_got_worse_has_a_line(tmp_path, write_run, teacher):
    run = write_run(tmp_path / "run", steps=100)
    name = "kl" if teacher else "ce"
    measured = {0: (1.0, 2.0, 0.1), 50: (1.5, 1.0, 0.2), 100: (9.0, 9.0, 9.0)}
    rows = [
        {
            "step": step,
            **dict(zip((f"{name}_prompt", f"{name}_cot", f"{name}_answer"), row, strict=True)),
        }
        for step, row in measured.items()
    ]
    write_lines(run / "validation.jsonl", rows)
    _, text = page_of(run, out=tmp_path / "out")
    what = "KL to the teacher" if teacher else "cross-entropy"
    assert (
        f"Not supervised, and worse than before training: the prompt ({what} from 1.00 to 1.50 nats "
        f"per token), the answer ({what} from 0.100 to 0.200 nats per token)." in text
    )
    rows[1] |= {f"{name}_prompt": 1.0, f"{name}_answer": 0.10001}
    write_lines(run / "validation.jsonl", rows)
    assert "Not supervised" not in page_of(run, out=tmp_path / "out")[1]


@pytest.mark.parametrize("recipe", ["made", "recipes/cot50.toml", "tiny"])
def test_changed_fields_come_first_and_can_be_copied_as_a_recipe(
    runs, tmp_path, recipe, tiny_recipe
):
    if recipe == "made":
        page, text = page_of(runs["main"], out=runs["out"])
        section = page.partition("<h2>Recipe")[2]
        first, copied, every = re.split("<details>", section)[:3]
        assert "fraction</dt><dd>0.5" in first and "longest_tokens" not in first + copied
        assert "longest_tokens" in every and "fraction = 0.5" in copied
        text = unescape(
            copied.partition('<pre class="card text" tabindex="0">')[2].partition("</pre>")[0]
        )
        whole = make_recipe("cot50", compare=(str(runs["plain"]),))
    else:
        whole = load_recipe(tiny_recipe if recipe == "tiny" else RECIPES / "cot50.toml")
        text = toml(whole)
    (tmp_path / "copied.toml").write_text(text, encoding="utf-8")
    copied = load_recipe(tmp_path / "copied.toml")
    assert copied == whole and copied.digest() == whole.digest()
    assert len(text) < len(whole.toml()) / 2


def test_recipes_are_told_apart_by_method_alone():
    one, same = make_recipe("one"), make_recipe("two", compare=("x",))
    other = make_recipe("two", kd_weight=0.0, fraction=0.25)
    assert method_of(same, one) == "same recipe"
    assert method_of(other, one) == "same recipe with fraction = 0.25, kd_weight = 0.0"
    assert method_of(None, one) == "its recipe is not known"


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(
        NotFound, match=r"no run in .*empty: it holds neither recipe.toml nor manifest.json"
    ):
        (tmp_path / "empty").mkdir()
        report([tmp_path / "empty"], tmp_path)
    with pytest.raises(NotFound, match=r"no run in .*absent: it does not exist"):
        report([tmp_path / "absent"], tmp_path)
    with pytest.raises(NotFound, match="no run to report on"):
        report([], tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, write_run):
    run = write_run(tmp_path / "run", steps=20)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError,
        match=r"file/x: cannot be written \(Not a directory\); a file stands where a folder is needed",
    ):
        report([run], tmp_path / "file" / "x")


def test_numbers_in_words():
    spans = [duration(seconds) for seconds in (0.04, 59.4, 252.4, 3600, 7300)]
    assert spans == ["0.0 s", "59 s", "4 min 12 s", "1 h 00 min", "2 h 01 min"]
    assert [amount(value, "B") for value in (0, 999, 61_400_000, 999_700_000)] == [
        "0 B",
        "999 B",
        "61.4 MB",
        "1 GB",
    ]
    assert [points(share) for share in (0.054, -0.0004, 0.0, -0.262)] == [
        "+5.4",
        "0.0",
        "0.0",
        "−26.2",
    ]


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_report_of_somebody_else_is_not_overwritten(runs, tmp_path, name):
    mine = tmp_path / "notes" / name
    mine.parent.mkdir()
    mine.write_text("<title>mine</title>")
    with pytest.raises(
        RunError, match=rf"{name} is there, and mlx-distill did not write it: move it away"
    ):
        report([runs["main"]], mine.parent)
    assert [path.name for path in mine.parent.iterdir()] == [
        name
    ] and mine.read_text() == "<title>mine</title>"
    mine.unlink()
    report([runs["main"]], mine.parent)
    (mine.parent / "report.md").write_text("# an ancient page")
    report([runs["plain"]], mine.parent)
    assert TITLE_END in (mine.parent / "report.html").read_text()
    assert "ancient" not in (mine.parent / "report.md").read_text()
