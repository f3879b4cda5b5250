"""The page of one run: its sections.

In: a `Run`, as `kept_run.py` reads it. Out: a `Page`. Decided here: what a reader is shown, and in
which order. A part that is missing is named in a line and leaves no number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mlx_distill.data.account import unused_lines
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.reporting.commands import score_command
from mlx_distill.reporting.kept_run import SEGMENTS, Run
from mlx_distill.reporting.page import (
    Bar,
    Bars,
    Beside,
    Block,
    Charts,
    Command,
    Example,
    Facts,
    Note,
    Page,
    Piece,
    Section,
    Tiles,
)
from mlx_distill.reporting.run_charts import SEGMENT_NAMES, charts_of
from mlx_distill.reporting.run_cost import cost_tiles
from mlx_distill.reporting.run_recipe import recipe_blocks
from mlx_distill.reporting.run_words import (
    headline,
    kl_sentence,
    leads,
    progress,
    shared,
    worse_sentence,
)
from mlx_distill.reporting.table import Cell, Table
from mlx_distill.reporting.written import MODELS, differing, try_it, written_blocks
from mlx_distill.runs.manifest import DataAccount
from mlx_distill.scoring.also import Further
from mlx_distill.scoring.finishing import unfinished_note, unseen_note
from mlx_distill.scoring.score import Difference, Score, compare
from mlx_distill.scoring.unrounded import unrounded_note
from mlx_distill.words import DASH, duration, number, percent, points
from mlx_distill.writing.texts import describe

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
    about = [run.name, run.task, run.manifest.created]
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
        *(Section(f"Scores on {one.task}", _further(run, one)) for one in run.also),
        *_wrote(run),
        Section("Training", _training(run)),
        Section("One example", _example(run), "what the student was trained on"),
        Section("Cost", [Tiles(cost_tiles(run))]),
        Section("Data", [*_missing(run, "manifest.json"), *_data(run)]),
        Section(
            "Recipe",
            [*_missing(run, "recipe.toml"), *recipe_blocks(run)],
            "what differs from the default",
        ),
        Section("Where it ran", [Facts(_facts(run))]),
    ]


def _wrote(run: Run) -> list[Section]:
    """What the models wrote, and how to ask the student."""
    texts, command = written_blocks(run), try_it(run)
    about = (
        "the first: right for one of base and student, wrong for the other"
        if differing(run)
        else ""
    )
    sections = [Section("What they wrote", texts, about)] if texts else []
    return [*sections, *([Section("Try it", command)] if command else [])]


def _training(run: Run) -> list[Block]:
    nearer = [Note(kl_sentence(run))] if kl_sentence(run) else []
    worse = [Note(worse_sentence(run), strong=True)] if worse_sentence(run) else []
    missing = _missing(run, "metrics.jsonl", "validation.jsonl")
    return [*missing, *nearer, *worse, Charts(charts_of(run))]


def _missing(run: Run, *names: str) -> list[Block]:
    return [Note(run.notes[name]) for name in names if name in run.notes]


# scores


def _scores(run: Run) -> list[Block]:
    broken = [name for name in run.notes if name.startswith("eval.json ")]
    missing = _missing(run, "eval.json", "generations.jsonl", *broken)
    scored = _scored(run)
    if "student" not in run.scores:
        missing += [*_noted(run, unseen_note), *not_scored(run)]
    if not scored:
        return missing
    told = [*_noted(run, unfinished_note, unrounded_note), *_ways(run)]
    bars = [score_bar(label, remark, role, score) for label, remark, role, score in scored]
    return [*missing, *told, Bars(bars), *_against(run), _score_table(run, scored)]


def _further(run: Run, one: Further) -> list[Block]:
    """The scores on a further task, as those on the first one are shown."""
    other = replace(run, scores=one.scores, ways=one.ways, compared=[])
    scored = _scored(other)
    bars = Bars([score_bar(label, remark, role, score) for label, remark, role, score in scored])
    told = [*_noted(other, unfinished_note), *_ways(other)]
    return [*told, bars, *_against(other), _score_table(other, scored)]


def _noted(run: Run, *notes: Callable[[Recipe, Mapping[str, Score]], str]) -> list[Note]:
    """What is to be said of the run's scores, as far as it is."""
    said = (note(run.recipe, run.scores) for note in notes) if run.recipe else ()
    return [Note(f"{one}.", strong=True) for one in said if one]


def _ways(run: Run) -> list[Note]:
    ways = ", ".join(f"{count:,} as {way}" for way, count in run.ways.items())
    return [Note(f"Answers are compared with the expected ones: {ways}.")] if ways else []


def not_scored(run: Run) -> list[Block]:
    """How to come to a score."""
    command = score_command(run.folder, run.recipe)
    return [Note("This scores it:"), Command(command)] if command else []


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
        look = "cut" if not token.kept else "loss" if token.supervised else "read"
        last = joined[-1] if joined else Piece("", "", "", "")
        if (last.segment, last.look) == (token.segment, look):
            joined[-1] = replace(last, text=last.text + token.text)
        else:
            joined.append(Piece(token.text, token.segment, look, _edge(last.look, look)))
    return joined


def _edge(before: str, look: str) -> str:
    if (before == "cut") == (look == "cut"):
        return ""
    return "cut" if look == "cut" else "kept from here"


def _legend(run: Run) -> list[tuple[str, str, str, str]]:
    rows = []
    for part in SEGMENTS:
        mine = [token for token in run.sample if token.segment == part]
        kept = sum(token.kept for token in mine)
        loss = sum(token.kept and token.supervised for token in mine)
        cut = f", {kept} kept" if kept < len(mine) else ""
        if mine:
            words = f"{len(mine)} tokens{cut}, {loss or 'none'} with loss"
            rows.append((part, SEGMENT_NAMES[part], words, "" if loss else "faded"))
    return rows


# data


def _data(run: Run) -> list[Block]:
    """Counts of examples and of tokens by segment."""
    data = run.manifest.data
    if data is None:
        return []
    unused = ", ".join(unused_lines(data.not_used))
    notes = [Note(f"Not used: {unused}.")] if unused else []
    if data.ending_tokens:
        said = f"{data.ending_tokens:,} tokens follow a cut, and learn from the text alone."
        notes.insert(0, Note(said))
    return [Beside([_examples_table(data), _tokens_table(data)]), *notes, *_written(run)]


def _written(run: Run) -> list[Block]:
    """What a model wrote for this run to learn from."""
    written = run.manifest.written
    if written is None:
        return []
    whole = sum(row.seconds + row.source_seconds for row in run.metrics)
    share = sum(row.source_seconds for row in run.metrics) / whole if whole else 0.0
    while_training = f"; {percent(share)} of the training's time" if share > 0.01 else ""
    return [Note(f"Written by the {written.by}: {describe(written)}{while_training}.")]


def _examples_table(data: DataAccount) -> Table:
    rows = [
        ("", "read", data.read),
        *(("sub", f"dropped: {reason}", count) for reason, count in data.dropped.items()),
        ("sum", "kept", data.kept),
        ("sub", "for training", data.train),
        *((("sub", "that stay whole", data.whole),) if data.whole else ()),
        *((("sub", "with an answer after the cut", data.ended),) if data.ended else ()),
        ("sub", "for validation", data.validation),
    ]
    cells = [[Cell(text, look=look), Cell(f"{count:,}", look=look)] for look, text, count in rows]
    return Table(["examples", "count"], cells, "lr")


def _tokens_table(data: DataAccount) -> Table:
    counts = {
        part: (tokens.before, tokens.after, tokens.supervised)
        for part, tokens in data.segments.items()
    }
    looks = {part: "strong" if three[2] else "faded" for part, three in counts.items()}
    rows = [
        _token_cells(
            Cell(SEGMENT_NAMES.get(part, part), look=looks[part], dot=part), three, looks[part]
        )
        for part, three in counts.items()
    ]
    before, after, supervised = (sum(three[i] for three in counts.values()) for i in range(3))
    rows.append(_token_cells(Cell("all", look="sum"), (before, after, supervised), look="sum"))
    return Table(["tokens", "whole", "after the cut", "kept", "with loss"], rows, "lrrrr")


def _token_cells(name: Cell, counts: tuple[int, int, int], look: str = "") -> list[Cell]:
    before, after, supervised = counts
    kept = percent(after / before) if before else DASH
    texts = f"{before:,}", f"{after:,}", kept, f"{supervised:,}"
    return [name, *(Cell(text, look=look) for text in texts)]


# the place


def _facts(run: Run) -> list[tuple[str, str]]:
    """Where the run came from, as far as its manifest says."""
    made = run.manifest
    rows = [("run", run.name), *((words, getattr(made, key)) for key, words in FACTS.items())]
    rows += [
        (role, " · ".join(filter(None, (model.name, model.fingerprint))))
        for role, model in made.models.items()
    ]
    rows += [*made.machine.items(), *made.versions.items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]
