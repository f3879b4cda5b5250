"""The figure of this folder: for each arm what it solves, what it finishes and what it costs.

In: conditions of one sweep, first the one that the others are measured by, and the models before
and above. Out: an SVG file, the same from the same rows.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.findings import BLUE, GREEN, GREY, ORANGE  # noqa: E402
from mlx_distill.reporting.study import Condition  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(
    arms: list[Condition], teacher: Condition | None, base: Condition | None, path: Path
) -> None:
    """Write the figure to `path`."""
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
    from matplotlib import pyplot, ticker

    height = 1.1 + 0.36 * len(arms)
    figure, panels = pyplot.subplots(1, 3, figsize=(11, height), sharey=True, layout="constrained")
    places = range(len(arms))
    _solved(panels[0], arms, teacher, base)
    _bars(panels[1], [1 - arm.cost("unfinished") for arm in arms], GREEN, "finished answers")
    costs = [arm.cost("flops") / arms[0].cost("flops") for arm in arms]
    _bars(panels[2], costs, ORANGE, f"training FLOPs, of {arms[0].name}'s")
    panels[0].set_yticks(places, [arm.name for arm in arms])
    panels[0].invert_yaxis()
    for axes in panels:
        axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def _solved(
    axes: "Axes", arms: list[Condition], teacher: Condition | None, base: Condition | None
) -> None:
    """Means with their intervals, a dot for each seed, and the models before and above."""
    for place, arm in enumerate(arms):
        sure = arm.accuracy
        spread = [[sure.mean - sure.low], [sure.high - sure.mean]]
        axes.errorbar(
            [sure.mean], [place], xerr=spread, color=BLUE, marker="D", markersize=5, capsize=3
        )
        seeds = [row.accuracy for row in arm.rows]
        axes.plot(seeds, [place] * len(seeds), color=BLUE, marker=".", linestyle="", alpha=0.5)
    for name, model in (("teacher", teacher), ("before", base)):
        if model:
            _line(axes, name, model.accuracy.mean)
    axes.set(xlim=(-0.02, 1.0))
    axes.set_title("held-out problems solved", fontsize=10)


def _line(axes: "Axes", name: str, place: float) -> None:
    axes.axvline(place, color=GREY, linestyle=":", linewidth=1)
    axes.annotate(
        f"{name} {place:.0%}",
        (place, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 3),
        textcoords="offset points",
        color=GREY,
        fontsize=7,
    )


def _bars(axes: "Axes", values: list[float], colour: str, title: str) -> None:
    axes.barh(range(len(values)), values, color=colour, alpha=0.8, height=0.55)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:.1%}",  # 99.8 % is not all of them
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set(xlim=(0, max(1.0, *values) * 1.12))
    axes.set_title(title, fontsize=10)
