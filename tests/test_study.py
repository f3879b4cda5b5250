"""What the runs of a sweep say together: intervals cover what they say they cover, and conditions
are ranked by hand-made rows.
"""

import dataclasses
import math

import numpy as np
import pytest

from mlx_distill.errors import DataError, NotFound
from mlx_distill.reporting import study
from mlx_distill.reporting.condition_words import in_words
from mlx_distill.reporting.study import (
    Condition,
    Row,
    best_within,
    conditions,
    difference,
    pareto_front,
    read_rows,
    rows_text,
    worth_training,
)
from mlx_distill.scoring.intervals import crossed_mean, crossed_variance, interval


def make_row(seed=0, right=(1.0, 0.0), settings=None, label="", **numbers):
    return Row(
        f"{label}{settings}-{seed}",
        "student",
        label,
        settings or {},
        seed,
        accuracy=float(np.mean(right)),
        right=tuple(right),
        problems="p",
        **numbers,
    )


def make_condition(right, label="c", flops=1.0):
    """A condition of shares [S, P], its seeds 0, 1, …"""
    return Condition(
        label,
        {},
        tuple(make_row(seed, row, label=label, flops=flops) for seed, row in enumerate(right)),
    )


def answers(random, seeds, problems, ability=0.3, seed_spread=0.3, problem_spread=1.5, hard=None):
    """Right answers [S, P], their chance a logistic function of the seed's ability less the
    problem's difficulty.
    """
    hard = random.normal(0, problem_spread, problems) if hard is None else hard
    able = ability + random.normal(0, seed_spread, (seeds, 1))
    return (random.random((seeds, problems)) < 1 / (1 + np.exp(hard - able))).astype(float)


# intervals


def test_the_variance_is_that_computed_by_hand():
    # rows are seeds; row means 3, 4, column means 2, 4, 4.5, mean 3.5
    x = np.array([[1.0, 4.0, 4.0], [3.0, 4.0, 5.0]])
    ms_seed, ms_problem, ms_error = (
        3 * 0.5,
        2 * (1.5**2 + 0.5**2 + 1.0**2) / 2,
        2 * (0.5**2 + 0.5**2) / 2,
    )
    variance, degrees = crossed_variance(x)
    assert variance == pytest.approx((ms_problem + ms_seed - ms_error) / 6)
    assert degrees == pytest.approx(
        (ms_problem + ms_seed - ms_error) ** 2 / (ms_problem**2 / 2 + ms_seed**2 + ms_error**2 / 2)
    )


def test_seeds_that_differ_less_than_chance_take_nothing_off():
    x = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    x[0] += x[1].mean() - x[0].mean()  # equal means: the seeds' mean square is 0
    variance, degrees = crossed_variance(x)
    assert variance == pytest.approx(np.var(x.mean(0), ddof=1) / 4) and degrees == pytest.approx(3)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1)])
def test_one_seed_or_one_problem_is_a_plain_mean(shape):
    x = np.arange(7.0).reshape(shape)
    assert crossed_variance(x) == (pytest.approx(np.var(np.arange(7), ddof=1) / 7), 6)
    assert crossed_variance(np.ones((1, 1)))[0] == 0


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_spread", [0.0, 0.2])
def test_the_crossed_interval_covers_the_truth(seeds, seed_spread):
    """Seeds whose accuracies spread by 4 points, or not at all. (Of 3 seeds that spread by 15
    points it covers 91 %.)
    """
    random = np.random.default_rng(seeds)
    truth = answers(random, 2000, 2000, seed_spread=seed_spread).mean()
    drawn = [crossed_mean(answers(random, seeds, 200, seed_spread=seed_spread)) for _ in range(400)]
    assert 0.92 <= np.mean([one.low <= truth <= one.high for one in drawn]) <= 0.99


def test_intervals_over_problems_alone_miss_it():
    """What the crossing is for: with seeds that differ, the interval of pooled answers is far too
    narrow.
    """
    random = np.random.default_rng(1)
    truth = answers(random, 2000, 2000, seed_spread=0.6).mean()
    drawn = [answers(random, 3, 200, seed_spread=0.6) for _ in range(300)]
    pooled = [interval([[share] for share in right.ravel()]) for right in drawn]
    assert np.mean([low <= truth <= high for low, high in pooled]) < 0.8
    assert np.mean([one.low <= truth <= one.high for one in map(crossed_mean, drawn)]) > 0.88


def test_one_seed_is_close_to_wilson():
    right = answers(np.random.default_rng(2), 1, 400)
    known = crossed_mean(right)
    assert (known.low, known.high) == pytest.approx(
        interval([[share] for share in right[0]]), abs=2e-3
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_right_keep_a_width(share):
    known = crossed_mean(np.full((3, 50), share))
    assert (
        known.mean == share and known.high - known.low > 0.05 and 0 <= known.low <= known.high <= 1
    )


def test_a_difference_is_paired():
    random = np.random.default_rng(3)
    hard, able = random.normal(0, 2.5, 300), random.normal(0, 0.5, (5, 1))
    luck = random.random((5, 300))
    a, b = (
        make_condition((luck < 1 / (1 + np.exp(hard - able - more))).astype(float))
        for more in (0.5, 0.2)
    )
    paired = difference(a, b)
    unpaired = math.hypot(*(half.high - half.low for half in (a.accuracy, b.accuracy)))
    assert paired.mean == pytest.approx(a.right.mean() - b.right.mean())
    assert paired.low <= paired.mean <= paired.high and paired.high - paired.low < 0.6 * unpaired
    assert difference(a, a).mean == 0 and difference(a, a).high > 0 > difference(a, a).low


def test_the_interval_of_a_difference_covers_it():
    random, covered = np.random.default_rng(4), []
    truth = answers(random, 2000, 2000, 0.8).mean() - answers(random, 2000, 2000, 0.3).mean()
    for _ in range(300):
        hard = random.normal(0, 1.5, 200)
        gap = difference(
            *(make_condition(answers(random, 3, 200, ability, hard=hard)) for ability in (0.8, 0.3))
        )
        covered.append(gap.low <= truth <= gap.high)
    assert 0.92 <= np.mean(covered) <= 1.0


def test_conditions_are_paired_over_the_seeds_that_both_have():
    right = answers(np.random.default_rng(5), 3, 60)
    a = make_condition(right)
    b = dataclasses.replace(make_condition(1 - right), rows=make_condition(1 - right).rows[1:])
    assert difference(a, b).mean == pytest.approx((right[1:] - (1 - right[1:])).mean())
    none = dataclasses.replace(b, rows=(dataclasses.replace(b.rows[0], seed=9),))
    assert (
        difference(a, none) is None
        and study.retention(a, none) is None
        and study.gain_retention(a, none, b) is None
    )


def test_the_interval_of_a_ratio_is_that_of_its_spread():
    random, drawn, widths = np.random.default_rng(6), [], []
    for _ in range(400):
        hard = random.normal(0, 1.5, 300)
        a, full = (
            make_condition(answers(random, 6, 300, ability, hard=hard)) for ability in (0.2, 0.9)
        )
        kept = study.retention(a, full)
        assert kept.mean == pytest.approx(a.right.mean() / full.right.mean())
        drawn.append(kept.mean)
        widths.append(kept.high - kept.low)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (
        0.9 < np.mean(widths) / (high - low) < 1.35
    )  # Student's t of a few seeds is wider than the normal quantile


def test_what_is_kept_of_a_gain():
    base, half, full = (make_condition([[1.0] * n + [0.0] * (20 - n)] * 2) for n in (4, 10, 16))
    assert study.gain_retention(half, full, base).mean == pytest.approx(0.5)
    assert study.retention(half, full).mean == pytest.approx(10 / 16)
    assert study.gain_retention(half, base, base) is None
    assert study.retention(half, make_condition(np.zeros((2, 20)))) is None


# conditions and rows


def test_runs_that_differ_in_the_seed_alone_are_one_condition():
    rows = [
        make_row(2, settings={"a.b": 1}),
        make_row(0, settings={"a.b": 1}),
        make_row(0, settings={"a.b": 1}, label="arm"),
        make_row(1, settings={"a.b": 2}),
        dataclasses.replace(make_row(1, settings={"a.b": 1}), status="out of memory", right=()),
    ]
    found = conditions(rows)
    assert [(one.label, one.settings, one.seeds) for one in found] == [
        ("", {"a.b": 1}, (0, 2)),
        ("arm", {"a.b": 1}, (0,)),
        ("", {"a.b": 2}, (1,)),
    ]
    assert conditions(rows, "base") == []


def test_runs_on_other_problems_are_refused():
    rows = [make_row(0), dataclasses.replace(make_row(1), problems="q")]
    with pytest.raises(DataError, match="scored on different problems"):
        conditions(rows)
    failed = dataclasses.replace(rows[1], status="stopped")
    assert len(conditions([rows[0], failed])) == 1


FRACTION = "truncation.fraction"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({FRACTION: 0.25, "objective.kd_weight": 0.5}, "a quarter of the tokens, with the teacher"),
        ({FRACTION: 1.0, "objective.kd_weight": 0.0}, "all tokens, without the teacher"),
        (
            {FRACTION: 0.37, "objective.kd_weight": 1},
            "37\u00a0% of the tokens, with the teacher alone",
        ),
        ({FRACTION: 0.5, "truncation.keep": "suffix"}, "the last half of the tokens"),
        ({FRACTION: 1, "truncation.keep": "middle"}, "all tokens"),
        ({FRACTION: 0.1, "truncation.span": "cot"}, "a tenth of the chain of thought"),
        ({"truncation.keep": "suffix"}, "keep suffix"),
        ({"objective.segments": ["cot", "answer"]}, "chain of thought + answer"),
        ({"objective.divergence": "reverse_kl"}, "reverse KL"),
        ({"data.train_examples": 4000, "optim.steps": 1}, "4,000 examples, 1 step"),
        ({"data.seed": 1, "eval.seed": 2, "run.fast": True}, "data.seed 1, eval.seed 2, fast on"),
        ({"truncation.whole_share": "x", "a.b_c": [1, 2]}, "x of the examples whole, b c 1 + 2"),
        ({"truncation.spread": 0.5}, "each cut at its own fraction, ± 50\u00a0%"),
        ({}, "as in the recipe"),
    ],
)
def test_a_condition_is_named_by_its_settings(settings, words):
    assert Condition("", settings, ()).name == words
    assert Condition("arm", settings, ()).name == "arm"


def test_conditions_that_differ_read_differently():
    """Over the fields that have words of their own, and values near each other."""
    fields = {
        FRACTION: [0.1, 0.101, 0.25, 1 / 3, 0.333, 0.5, 0.75, 0.999, 1.0, 1],
        "truncation.keep": ["prefix", "suffix", "middle", "cot"],
        "objective.kd_weight": [0.0, 0.001, 0.25, 0.5, 0.75, 1.0],
        "optim.learning_rate": [1e-5, 2e-5, 1.1e-5],
        "data.train_examples": [0, 1, 10, 11],
        "truncation.whole_share": [0.0, 0.1, 0.25],
        "truncation.spread": [0.0, 0.1, 0.25],
        "truncation.token_share": [1.0, 0.5],
        "objective.divergence": ["forward_kl", "reverse_kl", "new"],
    }
    for field, values in fields.items():
        said = {in_words({field: value}): value for value in values}
        assert len(said) == len(set(values)), (field, said)


def test_what_does_not_beat_the_base_is_not_worth_training():
    base = make_condition([[1.0] * 5 + [0.0] * 45], "base", 0)
    rows = {"worse": 3, "equal": 5, "a little": 7, "better": 30}
    found = [
        make_condition([[1.0] * right + [0.0] * (50 - right)] * 2, label, 1.0 + right)
        for label, right in rows.items()
    ]
    assert [one.label for one in worth_training(found, base)] == ["better"]
    assert worth_training(found, None) == found
    assert best_within(found, 1.0, base).label == "better"
    assert best_within(found, 0.5, base) is None and best_within(found, 0.5).label == "a little"


def test_the_front_is_what_no_cheaper_one_equals():
    def one(label, flops, right):
        return make_condition([[1.0] * right + [0.0] * (10 - right)], label, flops)

    found = [
        one("dear", 10, 8),
        one("cheap", 1, 3),
        one("beaten", 5, 4),
        one("good", 4, 6),
        one("tied", 6, 6),
        one("same cost", 4, 5),
    ]
    assert [each.label for each in pareto_front(found)] == ["cheap", "good", "dear"]
    best = {share: best_within(found, share) for share in (0.05, 0.1, 0.39, 0.4, 0.99, 1.0)}
    assert {share: each and each.label for share, each in best.items()} == {
        0.05: None,
        0.1: "cheap",
        0.39: "cheap",
        0.4: "good",
        0.99: "good",
        1.0: "dear",
    }


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        make_row(
            0,
            (1.0, 0.0, 1.0),
            {"objective.segments": ["cot", "answer"], "truncation.fraction": 0.1},
            'an arm, "quoted"',
            kl=0.123456789,
            flops=1.5e15,
            peak_bytes=2**40,
            steps=7,
        ),
        make_row(1, (0.25, 1.0, 0.0), backend="mlx"),
        make_row(2, (1.0,)),
        make_row(3, (0.5,)),
        dataclasses.replace(make_row(4), status='stopped:\nat step 3, "x"', right=(), accuracy=0.0),
    ]
    (tmp_path / "results.csv").write_text(rows_text(rows), encoding="utf-8")
    read = read_rows(tmp_path / "results.csv")
    assert [dataclasses.replace(row, kl=0.0) for row in read] == [
        dataclasses.replace(row, kl=0.0) for row in rows
    ]
    assert read[0].kl == 0.123456789 and math.isnan(read[1].kl)
    assert (tmp_path / "results.csv").read_text().splitlines()[1].endswith(",101")


@pytest.mark.parametrize("text", ["run,role\nx,student\n", "", "run\n"])
def test_a_file_of_another_version_is_refused(tmp_path, text):
    path = tmp_path / "results.csv"
    path.write_text(rows_text([make_row()]))
    path.write_text(
        text + path.read_text().partition("\n")[2]
        if text
        else path.read_text().replace("settings", "set", 1)
    )
    with pytest.raises(DataError, match="run the sweep again"):
        read_rows(path)
    with pytest.raises(NotFound, match="run the sweep first"):
        read_rows(tmp_path / "absent.csv")
