"""What the method's options give on the embedded task: kept rows of objectives.toml → the table of
benchmarks/README.md and the README's table of options.

    python benchmarks/objectives.py keep runs/objectives    copy the sweep's rows to results/
    python benchmarks/objectives.py write                   both tables from the kept rows

Every number is computed from the rows. An option that no arm of this sweep shows has the section
where it was measured, or a dash.
"""

import shutil
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.bench_divergences import SAID  # noqa: E402
from benchmarks.findings import gap, share  # noqa: E402
from benchmarks.tables import rewrite_section  # noqa: E402
from mlx_distill.reporting.markdown import pipe_table, table  # noqa: E402
from mlx_distill.reporting.study import (  # noqa: E402
    Condition,
    conditions,
    difference,
    read_rows,
)
from mlx_distill.words import DASH, amount, percent  # noqa: E402

KEPT = HERE / "results" / "objectives.csv"
WRITERS = HERE / "results" / "writers.csv"  # of writers.toml, whose first arm is cot50 too
TITLE = HERE.parent / "README.md"
BASE = "forward_kl, as cot50"
BOTH, ALL = "both", "all"
app = typer.Typer(add_completion=False)


class Option(NamedTuple):
    """A row of the README's table: what a recipe says, what it is, on which backends and from which
    teacher caches it can be had; the arm of the sweep, or where else it was measured.
    """

    says: str
    definition: str
    backends: str
    caches: str
    arm: str = ""
    elsewhere: str = DASH


def measured(section: str) -> str:
    """A link to a section of benchmarks/README.md."""
    anchor = section.lower().replace(" ", "-").replace(",", "")
    return f"[{section.lower()}](benchmarks/README.md#{anchor})"


def divergences() -> list[Option]:
    found = []
    for name, (definition, source, _, sparse) in SAID.items():
        says = (
            'divergence = "tvd"`, `tvd_scale = "log"'
            if name == "log_tvd"
            else f'divergence = "{name}"'
        )
        caches = "all" if name == "forward_kl" else "`hidden`, `top_k`" if sparse else "`hidden`"
        arm = BASE if name == "forward_kl" else name
        what = definition.replace("\\|", "|")
        found.append(Option(f"`{says}`", f"{what} ({source})", BOTH, caches, arm))
    return found


SELECTED = {
    "random": "a random share of the tokens",
    "student_entropy": "those where the student is least sure",
    "teacher_entropy": "those where the teacher is least sure",
    "divergence": "those where the two differ most",
}
FINISH = measured("Students that finish")
ABOVE = "[above](#what-the-paper-says-and-what-we-measured)"
CACHED = "[teacher cache](docs/teacher-cache.md)"
ROUNDED = measured("A quantised student")
PACKED = measured("Adapters on four bits")
PRUNED = "[a pruned student](benchmarks/README.md#a-pruned-student)"
OTHERS = [
    *(
        Option(f'`selection.by = "{rule}"`', what, BOTH, ALL, f"half of the tokens, {rule}")
        for rule, what in SELECTED.items()
    ),
    Option('`selection.by = "position"`', "those that `position_weight` favours", BOTH, ALL),
    Option("`selection.redraw`", "a random choice again each epoch, or once", BOTH, ALL),
    *(
        Option(
            f'`position_weight = "{word}"`', f"{when} weigh more", BOTH, ALL, f"{when} weigh more"
        )
        for word, when in (("falling", "early tokens"), ("rising", "late tokens"))
    ),
    Option(
        "`hidden_weight`",
        "squared distance of hidden states, through a trained map",
        BOTH,
        "none",
        "hidden states, mse",
    ),
    Option(
        '`hidden_distance = "cosine"`', "1 − their cosine", BOTH, "none", "hidden states, cosine"
    ),
    Option(
        '`optimizer = "schedule_free_adamw"`',
        "AdamW beside a running mean, which is the student (Defazio et al. 2024)",
        BOTH,
        ALL,
        "schedule_free_adamw",
    ),
    Option(
        "`kd_weight`", "the teacher's part of the loss; the rest is the text", BOTH, ALL, "", ABOVE
    ),
    Option("`temperature`", "of both distributions in the divergence", BOTH, ALL),
    Option("`segments`", "which of prompt, reasoning and answer are learned", BOTH, ALL, "", ABOVE),
    Option(
        "`fraction`, `keep`, `span`", "how much of a text, and which part", BOTH, ALL, "", ABOVE
    ),
    Option(
        "`spread`", "a cut of its own for each text, drawn around `fraction`", BOTH, ALL, "", FINISH
    ),
    Option("`token_share`", "a random share of the tokens, drawn once", BOTH, ALL),
    Option(
        "`whole_share`, `ending`", "whole texts, or an answer after a cut", BOTH, ALL, "", FINISH
    ),
    Option('`rollouts.by = "teacher"`', "text of the teacher", BOTH, ALL, "the teacher's text"),
    Option(
        '`rollouts.by = "student"`',
        "text of the student, as it is before training",
        BOTH,
        ALL,
        "the student's text, written once",
    ),
    Option(
        "`rollouts.refresh_every`",
        "text of the student as it learns",
        BOTH,
        "none",
        "the student's text, written again every 50 steps",
    ),
    Option(
        '`rollouts.keep = "right"`, `weigh`',
        "right texts alone; problems by the share that is right",
        BOTH,
        ALL,
    ),
    Option(
        '`cache = "top_k"`, `"sampled"`, `"hidden"`',
        "the teacher's answers on disk",
        BOTH,
        DASH,
        "",
        CACHED,
    ),
    Option('`tuning = "lora"`, `"dora"`', "adapters on a frozen student", BOTH, ALL, "", FINISH),
    Option("`[prune]`", "a student cut from its base or teacher", BOTH, ALL, "", PRUNED),
    Option(
        "`teacher.quantize_bits`",
        "a teacher in few bits (measured: MLX's four)",
        "both; NF4: torch",
        ALL,
        "a teacher in four bits",
    ),
    Option(
        "`student.quantize_bits`",
        "adapters on a base of few bits",
        "both; NF4: torch",
        ALL,
        "",
        PACKED,
    ),
    Option("`quantize_aware_bits`", "a student that learns rounded", BOTH, ALL, "", ROUNDED),
]


@app.command()
def keep(
    folder: Annotated[Path, typer.Argument(help="The sweep's folder.")] = Path("runs/objectives"),
) -> None:
    """Copy the sweep's rows."""
    shutil.copy(folder / "results.csv", KEPT)


@app.command()
def write() -> None:
    """Both tables from the kept rows."""
    rows = read_rows(KEPT)
    arms = {arm.label: arm for arm in conditions(rows)}
    rewrite_section("objectives", page(arms))
    rewrite_section("options", options(arms), TITLE)


def page(arms: dict[str, Condition]) -> str:
    """Every arm beside cot50 as it is."""
    reference, one = arms[BASE], arms[BASE].rows[0]
    seeds = sorted({row.seed for arm in arms.values() for row in arm.rows})
    said = (
        f"{sum(len(arm.rows) for arm in arms.values())} runs, seeds {', '.join(map(str, seeds))}, "
        f"{len(one.right)} held-out problems; {one.backend} on {one.device}; commit {one.commit}."
    )
    head = ["arm", "seeds", "right", f"against {BASE}", "finished", "KL", "FLOPs"]
    lines = [
        [
            name,
            str(len(arm.rows)),
            share(arm.accuracy),
            DASH if arm is reference else against(arm, reference),
            percent(1 - arm.cost("unfinished")),
            f"{arm.cost('kl'):.3f}",
            amount(arm.cost("flops"), "FLOP"),
        ]
        for name, arm in arms.items()
    ]
    return said + "\n\n" + table(head, lines, "l" + "r" * 6).replace("\u00a0", " ")


def options(arms: dict[str, Condition]) -> str:
    """The README's table."""
    reference, (cot50, *others) = arms[BASE], conditions(read_rows(WRITERS))
    beside = {arm.label: (arm, reference) for arm in arms.values()}
    beside |= {arm.label: (arm, cot50) for arm in others}
    head = ["in a recipe", "what it is", "on MLX, torch", "teacher caches", "measured"]
    lines = []
    for option in (*divergences(), *OTHERS):
        found = option.elsewhere
        if option.arm in beside:
            arm, base = beside[option.arm]
            found = f"{share(arm.accuracy)} right" if arm is base else against(arm, base)
        lines.append([option.says, option.definition, option.backends, option.caches, found])
    return pipe_table(head, lines, "lllll").replace("\u00a0", " ")


def against(arm: Condition, reference: Condition) -> str:
    found = difference(arm, reference)
    return gap(found) if found else DASH


if __name__ == "__main__":
    app()
