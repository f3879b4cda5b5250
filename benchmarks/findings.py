"""The small-scale reproduction of the paper: kept rows of three sweeps → its page, its figure and
the README's section.

    python benchmarks/findings.py keep runs/reproduction    copy each sweep's results.csv to
    reproduction/ python benchmarks/findings.py write                     tables, figure and
    sentences from the kept rows

What the paper says is quoted; every number beside it, and whether it agrees, is computed from the
rows.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.tables import rewrite_section  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.reporting.study import (  # noqa: E402
    Condition,
    Row,
    conditions,
    difference,
    gain_retention,
    read_rows,
    retention,
)
from mlx_distill.scoring.intervals import Estimate  # noqa: E402
from mlx_distill.words import amount, duration, percent, points  # noqa: E402

KEPT = HERE / "reproduction"
SWEEPS = ("segments", "fraction", "position")
TITLE = HERE.parent / "README.md"
COT, WITHOUT = (
    ("cot", "cot + answer", "prompt + cot", "prompt + cot + answer"),
    ("answer", "prompt + answer"),
)
PAPER_KEEPS = 0.91  # of full-length performance at half of the tokens: the abstract's v2 and v3
app = typer.Typer(add_completion=False)


class Finding(NamedTuple):
    """A row of the README's table."""

    what: str
    paper: str
    measured: str
    verdict: str


class Rows:
    """The three sweeps' conditions, by what they are called here."""

    def __init__(self):
        kept = {name: read_rows(KEPT / f"{name}.csv") for name in SWEEPS}
        self.rows: dict[str, list[Row]] = kept
        self.base = conditions(kept["fraction"], "base")[0]
        self.teacher = conditions(kept["fraction"], "teacher")[0]
        self.segments = {
            " + ".join(one.settings["objective.segments"]): one
            for one in conditions(kept["segments"])
        }
        self.position = {one.label: one for one in conditions(kept["position"])}
        grid = [one for one in conditions(kept["fraction"]) if not one.label]
        self.kd, self.ce = (
            {
                one.settings["truncation.fraction"]: one
                for one in grid
                if (one.settings["objective.kd_weight"] > 0) == taught
            }
            for taught in (True, False)
        )
        self.matched = next(one for one in conditions(kept["fraction"]) if one.label)

    @property
    def all_conditions(self) -> list[Condition]:
        return [
            *self.segments.values(),
            *self.kd.values(),
            *self.ce.values(),
            self.matched,
            *self.position.values(),
        ]

    @property
    def runs(self) -> int:
        return len({row.run for one in self.all_conditions for row in one.rows})


# words


def share(estimate: Estimate | None) -> str:
    """An accuracy or a retention with its interval."""
    return (
        "–"
        if estimate is None
        else f"{percent(estimate.mean)} ({percent(estimate.low)} to {percent(estimate.high)})"
    )


def gap(estimate: Estimate) -> str:
    """A difference in points with its interval."""
    return f"{points(estimate.mean)} points ({points(estimate.low)} to {points(estimate.high)})"


def clear(estimate: Estimate) -> bool:
    """Whether the interval excludes zero."""
    return estimate.low > 0 or estimate.high < 0


# findings


def segments_finding(rows: Rows) -> Finding:
    full, cot = rows.segments["prompt + cot + answer"], rows.segments["cot"]
    near = {name: difference(one, full) for name, one in rows.segments.items() if name in COT[:3]}
    far = [difference(cot, rows.segments[name]) for name in WITHOUT]
    low, high = (pick(rows.segments[name].accuracy.mean for name in COT) for pick in (min, max))
    measured = (
        f"with the chain of thought {percent(low)} to {percent(high)}, without it "
        + " and ".join(f"{percent(rows.segments[name].accuracy.mean)} ({name})" for name in WITHOUT)
        + f"; before training {percent(rows.base.accuracy.mean)}. Against all three segments: "
        + ", ".join(f"{name} {gap(d)}" for name, d in near.items())
    )
    gulf = (
        "the gulf agrees"
        if all(d.low > 0 for d in far)
        else "no clear gulf"
        if all(d.high > 0 for d in far)
        else "differs"
    )
    above, below = (
        [name for name, d in near.items() if clear(d) and (d.mean > 0) == up]
        for up in (True, False)
    )
    apart = [
        f"{' and '.join(names)} {word} all three"
        for names, word in ((above, "above"), (below, "below"))
        if names
    ]
    return Finding(
        "segments",
        "CoT ≈ CoT+A ≈ P+CoT ≈ P+CoT+A ≫ A, P+A",
        measured,
        "; ".join([gulf, *apart]) if apart else gulf,
    )


def fraction_finding(rows: Rows) -> Finding:
    full, half = rows.kd[1.0], rows.kd[0.5]
    kept, gained = retention(half, full), gain_retention(half, full, rows.base)
    late, early = difference(full, rows.kd[0.75]), difference(half, rows.kd[0.25])
    measured = (
        f"at 0.5 {share(kept)} of the accuracy and {share(gained)} of the gain are kept. From 0.25 "
        f"to 0.5 {gap(early)}, from 0.75 to 1.0 {gap(late)}"
    )
    where = (
        "holds"
        if kept.low <= PAPER_KEEPS <= kept.high
        else "lies below"
        if kept.high < PAPER_KEEPS
        else "lies above"
    )
    flat = "saturates" if not clear(late) and early.mean > late.mean else "does not saturate"
    return Finding(
        "fraction",
        "the first half keeps about 91 % (abstract v2, v3; 94 % in v1); quality saturates before 1.0",
        measured,
        f"the interval {where} {100 * PAPER_KEEPS:.0f} %; {flat}",
    )


def position_finding(rows: Rows) -> Finding:
    first = rows.position["first half"]
    gaps = {
        how: difference(first, rows.position[f"last half, context {how}"])
        for how in ("dropped", "read")
    }
    measured = "first − last half: " + ", ".join(
        f"{gap(d)} with the context {how}" for how, d in gaps.items()
    )
    words = {
        how: "agrees" if d.low > 0 else "differs" if d.high < 0 else "not clear"
        for how, d in gaps.items()
    }
    return Finding(
        "position",
        "the left half beats the right half (which also loses the prompt and the first half)",
        measured,
        f"in the paper's form: {words['dropped']}; in the fair form: {words['read']}",
    )


def cost_finding(rows: Rows) -> Finding:
    full, half = rows.kd[1.0], rows.kd[0.5]
    parts = {"training time": "train_seconds", "peak memory": "peak_bytes", "FLOPs": "flops"}
    ratios = {name: half.cost(field) / full.cost(field) for name, field in parts.items()}
    measured = (
        ", ".join(f"{name} {percent(ratio)}" for name, ratio in ratios.items())
        + " of whole sequences"
    )
    other = [name for name, ratio in ratios.items() if not 0.4 <= ratio <= 0.6]
    return Finding(
        "cost at 0.5",
        "time, memory and FLOPs fall by about 50 %",
        measured,
        "agrees" if not other else f"differs in {' and '.join(other)}",
    )


def matched_finding(rows: Rows) -> Finding:
    full, half = difference(rows.matched, rows.kd[1.0]), difference(rows.matched, rows.kd[0.5])
    measured = (
        f"{share(rows.matched.accuracy)}: {gap(full)} against all the tokens of once, "
        f"{gap(half)} against half of them"
    )
    return Finding(
        "token-matched",
        "half the tokens of twice the examples: named as open",
        measured,
        ("better" if full.mean > 0 else "worse") + " than whole sequences"
        if clear(full)
        else "no clear difference",
    )


def kd_finding(rows: Rows) -> Finding:
    gaps = {fraction: difference(rows.kd[fraction], rows.ce[fraction]) for fraction in rows.kd}
    measured = "KD − CE alone: " + ", ".join(
        f"{gap(d)} at {fraction:g}" for fraction, d in gaps.items()
    )
    helps, hurts = (
        [f"{fraction:g}" for fraction, d in gaps.items() if clear(d) and (d.mean > 0) == up]
        for up in (True, False)
    )
    said = [
        f"the teacher {word} at {', '.join(where)}"
        for word, where in (("helps", helps), ("hurts", hurts))
        if where
    ]
    return Finding(
        "teacher or none",
        "trains with half of each loss; CE alone is not its subject",
        measured,
        "; ".join(said) or "no clear difference",
    )


FINDINGS = (
    segments_finding,
    fraction_finding,
    position_finding,
    cost_finding,
    matched_finding,
    kd_finding,
)


# tables


def accuracy_table(found: dict[str, Condition], full: Condition, base: Condition) -> str:
    def row(name: str, one: Condition) -> list[str]:
        d = difference(one, full)
        return [
            name,
            str(len(one.rows)),
            share(one.accuracy),
            "–" if one is full else gap(d),
            share(retention(one, full)),
            share(gain_retention(one, full, base)),
            f"{one.cost('kl'):.3f}",
            amount(one.cost("tokens_read")),
            amount(one.cost("flops"), "FLOP"),
            percent(one.cost("flops") / full.cost("flops")),
            duration(one.cost("train_seconds")),
            amount(one.cost("peak_bytes"), "B"),
        ]

    head = [
        "",
        "seeds",
        "accuracy",
        "against full",
        "of full's accuracy",
        "of full's gain",
        "KL",
        "tokens",
        "arithmetic",
        "of full's",
        "training",
        "peak memory",
    ]
    return table(
        head, [row(name, one) for name, one in found.items()], "l" + "r" * (len(head) - 1)
    ).replace("\u00a0", " ")


def page(rows: Rows) -> str:
    """The tables of every condition."""
    one = rows.kd[1.0].rows[0]
    devices, commits = (
        sorted({getattr(row, name) for c in rows.all_conditions for row in c.rows})
        for name in ("device", "commit")
    )
    fractions = {f"fraction {f:g}, KD": c for f, c in rows.kd.items()} | {
        f"fraction {f:g}, CE alone": c for f, c in rows.ce.items()
    }
    fractions |= {"token-matched: half of twice the examples, KD": rows.matched}
    seeds = sorted({row.seed for one in rows.all_conditions for row in one.rows})
    return "\n\n".join(
        (
            f"{rows.runs} runs, seeds {', '.join(map(str, seeds))}, {len(one.right)} held-out "
            f"problems, {one.backend} on {', '.join(devices)}, commit {', '.join(commits)}. Before "
            f"training: {share(rows.base.accuracy)}; teacher: {share(rows.teacher.accuracy)}. "
            "Intervals are 95 % over seeds and problems (crossed), differences paired by both; "
            "costs are of the training steps, means over seeds.",
            "## Segments (whole sequences)",
            accuracy_table(rows.segments, rows.segments["prompt + cot + answer"], rows.base),
            "## Fraction, with the teacher and without",
            accuracy_table(fractions, rows.kd[1.0], rows.base),
            "## Position (half of the tokens)",
            accuracy_table(rows.position, rows.position["all tokens"], rows.base),
        )
    )


def section(rows: Rows) -> str:
    """The README's table, a row a finding."""
    return table(
        ["", "the paper", "measured here", ""], [list(find(rows)) for find in FINDINGS], "llll"
    ).replace("\u00a0", " ")


# the figure


def draw(rows: Rows, path: Path) -> None:
    """Accuracy over the fraction with bands, and bars of the segments and of the positions, on one
    scale.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "mlx-distill",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, 3, figsize=(11, 3.9), sharey=True, layout="constrained", width_ratios=(1.5, 1, 1)
    )
    _fractions(panels[0], rows)
    segments = {
        name.replace("prompt", "P")
        .replace("cot", "CoT")
        .replace("answer", "A")
        .replace(" ", ""): one
        for name, one in rows.segments.items()
    }
    positions = {
        name.replace(", context", ",\ncontext"): one for name, one in rows.position.items()
    }
    _bars(panels[1], segments, "which segments carry loss", rows.base)
    _bars(panels[2], positions, "which half carries loss", rows.base)
    panels[0].set(ylim=(0, 1.02), ylabel="held-out problems solved")
    panels[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


BLUE, ORANGE, GREEN, GREY = "#2559ab", "#c06a14", "#1c8068", "#75828f"


def _fractions(axes, rows: Rows) -> None:
    for found, label, colour in (
        (rows.kd, "with the teacher", BLUE),
        (rows.ce, "cross-entropy alone", ORANGE),
    ):
        places, sure = list(found), [one.accuracy for one in found.values()]
        axes.fill_between(
            places,
            [e.low for e in sure],
            [e.high for e in sure],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            places, [e.mean for e in sure], color=colour, marker="o", markersize=4, label=label
        )
        axes.plot(
            [f for f, one in found.items() for _ in one.rows],
            [row.accuracy for one in found.values() for row in one.rows],
            color=colour,
            marker=".",
            markersize=3,
            linestyle="",
            alpha=0.6,
        )
    sure = rows.matched.accuracy
    axes.errorbar(
        [0.5],
        [sure.mean],
        [[sure.mean - sure.low], [sure.high - sure.mean]],
        color=GREEN,
        marker="D",
        markersize=4,
        capsize=3,
        label="half of twice the examples",
    )
    _before(axes, rows.base, named=True)
    axes.set(xlabel="fraction of the tokens kept", xlim=(0, 1.05))
    axes.set_title("how much of the sequence", fontsize=10)
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def _bars(axes, found: dict[str, Condition], title: str, base: Condition) -> None:
    sure = [one.accuracy for one in found.values()]
    means = [e.mean for e in sure]
    spread = [[e.mean - e.low for e in sure], [e.high - e.mean for e in sure]]
    axes.bar(
        range(len(found)),
        means,
        color=BLUE,
        alpha=0.8,
        width=0.65,
        yerr=spread,
        error_kw={"capsize": 3, "elinewidth": 1},
    )
    axes.set_xticks(range(len(found)), found, rotation=40, ha="right", fontsize=8)
    axes.set_title(title, fontsize=10)
    _before(axes, base)


def _before(axes, base: Condition, named: bool = False) -> None:
    axes.axhline(base.accuracy.mean, color=GREY, linestyle=":", linewidth=1)
    if named:
        axes.annotate(
            "before training",
            (1, base.accuracy.mean),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=GREY,
            fontsize=7,
        )


# commands


@app.command()
def keep(
    folder: Annotated[Path, typer.Argument(help="Where the sweeps' folders lie.")] = Path(
        "runs/reproduction"
    ),
) -> None:
    """Copy each sweep's rows."""
    for name in SWEEPS:
        shutil.copy(folder / name / "results.csv", KEPT / f"{name}.csv")


@app.command()
def write() -> None:
    """Tables, figure and the README's section."""
    rows = Rows()
    draw(rows, KEPT / "findings.svg")
    rewrite_section("reproduction", page(rows), KEPT / "README.md")
    rewrite_section("findings", section(rows), TITLE)
    for find in FINDINGS:
        print(*find(rows), sep="\n  ")


if __name__ == "__main__":
    app()
