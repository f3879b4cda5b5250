"""The page of a sweep: its numbers are those of the study, what is missing is said, and the page
needs nothing else.
"""

import dataclasses
import re
from html import unescape

import numpy as np
import pytest
from drawn import Drawn

from mlx_distill.errors import DataError, RunError
from mlx_distill.reporting.condition_words import capital
from mlx_distill.reporting.drawing import drawings
from mlx_distill.reporting.study import (
    Row,
    best_within,
    conditions,
    difference,
    gain_retention,
    pareto_front,
    retention,
)
from mlx_distill.reporting.sweep_charts import (
    bars,
    cost_chart,
    curves,
    pareto_chart,
    quality_chart,
    x_axis,
)
from mlx_distill.reporting.sweep_findings import (
    Places,
    Swept,
    findings,
    undecided,
    wider_than_its_claim,
)
from mlx_distill.reporting.sweep_page import write_report
from mlx_distill.reporting.sweep_tables import best_path, budgets, costs, every_run, quality
from mlx_distill.reporting.sweep_words import headline
from mlx_distill.scoring.intervals import Estimate
from mlx_distill.sweeps.sweep import load_sweep
from mlx_distill.words import amount, percent, points

FRACTION, KD, SEGMENTS = "truncation.fraction", "objective.kd_weight", "objective.segments"
FRACTIONS = [0.1, 0.25, 0.5, 0.75, 1.0]
PASS = {"sequences": 2000, "tokens": 1_234_567, "bytes": 345_678_901, "runs": 21}


def make_rows(points, seeds=3, problems=120, shared=("base", "teacher")):
    """Rows of (label, settings, ability, cost): a problem is solved where ability and luck outweigh
    its difficulty.
    """
    random = np.random.default_rng(0)
    hard = random.normal(0, 1.2, problems)

    def row(run, role, label, settings, seed, ability, cost):
        right = tuple((ability + random.logistic(0, 0.5, problems) > hard).astype(float))
        return Row(
            run,
            role,
            label,
            settings,
            seed,
            accuracy=float(np.mean(right)),
            well_formed=0.97,
            mean_tokens=140.0,
            steps=500,
            tokens_read=int(2e6 * cost),
            loss_tokens=int(1e6 * cost),
            flops=5e12 * cost * (1 + seed / 100),
            train_seconds=250 * cost,
            peak_bytes=int(4e8 * (cost + 1) / 2) if cost else 0,
            kl=0.1 + seed / 50 if cost else float("nan"),
            problems="p",
            right=right,
        )

    students = [
        row(
            f"run {i}-{seed}",
            "student",
            label,
            settings,
            seed,
            ability + random.normal(0, 0.1),
            cost,
        )
        for i, (label, settings, ability, cost) in enumerate(points)
        for seed in range(seeds)
    ]
    return students + [
        row(role, role, "", {}, 0, ability, 0)
        for role, ability in (("base", -1.5), ("teacher", 3.0))
        if role in shared
    ]


def students_of(rows):
    """How many runs there are to be, when none is missing."""
    return sum(row.role == "student" for row in rows)


def make_grid(**more):
    grid = [
        ("", {FRACTION: f, KD: kd}, -0.8 + 2.2 * f**0.3 + 0.3 * kd, f * (1 + 0.2 * kd))
        for f in FRACTIONS
        for kd in (0.5, 0.0)
    ]
    arms = [("token-matched", {FRACTION: f, KD: 0.5}, 1.0 + f / 2, 1.05) for f in (0.25, 0.5)]
    arms.append(
        (
            "last half, context dropped",
            {FRACTION: 0.5, KD: 0.5, "truncation.keep": "suffix"},
            0.2,
            0.55,
        )
    )
    axes, rows = {FRACTION: FRACTIONS, KD: [0.5, 0.0]}, make_rows(grid + arms, **more)
    return Swept(
        "fraction",
        "How much must be read?",
        axes,
        ("", {FRACTION: 1.0, KD: 0.5}),
        rows,
        students_of(rows),
        PASS,
    )


def make_arms():
    arms = [("short", {}, 0.0, 0.6), ("long", {}, 1.0, 0.8), ("mixed", {}, 0.9, 1)]
    rows = make_rows(arms)
    return Swept("sources", "", {}, None, rows, students_of(rows), {})


def make_segments():
    axis = [["cot"], ["answer"], ["cot", "answer"]]
    grid = [
        ("", {SEGMENTS: value}, ability, 1.0)
        for value, ability in zip(axis, (0.8, -0.5, 0.9), strict=True)
    ]
    rows = make_rows(grid)
    return Swept(
        "segments",
        "",
        {SEGMENTS: axis},
        ("", {SEGMENTS: ("cot", "answer")}),
        rows,
        students_of(rows),
        {},
    )


def without(swept, *roles):
    return dataclasses.replace(swept, rows=[row for row in swept.rows if row.role not in roles])


def fail(swept, *runs, line="OutOfMemory: step 12 does not fit; lower micro_batch_size"):
    """The sweep with these runs failed: no result, and the line that says why."""
    empty = {
        "accuracy": 0.0,
        "flops": 0.0,
        "right": (),
        "problems": "",
        "tokens_read": 0,
        "peak_bytes": 0,
    }
    rows = [
        dataclasses.replace(row, status=line, **empty) if row.run in runs else row
        for row in swept.rows
    ]
    return dataclasses.replace(swept, rows=rows)


def page_of(swept, out):
    """The page, its text as a reader sees it, and the Markdown."""
    path = write_report(swept, out)
    assert path == out / "report.html"
    html = path.read_text(encoding="utf-8")
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return (
        html,
        " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split()),
        (out / "report.md").read_text(encoding="utf-8"),
    )


def said(text):
    """As the page's text has it: one blank for any."""
    return " ".join(text.split())


def test_the_numbers_on_the_page_are_those_of_the_study(tmp_path):
    swept = make_grid()
    _, text, markdown = page_of(swept, tmp_path)
    students, (base,) = conditions(swept.rows), conditions(swept.rows, "base")
    full = students[8]
    assert full.settings == {FRACTION: 1.0, KD: 0.5}
    for one in students:
        if one is full:
            continue
        gap, kept, gain = (
            difference(one, full),
            retention(one, full),
            gain_retention(one, full, base),
        )
        open_ = "too few seeds to tell"
        bounds = f"{points(gap.low)} to {points(gap.high)}"
        numbers = [
            percent(one.accuracy.mean),
            f"{percent(one.accuracy.low)} to {percent(one.accuracy.high)}",
            f"{open_} {points(gap.mean)}, {bounds}"
            if undecided(gap)
            else f"{points(gap.mean)} {bounds}",
            *(
                part
                for share in (kept, gain)
                for part in (percent(share.mean), f"{percent(share.low)} to {percent(share.high)}")
            ),
        ]
        assert said(" ".join(["3", *numbers, "97.0 %", "0.120"])) in text, one.name
        cost = [
            amount(one.cost("tokens_read")),
            amount(one.cost("flops"), "FLOP"),
            f"{100 * one.cost('flops') / full.cost('flops'):.0f} %",
        ]
        if one.cost("flops") > 0.1 * full.cost("flops"):
            assert said(" ".join(cost)) in text, one.name
    row = next(
        line
        for line in markdown.splitlines()
        if line.startswith("| Half of the tokens, without the teacher |")
    )
    assert (
        said(f"{percent(students[5].accuracy.mean)} ({percent(students[5].accuracy.low)} to") in row
    )
    assert f"student before – {said(percent(base.accuracy.mean))}" in text
    kept = (
        "21 runs read the teacher's answers from a cache of 2,000 sequences, 1.23 M tokens, 346 MB."
    )
    assert said(kept) in text
    assert "13 conditions, 39 runs, 3 seeds" in text


def test_the_headline_is_the_cheapest_that_keeps_most():
    swept = make_grid()
    students = conditions(swept.rows)
    full = students[8]
    cheap = next(one for one in pareto_front(students) if retention(one, full).mean >= 0.9)
    assert cheap.cost("flops") < 0.9 * full.cost("flops")
    kept = retention(cheap, full)
    assert headline(findings(swept)) == (
        f"{capital(cheap.name)}, keeps {percent(kept.mean)} of the accuracy of all tokens, with "
        "the teacher "
        f"(95\u00a0% interval {percent(kept.low)} to {percent(kept.high)}) at "
        f"{100 * cheap.cost('flops') / full.cost('flops'):.0f}\u00a0% of its arithmetic."
    )


def test_without_a_saving_the_headline_compares_the_best_two():
    swept = make_segments()
    best, second = sorted(conditions(swept.rows), key=lambda one: -one.accuracy.mean)[:2]
    gap, said_first = difference(best, second), headline(findings(swept))
    assert best.name in said_first.lower() and second.name in said_first.lower()
    assert (
        f" {points(gap.mean)} points, 95\u00a0% interval {points(gap.low)} to "
        f"{points(gap.high)}" in said_first
    )
    assert said_first.startswith("Too few seeds to tell which is better, ")
    assert gap.low <= 0 < gap.high and gap.high - gap.low > 0.05
    one = make_arms()
    one = dataclasses.replace(one, rows=one.rows[:3])
    assert re.fullmatch(
        r"Short solves \d.* of 120 problems \(95\u00a0% interval .*\)\.", headline(findings(one))
    )


def test_every_other_member_of_the_front_has_a_sentence(tmp_path):
    swept = make_grid()
    _, text, markdown = page_of(swept, tmp_path)
    found = findings(swept)
    front = [one for one in pareto_front(found.students) if one is not found.full]
    assert len(front) > 2
    for one in front:
        name = capital(found.name(one))
        assert f"{name}, keeps {said(percent(retention(one, found.full).mean))}" in text
        assert f"keeps {said(percent(retention(one, found.full).mean))}" in said(markdown)


def test_full_is_what_the_sweep_says_or_the_dearest():
    swept = make_grid()
    assert findings(swept).full.settings == {FRACTION: 1.0, KD: 0.5}
    assert findings(
        dataclasses.replace(swept, full=("", {KD: 0.0, FRACTION: 0.5}))
    ).full.settings == {FRACTION: 0.5, KD: 0.0}
    arm = ("last half, context dropped", {FRACTION: 0.5, KD: 0.5, "truncation.keep": "suffix"})
    assert findings(dataclasses.replace(swept, full=arm)).full.label == "last half, context dropped"
    assert findings(dataclasses.replace(swept, full=None)).full.settings == {FRACTION: 1.0, KD: 0.5}
    assert findings(make_arms()).full.label == "mixed"
    assert findings(make_segments()).full.settings == {SEGMENTS: ["cot", "answer"]}


def test_a_full_condition_that_is_missing_is_said(tmp_path):
    _, text, _ = page_of(
        dataclasses.replace(make_grid(), full=("", {FRACTION: 0.9, KD: 0.5})), tmp_path
    )
    assert (
        "No run of 90 % of the tokens, with the teacher has finished, so nothing is compared with it."
        in text
    )


def test_the_dearest_of_the_grid_is_full_where_none_is_named():
    grid = make_grid()
    dear = [
        dataclasses.replace(row, flops=9e12) if row.label == "token-matched" else row
        for row in grid.rows
    ]
    assert findings(dataclasses.replace(grid, rows=dear, full=None)).full.settings == {
        FRACTION: 1.0,
        KD: 0.5,
    }


def test_an_unknown_cost_is_neither_free_nor_on_the_front(tmp_path):
    """A model whose arithmetic cannot be counted has 0: it buys nothing, and nothing is divided by
    it.
    """
    swept = make_arms()
    for unknown in ({"mixed"}, {"short", "long", "mixed"}):
        rows = [
            dataclasses.replace(row, flops=0.0) if row.label in unknown else row
            for row in swept.rows
        ]
        for full in (None, ("mixed", {}), ("long", {})):
            _, text, _ = page_of(dataclasses.replace(swept, rows=rows, full=full), tmp_path)
            assert "at 0.0 % of its arithmetic" not in text and "mixed keeps" not in text
        found = findings(dataclasses.replace(swept, rows=rows))
        assert not {found.name(one) for one in pareto_front(found.students)} & unknown


def test_runs_that_are_to_come_are_said(tmp_path):
    swept = make_segments()
    _, text, markdown = page_of(dataclasses.replace(swept, planned=swept.planned + 4), tmp_path)
    sentence = f"4 of {swept.planned + 4} runs are still to come: this page describes the others."
    assert sentence in text and sentence in markdown
    assert "still to come" not in page_of(swept, tmp_path)[1]


def test_the_matched_arm_of_a_sweep_file_is_drawn(tmp_path):
    """Its settings are those that a sweep gives it, not made up here."""
    (tmp_path / "base.toml").write_text(
        '[teacher]\nmodel = "t"\n[student]\nmodel = "s"\n'
        '[data]\nsource = "x"\ntrain_examples = 40\n[eval]\ntask = "jsonl:x"\n'
    )
    (tmp_path / "s.toml").write_text(
        'recipe = "base.toml"\ntoken_matched = [0.5]\n[axes]\ntruncation.fraction = [0.5, '
        "1.0]\nobjective.kd_weight = [0.5, 0.0]\n"
    )
    sweep = load_sweep(tmp_path / "s.toml")
    rows = make_rows([(point.label, point.settings, 0.5, 1.0) for point in sweep.points])
    drawn = curves(findings(Swept("s", "", sweep.axes, None, rows, students_of(rows), {})))
    assert [label for label, _ in drawn] == [
        "with the teacher",
        "without the teacher",
        "token-matched, with the teacher",
    ]


def test_curves_are_the_grid_and_the_matched_arms():
    found = findings(make_grid())
    assert x_axis(found.swept) == FRACTION
    drawn = [
        (label, [one.settings[FRACTION] for one in members]) for label, members in curves(found)
    ]
    assert drawn == [
        ("with the teacher", FRACTIONS),
        ("without the teacher", FRACTIONS),
        ("token-matched, with the teacher", [0.25, 0.5]),
    ]
    chart = quality_chart(found)
    for svg in drawings(chart):
        assert [text for _, text in Drawn(svg).x_ticks] == ["0.1", "0.25", "0.5", "0.75", "1"]
    assert chart.x_label == "fraction"
    for one, length in zip(chart.series, (5, 5, 2), strict=True):
        assert (len(one.known), len(one.low), len(one.high), len(one.dots)) == (
            length,
            length,
            length,
            3 * length,
        )
    assert [one.label for one in chart.levels] == ["student before", "teacher"]


def test_points_and_bands_lie_where_the_study_says():
    found = findings(make_grid(seeds=5))
    chart, (_, members) = quality_chart(found), curves(found)[0]
    assert chart.unit == "share of problems, 95\u00a0% band, one dot a run"
    bounds = [one.accuracy.low for one in members] + [
        one.accuracy.high for one in reversed(members)
    ]
    for svg in drawings(chart):
        drawn = Drawn(svg)
        points, band = (
            next(one[-1] for one in shapes if one[0] == "run-1")
            for shapes in (drawn.lines, drawn.bands)
        )
        for (x, y), one in zip(drawn.points(points), members, strict=True):
            assert (x, y) == pytest.approx((one.settings[FRACTION], one.accuracy.mean), abs=2e-3)
        assert [y for _, y in drawn.points(band)] == pytest.approx(bounds, abs=2e-3)


def test_below_five_seeds_there_are_error_bars_and_no_band():
    found = findings(make_grid(seeds=4))
    chart, (_, members) = quality_chart(found), curves(found)[0]
    assert chart.unit == "share of problems, 95\u00a0% bars, one dot a run"
    for svg in drawings(chart):
        drawn = Drawn(svg)
        assert not drawn.bands
        lines = [points for role, _, points in drawn.lines if role == "run-1"]
        for one, bar in zip(members, lines, strict=False):  # the curve is drawn after its bars
            low, high = one.accuracy.low, one.accuracy.high
            assert [y for _, y in drawn.points(bar)] == pytest.approx([low, high], abs=2e-3)
        assert len(lines) == len(members) + 1


def test_the_student_before_and_the_teacher_are_in_every_chart_of_accuracy():
    found = findings(make_grid())
    wanted = {"base": found.base.accuracy.mean, "teacher": found.teacher.accuracy.mean}
    for chart in (quality_chart(found), pareto_chart(found)):
        assert {level.role: level.y for level in chart.levels} == wanted
        assert [(key.label, key.last) for key in chart.key][-2:] == [
            ("student before", percent(wanted["base"])),
            ("teacher", percent(wanted["teacher"])),
        ]
        for drawn in map(Drawn, drawings(chart)):
            across = {role: points[0][1] for role, dashed, points in drawn.lines if dashed}
            assert {role: drawn.y(pixel) for role, pixel in across.items()} == pytest.approx(
                wanted, abs=3e-3
            )
    assert {bar.role for bar in bars(findings(make_arms()))} >= {"base", "teacher"}


def make_worse(ability=-2.0, seeds=5):
    grid = [("", {FRACTION: f, KD: 0.5}, ability + f / 10, f) for f in FRACTIONS]
    rows = make_rows(grid, seeds=seeds)
    return Swept("s", "", {FRACTION: FRACTIONS}, None, rows, students_of(rows), {})


def test_where_nothing_beats_the_student_before_that_comes_first(tmp_path):
    worse = findings(make_worse(-2.6))
    solved = percent(worse.base.accuracy.mean)
    first = f"Nothing beats the student before training, which solves {solved}: the best of 5 "
    assert headline(worse).startswith(first)
    unclear = findings(make_worse(-1.3, seeds=2))
    assert max(one.accuracy.mean for one in unclear.students) > unclear.base.accuracy.mean
    asked = "Too few seeds to tell whether anything beats the student before training, which solves"
    assert headline(unclear).startswith(asked)
    for found in (worse, unclear):
        _, text, markdown = page_of(found.swept, tmp_path)
        assert budgets(found).rows == [] and "best/budget" not in text + markdown
        for said_so in ("No best recipe is written", said(headline(found))):
            assert said_so in text and said_so in said(markdown).replace("\\", "")
    better = findings(make_worse(1.0))
    assert "Nothing beats" not in headline(better) and budgets(better).rows
    unknown = findings(without(make_worse(-2.6), "base"))
    assert "student before" not in headline(unknown) and budgets(unknown).rows


def test_an_interval_wider_than_its_claim_says_so(tmp_path):
    found = findings(make_worse(-2.0, seeds=2))
    for one, row in zip(found.students, quality(found).rows[2:], strict=True):
        if one is found.full:
            continue
        share, gap = retention(one, found.full), difference(one, found.full)
        assert share.high - share.low > abs(share.mean) and gap.low < 0 < gap.high
        assert row[3].text == row[4].text == "too few seeds to tell"
        assert row[4].small.startswith(percent(share.mean))
    sure = findings(make_grid(seeds=5))
    row = next(
        r for r in quality(sure).rows if r[0].text == "A tenth of the tokens, with the teacher"
    )
    assert "too few" not in row[3].text + row[4].text
    tight = Estimate(0.0, -0.02, 0.02)
    assert not undecided(tight) and not wider_than_its_claim(tight)
    assert undecided(Estimate(0.05, -0.05, 0.15)) and wider_than_its_claim(Estimate(0.9, 0.2, 1.6))
    assert not undecided(Estimate(0.05, 0.01, 0.09))


def test_equal_budgets_are_one_row():
    rows = budgets(findings(make_arms())).rows
    assert [row[0].text for row in rows] == ["10\u00a0% to 50\u00a0%", "75\u00a0%", "100\u00a0%"]
    assert [row[4].text for row in rows] == ["–", "best/budget-0.75.toml", "best/budget-1.00.toml"]
    swept = make_arms()
    alone = dataclasses.replace(swept, rows=[r for r in swept.rows if r.label in ("short", "")])
    assert [row[0].text for row in budgets(findings(alone)).rows][-1] == "100\u00a0%"


def test_a_page_leads_to_its_rows_recipes_and_runs(tmp_path):
    swept = make_arms()
    where = Places("runs/a%20b/report.html", "recipes/x.toml", "logs/x.log")
    run = next(row.run for row in swept.rows if row.label == "long")
    linked = dataclasses.replace(swept, places={run: where}, results="results.csv")
    html, _, markdown = page_of(linked, tmp_path)
    for address in (where.page, where.recipe, where.log, "results.csv", "best/budget-1.00.toml"):
        assert f'href="{address}"' in html and f"]({address})" in markdown
    assert "href" not in page_of(swept, tmp_path)[0]  # nothing is known to be there
    assert len(every_run(findings(linked)).rows) == 1


def test_costs_are_shares_of_those_at_the_largest_x():
    chart = cost_chart(findings(make_grid()))
    assert {key.label: (key.first, key.last) for key in chart.key} == {
        "arithmetic": ("10.0\u00a0%", "100.0\u00a0%"),
        "time": ("10.0\u00a0%", "100.0\u00a0%"),
        "peak memory": ("52.9\u00a0%", "100.0\u00a0%"),
    }
    assert chart.unit == "share of that at all tokens"
    assert cost_chart(findings(make_segments())) is None


def test_without_numbers_on_an_axis_there_are_bars(tmp_path):
    found = findings(make_segments())
    assert x_axis(found.swept) is None and quality_chart(found) is None
    assert [bar.label for bar in bars(found)] == [
        "student before",
        "chain of thought",
        "answer",
        "chain of thought + answer",
        "teacher",
    ]
    html, text, _ = page_of(make_segments(), tmp_path)
    for one, bar in zip(found.students, bars(found)[1:-1], strict=True):
        assert (bar.mean, bar.low, bar.high) == dataclasses.astuple(one.accuracy)
        assert f"width:{100 * bar.mean:.3f}%" in html and bar.dots == tuple(
            row.accuracy for row in one.rows
        )
    assert html.count('class="one"') == 9 and "Chain of thought + answer full" in text
    assert bars(findings(make_grid())) == []
    assert [bar.label for bar in bars(findings(make_arms()))] == [
        "student before",
        "short",
        "long",
        "mixed",
        "teacher",
    ]


def test_the_front_is_joined_and_every_condition_numbered(tmp_path):
    swept = make_grid()
    chart, front = pareto_chart(findings(swept)), pareto_front(conditions(swept.rows))
    assert [number for number, *_ in chart.numbered] == list(range(1, 14))
    assert [point.x for point in chart.points] == sorted(
        one.cost("flops") for one in conditions(swept.rows)
    )
    assert [label for _, label, _, joined in chart.numbered if joined] == [
        findings(swept).name(one) for one in front
    ]
    for svg in drawings(chart):
        assert [len(points) for role, _, points in Drawn(svg).lines if role == "soft"] == [
            len(front)
        ]
    assert page_of(swept, tmp_path)[0].count('<li class="joined">') == len(front)


def test_numbers_of_points_do_not_lie_on_each_other():
    for svg in drawings(pareto_chart(findings(make_grid()))):
        numbers = Drawn(svg).numbers
        assert [text for _, _, text in numbers] == [str(i) for i in range(1, 14)]
        middles = [(x, y) for x, y, _ in numbers]
        assert all(
            abs(a - c) >= 13 or abs(b - d) >= 11
            for i, (a, b) in enumerate(middles)
            for c, d in middles[:i]
        )


def test_the_best_for_each_budget(tmp_path):
    swept = make_grid()
    found, (_, text, markdown) = findings(swept), page_of(swept, tmp_path)
    for share in (0.25, 0.5, 0.75, 1.0):
        best = best_within(found.students, share)
        dearest = max(one.cost("flops") for one in found.students)
        assert (
            said(f"{share:.0%} {capital(best.name)} {percent(best.accuracy.mean)}").replace(
                f"{share:.0%}", f"{100 * share:.0f} %"
            )
            in text
        )
        assert f"{100 * best.cost('flops') / dearest:.0f} % best/budget-{share:.2f}.toml" in text
        assert best_path(share) in markdown
    assert "10 % to 75 % no condition costs this little" in page_of(make_segments(), tmp_path)[1]


def test_conditions_that_share_a_label_are_told_apart():
    names = findings(make_grid()).names
    assert names[-3:] == [
        "token-matched, a quarter of the tokens, with the teacher",
        "token-matched, half of the tokens, with the teacher",
        "last half, context dropped",
    ]
    assert len(set(names)) == len(names)


def test_failed_runs_and_missing_seeds_are_said(tmp_path):
    swept = fail(make_grid(), "run 0-1", "run 9-0", "run 9-1", "run 9-2")
    _, text, markdown = page_of(swept, tmp_path)
    assert "4 runs did not finish" in text and "Failed runs" in text
    assert (
        "A tenth of the tokens, with the teacher, seed 1 run 0-1 OutOfMemory: step 12 does not fit; lower "
        "micro_batch_size" in text
    )
    assert text.count("2 of 3") == 1 and "A tenth of the tokens, with the teacher 2 of 3 " in text
    assert len(findings(swept).students) == 12
    assert "| All tokens, without the teacher, seed 2 (run 9-2) | OutOfMemory" in markdown


def test_no_finished_run_is_a_page_that_says_so(tmp_path):
    swept = make_grid()
    swept = without(fail(swept, *(row.run for row in swept.rows)), "base", "teacher")
    html, text, markdown = page_of(swept, tmp_path)
    assert (
        headline(findings(swept)) == "fraction: none of 39 runs finished."
        and headline(findings(swept)) in text
        and headline(findings(swept)) in markdown
    )
    assert "<svg" not in html and "%" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    _, text, _ = page_of(dataclasses.replace(swept, rows=[]), tmp_path)
    assert "fraction: there is no run yet." in text


def test_one_seed_says_what_it_cannot_know(tmp_path):
    _, text, markdown = page_of(make_grid(seeds=1), tmp_path)
    for words in (
        "One seed each: the intervals cover other problems only, not another seed.",
        "one seed cannot tell",
    ):
        assert words in text and words in said(markdown)
    assert "seeds and problems are crossed" not in text
    assert not any(one.dots for one in quality_chart(findings(make_grid(seeds=1))).series)
    assert "seeds and problems are crossed" in page_of(make_grid(), tmp_path)[1]


def test_without_a_base_nothing_is_said_of_gains(tmp_path):
    swept = without(make_grid(), "base", "teacher")
    _, text, _ = page_of(swept, tmp_path)
    assert "student before" not in text and "The kept gain" not in text
    assert all(row[5].text == "–" for row in quality(findings(swept)).rows)
    assert all(
        row[4].text != "–" for row in quality(findings(swept)).rows if row[0].small != "full"
    )


def test_a_base_that_answered_other_problems_is_left_out(tmp_path):
    swept = make_grid()
    rows = [
        dataclasses.replace(row, problems="q", right=row.right[:7]) if row.role == "base" else row
        for row in swept.rows
    ]
    assert "student before" not in page_of(dataclasses.replace(swept, rows=rows), tmp_path)[1]
    mixed = [
        dataclasses.replace(row, problems="q") if row.run == "run 0-0" else row
        for row in swept.rows
    ]
    with pytest.raises(DataError, match="different problems"):
        write_report(dataclasses.replace(swept, rows=mixed), tmp_path)


def test_what_was_not_measured_is_a_dash(tmp_path):
    swept = make_grid()
    rows = [
        dataclasses.replace(row, peak_bytes=0, flops=0.0, kl=float("nan")) for row in swept.rows
    ]
    bare = dataclasses.replace(swept, rows=rows, teacher_pass={})
    _, text, _ = page_of(bare, tmp_path)
    assert {(row[2].text, row[3].text, row[5].text) for row in costs(findings(bare)).rows} == {
        ("–", "–", "–")
    }
    assert (
        pareto_chart(findings(bare)) is None
        and "Best condition" not in text
        and "nan" not in text
        and "One pass" not in text
    )
    assert [key.label for key in cost_chart(findings(bare)).key] == ["time"]


def test_text_of_the_sweep_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>\"><b> | x"
    swept = make_arms()
    rows = [
        dataclasses.replace(row, label=evil if row.label == "long" else row.label, settings={})
        for row in swept.rows
    ]
    rows[0] = dataclasses.replace(rows[0], run=evil, status=evil, right=())
    html, text, markdown = page_of(
        dataclasses.replace(swept, name=evil, question=evil, rows=rows), tmp_path
    )
    assert "<script" not in html and "<script" not in markdown and "<b> |" not in html
    assert text.count(evil) >= 6
    widths = {
        line.count("|") - line.count("\\|")
        for line in markdown.partition("## Quality")[2].partition("##")[0].splitlines()
        if line
    }
    assert len(widths) == 1


def test_the_page_needs_nothing_but_itself(tmp_path):
    html, _, _ = page_of(make_grid(), tmp_path)
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b", html)
    assert not re.search(r"(?:src|href|action)\s*=|url\(|@import|https?:", html)


@pytest.mark.parametrize(
    "values", [[32, 64, 4096], [1e-5, 1e-4, 1e-3], [0.5, 0.5], [True, False], [-1.0, 1.0]]
)
def test_any_axis_makes_a_page(tmp_path, values):
    rows = make_rows(
        [("", {"a.b": value}, i / 2, i + 1) for i, value in enumerate(dict.fromkeys(values))]
    )
    page_of(Swept("any", "", {"a.b": values}, None, rows, students_of(rows), {}), tmp_path)
    chart = quality_chart(
        findings(Swept("any", "", {"a.b": values}, None, rows, students_of(rows), {}))
    )
    assert (chart is None) == (values in ([0.5, 0.5], [True, False]))
    if chart:
        for drawn in map(Drawn, drawings(chart)):
            assert (
                all(44 <= x <= drawn.width - 10 for x, _ in drawn.x_ticks)
                and len(drawn.x_ticks) > 1
            )


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r".*file/x: cannot be written .*move it away"):
        write_report(make_segments(), tmp_path / "file" / "x")
