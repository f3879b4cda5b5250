"""The page of one run: its sections.

In: a `Run`, as `kept_run.py` reads it. Out: a `Page`. Decided here: what a reader is shown, and in
which order. A part that is missing is named in a line and leaves no number.
"""

import json
from collections.abc import Sequence
from typing import Any

from mlx_distill.data.account import unused_lines
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.reporting.kept_run import SEGMENTS, Run
from mlx_distill.reporting.page import (
    Bar,
    Bars,
    Beside,
    Block,
    Cell,
    Charts,
    Example,
    Facts,
    Fields,
    Note,
    Page,
    Piece,
    Section,
    Table,
    Tiles,
)
from mlx_distill.reporting.run_charts import SEGMENT_NAMES, charts_of
from mlx_distill.reporting.run_cost import cost_tiles, items, known
from mlx_distill.reporting.run_words import headline, kl_sentence, leads, progress, shared
from mlx_distill.scoring.score import Difference, Score, compare
from mlx_distill.words import DASH, amount, duration, number, percent, points

MODELS = {"base": "student before", "student": "student after", "teacher": "teacher"}
FACTS = {
    "created": "created",
    "backend": "backend",
    "backend_reason": "chosen because",
    "device": "device",
    "dtype": "number format",
    "seed": "seed",
    "recipe_digest": "recipe digest",
    "git_commit": "git commit",
    "exported_step": "student's step",
}
NOTES = [
    "Intervals are 95\u00a0% and cover the choice of problems and the sampling of answers, not the "
    "choice of a training seed. A generation without a stop token or without its </think> is "
    "unfinished and counts as wrong. Verdicts come from paired intervals over the problems that "
    "both models answered."
]


def run_page(run: Run) -> Page:
    """Everything about one run."""
    about = [run.name, run.task, str(run.manifest.get("created") or "")]
    return Page(
        [words for words in about if words],
        headline([run]),
        "",
        leads([run]),
        run_sections(run),
        NOTES,
    )


def run_sections(run: Run) -> list[Section]:
    """What a run's page holds, and its fold on the page of several."""
    unfinished = [Note(progress(run), strong=True)] if progress(run) else []
    return [
        Section("Scores", [*unfinished, *_scores(run)], run.task),
        Section("Training", _training(run)),
        Section("One example", _example(run), "what the student was trained on"),
        Section("Cost", [Tiles(cost_tiles(run))]),
        Section("Data", [*_missing(run, "manifest.json"), *_data(run)]),
        Section(
            "Recipe",
            [*_missing(run, "recipe.toml"), Fields(_recipe(run))],
            "in bold where it differs from the default",
        ),
        Section("Where it ran", [Facts(_facts(run))]),
    ]


def _training(run: Run) -> list[Block]:
    nearer = [Note(kl_sentence(run))] if kl_sentence(run) else []
    missing = _missing(run, "metrics.jsonl", "validation.jsonl")
    return [*missing, *nearer, Charts(charts_of(run))]


def _missing(run: Run, *names: str) -> list[Block]:
    return [Note(run.notes[name]) for name in names if name in run.notes]


# scores


def _scores(run: Run) -> list[Block]:
    broken = [name for name in run.notes if name.startswith("eval.json ")]
    missing = _missing(run, "eval.json", *broken)
    scored = _scored(run)
    if not scored:
        return missing
    ways = ", ".join(f"{_count(known(count))} as {way}" for way, count in items(run.ways))
    told = [Note(f"Answers are compared with the expected ones: {ways}.")] if ways else []
    bars = [score_bar(label, remark, role, score) for label, remark, role, score in scored]
    return [*missing, *told, Bars(bars), *_against(run), _score_table(run, scored)]


def _scored(run: Run) -> list[tuple[str, str, str, Score]]:
    """(label, remark, role, score) of the run's models and of compared runs, the teacher last."""
    own = [
        (label, "", model, run.scores[model])
        for model, label in MODELS.items()
        if model in run.scores
    ]
    others = [
        (other.name, other.method, "compared", other.score) for other in run.compared if other.score
    ]
    return sorted([*own, *others], key=lambda entry: entry[2] == "teacher")


def score_bar(label: str, remark: str, role: str, score: Score) -> Bar:
    """A score to draw."""
    return Bar(label, remark, role, score.accuracy, score.low, score.high)


def _against(run: Run) -> list[Table]:
    """The student's differences from the other models, if there are any."""
    student = run.scores.get("student")
    found = [
        (MODELS[model], compare(student, run.scores[model]))
        for model in ("base", "teacher")
        if student and model in run.scores and shared(student, run.scores[model])
    ]
    found += [(other.name, other.difference) for other in run.compared if other.difference]
    head = ["trained student against", "verdict", "points", "95\u00a0% interval", "shared problems"]
    return [Table(head, [_difference_row(*each) for each in found], "llrrr")] if found else []


def _difference_row(label: str, gap: Difference) -> list[Cell]:
    return [
        Cell(label),
        Cell(gap.verdict, look=f"verdict {gap.verdict.replace(' ', '-')}"),
        Cell(points(gap.mean), look="strong"),
        Cell(f"{points(gap.low)} to {points(gap.high)}"),
        Cell(f"{gap.problems:,}"),
    ]


def _score_table(run: Run, scored: Sequence[tuple[str, str, str, Score]]) -> Table:
    head = [
        "run",
        "model",
        "accuracy",
        "95\u00a0% interval",
        "problems",
        "unfinished",
        "well formed",
        "tokens an answer",
        "samples",
        "generated in",
    ]
    rows = [
        [Cell(run.name), Cell(label, remark), *_score_cells(score)]
        for label, remark, _, score in scored
    ]
    return Table(head, rows, "llrrrrrrrr", shown_by_bars=("run", "accuracy", "95\u00a0% interval"))


def _score_cells(score: Score) -> list[Cell]:
    texts = [
        percent(score.accuracy),
        f"{percent(score.low)} to {percent(score.high)}",
        f"{score.problems:,}",
        percent(score.unfinished),
        percent(score.well_formed),
        number(score.mean_tokens, places=1),
        str(score.samples),
        duration(score.seconds),
    ]
    return [Cell(text) for text in texts]


# the example


def _example(run: Run) -> list[Block]:
    if run.sample:
        return [Example(_pieces(run), _legend(run))]
    return _missing(run, "sample.json") or [
        Note("sample.json holds no tokens: no example is shown.")
    ]


def _pieces(run: Run) -> list[Piece]:
    """The sample's tokens, neighbours of one look joined."""
    joined: list[Piece] = []
    for token in run.sample:
        text, kept = str(token.get("text", "")), bool(token.get("kept", True))
        look = "cut" if not kept else "loss" if token.get("supervised") else "read"
        last = joined[-1] if joined else Piece("", "", "", "")
        if (last.segment, last.look) == (token["segment"], look):
            joined[-1] = Piece(last.text + text, last.segment, look, last.edge)
        else:
            edge = (
                "cut"
                if look == "cut" != last.look
                else "kept from here"
                if last.look == "cut" != look
                else ""
            )
            joined.append(Piece(text, token["segment"], look, edge))
    return joined


def _legend(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    for part in SEGMENTS:
        mine = [token for token in run.sample if token["segment"] == part]
        kept = [token for token in mine if token.get("kept", True)]
        loss = sum(bool(token.get("supervised")) for token in kept)
        cut = f", {len(kept)} kept" if len(kept) < len(mine) else ""
        if mine:
            rows.append(
                (part, SEGMENT_NAMES[part], f"{len(mine)} tokens{cut}, {loss or 'none'} with loss")
            )
    return rows


# data


def _data(run: Run) -> list[Block]:
    """Counts of examples and of tokens by segment, as far as the manifest has them."""
    data = dict(items(run.manifest.get("data")))
    if not data:
        return (
            []
            if "manifest.json" in run.notes
            else [Note("The manifest counts no examples and no tokens.")]
        )
    return [
        Beside(
            [
                _examples_table(data),
                _tokens_table(data) or Note("Tokens by segment were not counted."),
            ]
        ),
        *_not_used(data),
    ]


def _not_used(data: dict[str, Any]) -> list[Block]:
    """What the rows carry and nothing read, by name."""
    counts = {
        name: int(count) for name, found in items(data.get("not_used")) if (count := known(found))
    }
    return [Note(f"Not used: {', '.join(unused_lines(counts))}.")] if counts else []


def _examples_table(data: dict[str, Any]) -> Table:
    names = {"train": "training"}
    rows = [["", "read", data.get("read")]]
    rows += [["sub", f"dropped: {reason}", count] for reason, count in items(data.get("dropped"))]
    rows += [["sum", "kept", data.get("kept")]]
    rows += [
        ["sub", f"for {names.get(part, part)}", data[part]]
        for part in ("train", "validation")
        if known(data.get(part)) is not None
    ]
    cells = [
        [Cell(text, look=look), Cell(_count(known(count)), look=look)] for look, text, count in rows
    ]
    return Table(["examples", "count"], cells, "lr")


def _tokens_table(data: dict[str, Any]) -> Table | None:
    segments = dict(items(data.get("segments")))
    counts = {
        part: [known(segments[part].get(key)) for key in ("before", "after", "supervised")]
        for part in SEGMENTS
        if isinstance(segments.get(part), dict)
    }
    if not counts:
        return None
    totals = [
        None if None in column else sum(column) for column in zip(*counts.values(), strict=True)
    ]
    rows = [
        _token_cells(Cell(SEGMENT_NAMES[part], dot=part), *three) for part, three in counts.items()
    ]
    rows.append(_token_cells(Cell("all", look="sum"), *totals, look="sum"))
    return Table(["tokens", "whole", "after the cut", "kept", "with loss"], rows, "lrrrr")


def _token_cells(
    name: Cell, before: float | None, after: float | None, supervised: float | None, look: str = ""
) -> list[Cell]:
    kept = percent(after / before) if before and after is not None else DASH
    return [
        name,
        *(
            Cell(text, look=look)
            for text in (_count(before), _count(after), kept, _count(supervised))
        ),
    ]


def _count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


# recipe and place


def _recipe(run: Run) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    defaults = Recipe.model_construct().model_dump(mode="json")
    return [
        (
            table,
            [
                (
                    name,
                    json.dumps(value, ensure_ascii=False),
                    defaults.get(table, {}).get(name) != value,
                )
                for name, value in fields.items()
            ],
        )
        for table, fields in run.recipe.items()
    ]


def _facts(run: Run) -> list[tuple[str, str]]:
    """Where the run came from, as far as its manifest says."""
    manifest = run.manifest
    rows = [("run", run.name), *((words, manifest.get(key)) for key, words in FACTS.items())]
    rows += [(role, _model_text(model)) for role, model in items(manifest.get("models"))]
    rows += [_fact(name, value) for name, value in items(manifest.get("machine"))]
    rows += items(manifest.get("versions"))
    return [(str(name), str(value)) for name, value in rows if value not in (None, "")]


def _fact(name: str, value: Any) -> tuple[str, Any]:
    """A machine's property in words: a name that ends in _bytes becomes a size."""
    size = known(value) if name.endswith("_bytes") else None
    return name.removesuffix("_bytes").replace("_", " "), value if size is None else amount(
        size, "B"
    )


def _model_text(model: Any) -> str:
    if not isinstance(model, dict):
        return str(model)
    size = known(model.get("parameters"))
    parts = [
        model.get("name"),
        f"{amount(size)} parameters" if size else "",
        model.get("fingerprint"),
    ]
    return " · ".join(str(part) for part in parts if part)
