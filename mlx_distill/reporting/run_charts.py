"""The curves of runs: training loss, and what was measured on held-out sequences."""

from collections.abc import Sequence
from dataclasses import replace

from mlx_distill.reporting.charts import Curves, Series, line_chart, smoothed
from mlx_distill.reporting.kept_run import SEGMENTS, Run
from mlx_distill.runs.rows import Row

SEGMENT_NAMES = {"prompt": "prompt", "cot": "chain of thought", "answer": "answer"}
RUN_ROLES = ("run-1", "run-2", "run-3", "run-4", "run-5", "run-6")
TRAINING = ("Training loss", "nats per supervised token, smoothed")
# name of a term: its label and colour while training; one that is not here is called by its name
TERMS = {"kd": ("divergence", "cot"), "ce": ("cross-entropy", "prompt")}
NATS = "nats per token, held out, whole sequences"
VALIDATION = {
    "kl": ("KL to the teacher", NATS),
    "ce": ("Cross-entropy", NATS),
    "agree": ("Same first choice as the teacher", "share of tokens, held out"),
}


def run_role(i: int) -> str:
    """The colour of the i-th of several."""
    return RUN_ROLES[i % len(RUN_ROLES)]


def charts_of(run: Run) -> list[Curves]:
    """Training loss and its terms, then what was measured on held-out sequences, by segment."""
    shown = {"loss": ("loss", "accent"), **TERMS}
    for name in _terms(run.metrics):
        shown.setdefault(name, (name, run_role(len(shown))))
    terms = [series for name, how in shown.items() for series in _trained(run, name, *how)]
    held_out = [
        _held_out(name, _by_segment(run, name))
        for name in dict.fromkeys([*VALIDATION, *_terms(run.validation)])
    ]
    return [chart for chart in (line_chart(*TRAINING, terms), *held_out) if chart]


def _terms(rows: Sequence[Row]) -> list[str]:
    """What rows hold as a whole and by segment: `ce`, where there is a `ce_cot`."""
    names = dict.fromkeys(name for row in rows for name in row.numbers)
    return [name for name in names if any(f"{name}_{part}" in names for part in SEGMENTS)]


def _held_out(name: str, series: Sequence[Series]) -> Curves | None:
    title, unit = VALIDATION.get(name, (name, NATS))
    return line_chart(title, unit, series, shares=name == "agree")


def _trained(run: Run, name: str, label: str, role: str) -> list[Series]:
    """A term at each step, faint, and smoothed."""
    steps, values = _columns(run.metrics, name)
    return [
        Series(label, role, steps, values, faint=True),
        Series(label, role, steps, smoothed(values)),
    ]


def _by_segment(run: Run, name: str) -> list[Series]:
    supervised = run.recipe.objective.segments if run.recipe else SEGMENTS
    some = len(supervised) < len(SEGMENTS)
    parts = [
        Series(
            SEGMENT_NAMES[part],
            part,
            *_columns(run.validation, f"{name}_{part}"),
            faded=part not in supervised,
            bold=some and part in supervised,
        )
        for part in SEGMENTS
    ]
    known = [part for part in parts if part.known]
    whole = Series("all", "accent", *_columns(run.validation, name), faded=some)
    return (
        known if len(known) == 1 else [*known, whole]
    )  # of one segment, "all" would be the same curve


def overlays(runs: Sequence[Run]) -> list[Curves]:
    """The curves of several runs, one colour a run; beside scored ones, those that were not are
    faded."""
    scored = any("student" in run.scores for run in runs)

    def each(rows: str, name: str) -> list[Series]:
        return [
            Series(
                run.name,
                run_role(i),
                *_columns(getattr(run, rows), name),
                faded="student" not in run.scores and scored,
            )
            for i, run in enumerate(runs)
        ]

    training = [replace(one, y=smoothed(one.y)) for one in each("metrics", "loss")]
    terms = [name for run in runs for name in _terms(run.validation)]
    held_out = [
        _held_out(name, each("validation", name)) for name in dict.fromkeys([*VALIDATION, *terms])
    ]
    return [chart for chart in (line_chart(*TRAINING, training), *held_out) if chart]


def _columns(rows: Sequence[Row], name: str) -> tuple[tuple[float, ...], tuple]:
    """Steps, and what the rows hold under a name."""
    return tuple(row.step for row in rows), tuple(row.numbers.get(name) for row in rows)
