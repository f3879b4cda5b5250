"""The report: run folders → a Markdown table and one self-contained HTML page.

In: run folders, which `kept_run.py` reads. Out: `report.md` and `report.html`. Decided here: what is said in words, every
such sentence being computed from the runs' files. A part that is missing is named in a line and leaves no number. The page's
look is in `report.html.jinja` and, shared with the page of a sweep, `page.css.jinja` and `page.html.jinja`; its curves are placed by
`charts.py`.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.charts import Chart, Series, line_chart, smoothed
from mlx_distill.errors import NotFound, RunError
from mlx_distill.evaluate import Difference, Score, compare, retention
from mlx_distill.kept_run import SEGMENTS, Compared, Run, kl_before_after, method_of, read_run
from mlx_distill.markdown import bullets, plain, table
from mlx_distill.recipe import Recipe
from mlx_distill.words import DASH, amount, duration, finite, number, percent, points

TEMPLATE = "report.html.jinja"
SEGMENT_NAMES = {"prompt": "prompt", "cot": "chain of thought", "answer": "answer"}
RUN_ROLES = ("run-1", "run-2", "run-3", "run-4", "run-5", "run-6")
FACTS = {
    "created": "created", "backend": "backend", "backend_reason": "chosen because", "device": "device",
    "dtype": "number format", "seed": "seed", "recipe_digest": "recipe digest", "git_commit": "git commit",
    "exported_step": "student's step",
}


@dataclass(frozen=True)
class Report:
    """Where the report was written, and its first sentence."""

    markdown: Path
    html: Path
    headline: str

    def __str__(self) -> str:
        return str(self.html)


def report(runs: list[Path], out: Path) -> Report:
    """Write `report.md` and `report.html` about `runs` into the folder `out`, which is made if need be.

    Each run's `eval.compare` names more run folders to set beside it. Raises `NotFound` where a path is not a run folder and
    `RunError` where nothing can be written at `out`.
    """
    if not runs:
        raise NotFound("no run to report on: name at least one run folder")
    read = [read_run(Path(folder)) for folder in runs]
    return write(markdown(read), html(read), headline(read), out)


def write(markdown: str, html: str, headline: str, out: Path) -> Report:
    """Put `report.md` and `report.html` into the folder `out`; raises `RunError` where that cannot be done."""
    written = Report(out / "report.md", out / "report.html", headline)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written.markdown.write_text(markdown, encoding="utf-8")
        written.html.write_text(html, encoding="utf-8")
    except OSError as error:
        raise RunError(f"report in {out}: cannot be written ({error.strerror}); choose another folder or free some space") from None
    return written


# sentences


def headline(runs: Sequence[Run]) -> str:
    """The first sentence of the report: what came out, in numbers of the runs' files."""
    if len(runs) == 1:
        return _headline_of_one(runs[0])
    scored, tasks = _ranked(runs), {run.task for run in runs if run.task}
    if not scored:
        return f"{len(runs)} runs, none of them scored."
    if len(tasks) > 1:
        return f"{len(runs)} runs on {len(tasks)} tasks: {', '.join(sorted(tasks))}."
    tied = [run.name for run in scored if run.scores["student"].accuracy == scored[0].scores["student"].accuracy]
    if len(tied) > 1:
        return f"{' and '.join(tied)} share the highest score of {len(runs)} runs: their students solve {_solved(scored[0])}."
    return f"{scored[0].name} scores highest of {len(runs)} runs: its student solves {_solved(scored[0])}."


def leads(runs: Sequence[Run]) -> list[str]:
    """What follows the headline: of one run its `subline`, of several how the highest compares with each other run."""
    if len(runs) == 1:
        return subline(runs[0])
    ranked = _ranked(runs)
    return [
        difference_sentence(ranked[0].name, other.name, compare(ranked[0].scores["student"], other.scores["student"]))
        for other in ranked[1:] if _shared(ranked[0].scores["student"], other.scores["student"])
    ]


def _ranked(runs: Sequence[Run]) -> list[Run]:
    return sorted((run for run in runs if "student" in run.scores), key=lambda run: -run.scores["student"].accuracy)


def _shared(a: Score, b: Score) -> bool:
    return bool(a.correct.keys() & b.correct.keys())


def _solved(run: Run) -> str:
    return f"{percent(run.scores['student'].accuracy)} of {run.scores['student'].problems:,} problems"


def _headline_of_one(run: Run) -> str:
    student, base, teacher = (run.scores.get(model) for model in ("student", "base", "teacher"))
    if student is None:
        first, last = kl_before_after(run)
        if first is None or last is None:
            return f"{run.name} has not been scored."
        return (f"{run.name} has not been scored; its validation KL to the teacher went from "
                f"{number(first)} to {number(last)} nats per token.")
    before = f", {_direction(student, base)} {percent(base.accuracy)} before" if base else ""
    other = f"; the teacher solves {percent(teacher.accuracy)}" if teacher else ""
    return f"The student solves {_solved(run)}{before}{other}."


def _direction(student: Score, base: Score) -> str:
    if student.accuracy == base.accuracy:
        return "as many as the"
    return "up from" if student.accuracy > base.accuracy else "down from"


def subline(run: Run) -> list[str]:
    """What follows the headline: what is kept of the teacher, and how each compared run did."""
    student, base, teacher = (run.scores.get(model) for model in ("student", "base", "teacher"))
    kept = retention(student, base, teacher) if student and base and teacher else None
    parts = [] if kept is None else [
        f"{percent(kept.accuracy)} of the teacher's accuracy" if kept.accuracy is not None else "",
        f"{percent(kept.gain)} of its lead over the student before" if kept.gain is not None else "",
    ]
    said = " and ".join(filter(None, parts))
    return ([f"{run.name} reaches {said}."] if said else []) + [_compared_sentence(run, other) for other in run.compared]


def _compared_sentence(run: Run, other: Compared) -> str:
    if other.difference is None:
        return other.obstacle
    return difference_sentence(run.name, f"{other.name} ({other.method})", other.difference)


def difference_sentence(a: str, b: str, difference: Difference) -> str:
    """A `Difference` in words, saying whether its interval excludes zero."""
    zero = "includes" if difference.low <= 0 <= difference.high else "excludes"
    facts = (f"{points(difference.mean)} points, 95\u00a0% interval {points(difference.low)} to {points(difference.high)}, "
             f"which {zero} zero ({difference.problems:,} shared problems).")
    if difference.verdict == "no clear difference":
        return f"No clear difference between {a} and {b}: {facts}"
    return f"{a} is {difference.verdict} than {b}: {facts}"


# markdown


def markdown(runs: Sequence[Run]) -> str:
    """The report as Markdown: the headline, a table of scores, a table of cost, the comparisons in words."""
    scores = table(
        ["run", "model", "accuracy", "95 % interval", "problems", "unfinished", "well formed", "tokens an answer"],
        [row for run in runs for row in _score_cells(run)], "llrrrrrr",
    )
    cost = table(
        ["run", "steps", "tokens", "time", "peak memory", "FLOPs", "KL before", "KL after"],
        [[run.name, *(facts[key] for key in ("steps", "tokens", "time", "memory", "flops")), *_kl(run)]
         for run in runs for facts in [cost_of(run)]], "lrrrrrrr",
    )
    lines = leads(runs) if len(runs) == 1 else leads(runs) + [sentence for run in runs for sentence in subline(run)]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes.values()]
    blocks = [f"# {headline(runs)}", *lines, "## Scores", scores, "## Cost", cost, *(["## Missing"] if notes else []),
              *([bullets(notes)] if notes else []), INTERVALS]
    return "\n\n".join(block if block.startswith(("|", "#", "-")) else plain(block) for block in blocks).replace("\u00a0", " ") + "\n"


INTERVALS = (
    "Intervals are 95\u00a0% and cover the choice of problems and the sampling of answers, not the choice of a training seed. "
    "A generation without a stop token or without its </think> is unfinished and counts as wrong."
)


def _score_cells(run: Run) -> list[list[str]]:
    rows = [[run.name, *_score_row(role, score)] for role, _, score in _models(run)]
    rows += [[run.name, *_score_row(f"{other.name}: {other.method}", other.score)] for other in run.compared if other.score]
    return rows or [[run.name, "student", *[DASH] * 6]]


def _score_row(label: str, score: Score) -> list[str]:
    return [label, percent(score.accuracy), f"{percent(score.low)} to {percent(score.high)}", f"{score.problems:,}",
            percent(score.unfinished), percent(score.well_formed), number(score.mean_tokens, places=1)]


def _models(run: Run) -> list[tuple[str, str, Score]]:
    """(words, role, score) of a run's own models, weakest first by what they are."""
    words = {"base": "student before", "student": "student after", "teacher": "teacher"}
    return [(label, model, run.scores[model]) for model, label in words.items() if model in run.scores]


def _kl(run: Run) -> list[str]:
    """KL to the teacher on held-out tokens of the supervised segments, before and after, as text."""
    return [number(value) if value is not None else DASH for value in kl_before_after(run)]


# numbers of a run


def _column(rows: Sequence[dict], name: str) -> list[float]:
    return [value for _, value in finite(range(len(rows)), [row.get(name) for row in rows])]


def _known(value: Any) -> float | None:
    return float(value) if finite([0], [value]) else None


def cost_of(run: Run) -> dict[str, str]:
    """Time, memory, tokens and FLOPs as text; what the run did not record is a dash."""
    elapsed = _known(run.manifest.get("elapsed_seconds"))
    flops = run.manifest.get("flops")
    total = _known(flops.get("total")) if isinstance(flops, dict) else None
    steps, planned = _column(run.metrics, "step"), _known(run.manifest.get("steps"))
    tokens, rates = _column(run.metrics, "tokens_seen"), _column(run.metrics, "tokens_per_second")
    loss_tokens, peak = _column(run.metrics, "loss_tokens"), _column(run.metrics, "peak_bytes")
    done = steps[-1] if steps else planned
    return {
        "steps": f"{done:,.0f}" if done is not None else DASH,
        "planned": f"{planned:,.0f}" if planned is not None else DASH,
        "tokens": amount(tokens[-1]) if tokens else DASH,
        "loss_tokens": amount(sum(loss_tokens)) if loss_tokens else DASH,
        "time": duration(elapsed) if elapsed is not None else DASH,
        "rate": f"{statistics.median(rates):,.0f}" if rates else DASH,
        "memory": amount(max(peak), "B") if peak else DASH,
        "flops": amount(total, "FLOP") if total is not None else DASH,
    }


def cost_tiles(run: Run) -> list[tuple[str, str, str]]:
    """(value, name, remark) for each figure of the cost section."""
    cost = cost_of(run)
    table = run.manifest.get("flops")
    parts = [(part, _known(value)) for part, value in _items(table) if part != "total"]
    split = ", ".join(f"{part} {amount(value)}" for part, value in parts if value is not None)
    memory = [f"{name} {amount(max(used), 'B')}" for name in ("active", "cache") if (used := _column(run.metrics, f"{name}_bytes"))]
    tiles = [
        (cost["time"], "training time", f"{cost['steps']} of {cost['planned']} steps" if cost["planned"] != DASH else ""),
        (cost["memory"], "peak memory", ", ".join(memory)),
        (cost["tokens"], "tokens read", f"{cost['loss_tokens']} carried loss" if cost["loss_tokens"] != DASH else ""),
        (cost["rate"], "tokens per second", "median over steps"),
        (cost["flops"], "arithmetic", split),
    ]
    return [(value, name, remark if value != DASH else "not recorded") for value, name, remark in tiles]


def charts_of(run: Run) -> list[Chart]:
    """Training loss and its terms, then KL, cross-entropy and agreement on held-out sequences by segment."""
    steps = [row["step"] for row in run.metrics]

    def trained(name: str, label: str, role: str) -> list[Series]:
        values = [row.get(name) for row in run.metrics]
        return [Series(label, role, steps, values, faint=True), Series(label, role, steps, smoothed(values))]

    training = [*trained("loss", "loss", "accent"), *trained("kd", "divergence", "cot"), *trained("ce", "cross-entropy", "prompt")]
    found = [line_chart("Training loss", "nats per supervised token, smoothed", training)]
    for name, title, unit in VALIDATION:
        found.append(line_chart(title, unit, _by_segment(run, name), percent=name == "agree"))
    return [chart for chart in found if chart]


VALIDATION = (
    ("kl", "KL to the teacher", "nats per token, held out, whole sequences"),
    ("ce", "Cross-entropy", "nats per token, held out, whole sequences"),
    ("agree", "Same first choice as the teacher", "share of tokens, held out"),
)


def _by_segment(run: Run, name: str) -> list[Series]:
    steps = [row["step"] for row in run.validation]
    parts = [Series(SEGMENT_NAMES[part], part, steps, [row.get(f"{name}_{part}") for row in run.validation]) for part in SEGMENTS]
    known = [part for part in parts if finite(part.x, part.y)]
    whole = Series("all", "accent", steps, [row.get(name) for row in run.validation])
    return known if len(known) == 1 else [*known, whole]  # of one segment, "all" would be the same curve


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, RUN_ROLES[i % len(RUN_ROLES)]) for i, run in enumerate(runs)]


def overlays(runs: Sequence[Run]) -> list[Chart]:
    """The curves of several runs, one colour a run."""
    training = [Series(run.name, role, [row["step"] for row in run.metrics], smoothed([row.get("loss") for row in run.metrics]))
                for run, role in _coloured(runs)]
    found = [line_chart("Training loss", "nats per supervised token, smoothed", training)]
    for name, title, unit in VALIDATION:
        series = [Series(run.name, role, [row["step"] for row in run.validation], [row.get(name) for row in run.validation])
                  for run, role in _coloured(runs)]
        found.append(line_chart(title, unit, series, percent=name == "agree"))
    return [chart for chart in found if chart]


# page


@dataclass(frozen=True)
class Bar:
    """One score to draw."""

    label: str
    remark: str
    role: str
    score: Score
    dots: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return self.score.accuracy

    @property
    def low(self) -> float:
        return self.score.low

    @property
    def high(self) -> float:
        return self.score.high


def page(template: str, **content: Any) -> str:
    """A template of this package filled with `content`: one page that needs no other file and no network, all text escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "duration": duration, "number": number}
    return environment.get_template(template).render(**content)


def html(runs: Sequence[Run]) -> str:
    """The report as one page."""
    several = len(runs) > 1
    return page(
        TEMPLATE,
        headline=headline(runs), sentences=leads(runs), views=[_view(run) for run in runs], intervals=INTERVALS, several=several,
        bars=_run_bars(runs) if several else [], overlays=overlays(runs) if several else [],
        rows=[_summary_row(run) for run in runs] if several else [],
    )


def _view(run: Run) -> dict[str, Any]:
    """Everything the template draws of one run."""
    return {
        "run": run, "sentences": subline(run), "bars": _bars(run), "differences": _differences(run), "charts": charts_of(run),
        "tiles": cost_tiles(run), "data": _data(run), "pieces": _pieces(run), "recipe": _recipe_tables(run), "facts": _facts(run),
        "legend": _legend(run), "progress": _progress(run), "headline": _headline_of_one(run),
    }


def _progress(run: Run) -> str:
    """A line for a run that is not finished; empty for one that is, or that does not say."""
    if not run.manifest or run.manifest.get("finished"):
        return ""
    cost = cost_of(run)
    of = f" of {cost['planned']}" if cost["planned"] != DASH else ""
    return f"This run is not finished: it stands at step {cost['steps']}{of}, and what follows describes it so far."


def _bars(run: Run) -> list[Bar]:
    own = [(label, "", role, score) for label, role, score in _models(run)]
    others = [(other.name, other.method, "compared", other.score) for other in run.compared if other.score]
    last = [entry for entry in own if entry[2] == "teacher"]
    return [Bar(*entry) for entry in [*[entry for entry in own if entry[2] != "teacher"], *others, *last]]


def _run_bars(runs: Sequence[Run]) -> list[Bar]:
    several_tasks = len({run.task for run in runs if "student" in run.scores}) > 1

    def remark(run: Run) -> str:
        return run.task if several_tasks else "" if run is runs[0] else method_of(run.recipe, runs[0].recipe)

    return [Bar(run.name, remark(run), role, run.scores["student"]) for run, role in _coloured(runs) if "student" in run.scores]


def _differences(run: Run) -> list[tuple[str, Difference]]:
    student = run.scores.get("student")
    named = {"base": "student before", "teacher": "teacher"}
    found = [(label, compare(student, run.scores[model])) for model, label in named.items()
             if student and model in run.scores and _shared(student, run.scores[model])]
    return found + [(other.name, other.difference) for other in run.compared if other.difference]


def _summary_row(run: Run) -> dict[str, Any]:
    scores = run.scores
    kept = retention(*(scores[model] for model in ("student", "base", "teacher"))) if len(
        scores.keys() & {"student", "base", "teacher"}) == 3 else None
    return {"name": run.name, "student": scores.get("student"), "base": scores.get("base"), "teacher": scores.get("teacher"),
            "kept": kept, "kl": _kl(run), "cost": cost_of(run)}


def _data(run: Run) -> dict[str, Any]:
    """Counts of examples and of tokens by segment; None where they were not recorded."""
    data = run.manifest.get("data")
    data = data if isinstance(data, dict) else {}
    dropped = data.get("dropped") if isinstance(data.get("dropped"), dict) else {}
    table = data.get("segments") if isinstance(data.get("segments"), dict) else {}
    rows = [(SEGMENT_NAMES[part], part, *(_known(table[part].get(key)) for key in ("before", "after", "supervised")))
            for part in SEGMENTS if isinstance(table.get(part), dict)]
    totals = [sum(values) if rows and None not in (values := [row[i] for row in rows]) else None for i in (2, 3, 4)]
    return {"read": _known(data.get("read")), "kept": _known(data.get("kept")),
            "split": [(name, count) for name in ("train", "validation") if (count := _known(data.get(name))) is not None],
            "dropped": [(str(reason), _known(count)) for reason, count in dropped.items()],
            "rows": rows, "totals": totals, "empty": not data}


def _pieces(run: Run) -> list[dict[str, Any]]:
    """The sample's tokens, neighbours of one look joined; `edge` marks where a cut begins or ends."""
    joined: list[dict[str, Any]] = []
    for piece in run.sample:
        kept = bool(piece.get("kept", True))
        look = (piece["segment"], "cut" if not kept else "loss" if piece.get("supervised") else "read")
        if joined and joined[-1]["look"] == look:
            joined[-1]["text"] += str(piece.get("text", ""))
            joined[-1]["tokens"] += 1
        else:
            was_cut = joined[-1]["look"][1] == "cut" if joined else False
            edge = "" if kept != was_cut else "cut" if not kept else "kept"
            joined.append({"look": look, "text": str(piece.get("text", "")), "tokens": 1, "edge": edge})
    return joined


def _legend(run: Run) -> list[dict[str, Any]]:
    rows = []
    for part in SEGMENTS:
        mine = [piece for piece in run.sample if piece["segment"] == part]
        kept = [piece for piece in mine if piece.get("kept", True)]
        loss = sum(bool(piece.get("supervised")) for piece in kept)
        if mine:
            rows.append({"part": part, "name": SEGMENT_NAMES[part], "tokens": len(mine), "kept": len(kept), "loss": loss})
    return rows


def _recipe_tables(run: Run) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """(table, [(field, value, whether it differs from the default)])."""
    defaults = Recipe.model_construct().model_dump(mode="json")
    return [
        (table, [(name, json.dumps(value, ensure_ascii=False), defaults.get(table, {}).get(name) != value)
                 for name, value in fields.items()])
        for table, fields in run.recipe.items()
    ]


def _facts(run: Run) -> list[tuple[str, str]]:
    """Where the run came from, as far as its manifest says."""
    manifest = run.manifest
    rows = [("run", run.name), *((words, manifest.get(key)) for key, words in FACTS.items())]
    rows += [(role, _model_text(model)) for role, model in _items(manifest.get("models"))]
    rows += [_fact(name, value) for name, value in _items(manifest.get("machine"))]
    rows += _items(manifest.get("versions"))
    return [(str(name), str(value)) for name, value in rows if value not in (None, "")]


def _fact(name: str, value: Any) -> tuple[str, Any]:
    """A machine's property in words: a name that ends in _bytes becomes a size."""
    size = _known(value) if name.endswith("_bytes") else None
    return name.removesuffix("_bytes").replace("_", " "), value if size is None else amount(size, "B")


def _items(content: Any) -> list[tuple[str, Any]]:
    return list(content.items()) if isinstance(content, dict) else []


def _model_text(model: Any) -> str:
    if not isinstance(model, dict):
        return str(model)
    size = _known(model.get("parameters"))
    parts = [model.get("name"), f"{amount(size)} parameters" if size else "", model.get("fingerprint")]
    return " · ".join(str(part) for part in parts if part)
