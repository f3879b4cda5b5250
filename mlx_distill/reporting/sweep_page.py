"""The page of a sweep: what its runs say together → a Markdown file and one self-contained HTML
page.

In: a `Swept`, whose rows `study.py` reads. Out: `report.md` and `report.html`. Every number comes
from `study.py`.
"""

from pathlib import Path

from mlx_distill.reporting.charts import Curves, Scatter
from mlx_distill.reporting.page import Bars, Block, Charts, Fold, Note, Page, Section, write
from mlx_distill.reporting.sweep_charts import bars, cost_chart, pareto_chart, quality_chart
from mlx_distill.reporting.sweep_findings import Findings, Swept, findings
from mlx_distill.reporting.sweep_tables import budgets, costs, every_run, failures, quality
from mlx_distill.reporting.sweep_words import headline, leads, notes, teacher_sentence
from mlx_distill.reporting.table import Link, Links, Table
from mlx_distill.words import counted


def write_report(swept: Swept, out: Path) -> Path:
    """Write `report.md` and `report.html` into the folder `out`, made if need be; the path of the
    page.

    Raises `RunError` where they cannot be written and `DataError` where students answered different
    problems.
    """
    return write(sweep_page(findings(swept)), out).html


def sweep_page(found: Findings) -> Page:
    """The page, its empty sections left out."""
    runs = sum(row.role == "student" for row in found.swept.rows)
    counts = (len(found.students), "condition"), (runs, "run"), (len(found.seeds), "seed")
    about = [found.swept.name, ", ".join(counted(*each) for each in counts)]
    sections = [section for section in _sections(found) if section.blocks]
    return Page(about, headline(found), found.swept.question, leads(found), sections, notes(found))


def _sections(found: Findings) -> list[Section]:
    joined = "joined: no cheaper condition is as accurate"
    return [
        Section(
            "Quality", [*_charts(quality_chart(found)), *_bars(found), *_table(quality(found))]
        ),
        Section("Cost", _costs(found) if found.students else []),
        Section("Quality for cost", _charts(pareto_chart(found)), joined),
        Section(
            "Best condition for each budget",
            _table(budgets(found)),
            "share of the dearest condition's arithmetic; only what beats the student before"
            if found.base
            else "share of the dearest condition's arithmetic",
        ),
        Section("Failed runs", _table(failures(found))),
        Section("Files", _files(found)),
    ]


def _files(found: Findings) -> list[Block]:
    """Where the rows, and each run's page and recipe, lie."""
    results, runs = found.swept.results, every_run(found)
    rows = [Links("All rows of this page", [Link(results, results)])] if results else []
    each = [Fold("Each run", "its page, recipe and log", [], [], [runs])] if runs.rows else []
    return [*rows, *each]


def _costs(found: Findings) -> list[Block]:
    taught = teacher_sentence(found)
    return [*([Note(taught)] if taught else []), *_charts(cost_chart(found)), *_table(costs(found))]


def _charts(chart: Curves | Scatter | None) -> list[Block]:
    return [Charts([chart])] if chart else []


def _bars(found: Findings) -> list[Block]:
    drawn = bars(found)
    return [Bars(drawn)] if drawn else []


def _table(table: Table) -> list[Block]:
    return [table] if table.rows else []
