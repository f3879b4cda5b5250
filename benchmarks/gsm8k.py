"""SmolLM2-135M on GSM8K: from the run folders of the three recipes to kept files to a table.

    python benchmarks/gsm8k.py keep [RUNS] [SET]   copy the runs' small files to smollm2-gsm8k/SET/
    python benchmarks/gsm8k.py write               the table of benchmarks/README.md

`shipped` are the recipes as they are; `half` as they were first: the first half of the chain of
thought alone, of every example; `whole` what did best in real/. No number is typed in.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.tables import rewrite_section  # noqa: E402
from mlx_distill.reporting.kept_run import Run, read_run  # noqa: E402
from mlx_distill.reporting.markdown import table  # noqa: E402
from mlx_distill.words import DASH, percent  # noqa: E402

KEPT = HERE / "smollm2-gsm8k"
FILES = ("recipe.toml", "manifest.json", "metrics.jsonl", "validation.jsonl", "eval.json")
RUNS = {  # kept folder → the recipe's run
    "teacher": "smollm2-gsm8k-teacher",
    "lora": "smollm2-gsm8k-cot50",
    "15l": "smollm2-15l-gsm8k-cot50",
}
SETS = {
    "half": "the first half of the chain of thought alone",
    "shipped": "the same, a quarter of the examples whole, answers learned too",
    "whole": "whole sequences without the teacher, 0.8 of the steps",
}
HEAD = ["model", "NLL cot", "KL cot", "NLL answer", "KL answer", "finished", "tokens", "right"]
app = typer.Typer(add_completion=False)


@app.command()
def keep(
    source: Annotated[Path, typer.Argument(help="folder of the runs")] = Path("runs"),
    kept: Annotated[str, typer.Argument(help=", ".join(SETS))] = "shipped",
) -> None:
    """Copy what the table reads of each run."""
    for name, run in RUNS.items():
        folder = KEPT / kept / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            shutil.copy(source / run / file, folder / file)


@app.command()
def write() -> None:
    """Rewrite the table, a part for each set of recipes that has rows."""
    parts = [part(name) for name in SETS if (KEPT / name).exists()]
    rewrite_section("gsm8k", "\n\n".join(parts))


def part(name: str) -> str:
    """A set's line and its table."""
    folder = KEPT / name
    runs = {one: read_run(folder / one) for one in RUNS}
    commits = ", ".join(sorted({run.manifest.git_commit[:7] for run in runs.values()}))
    asked = {run.recipe.student.compute_dtype for run in runs.values()}
    formats = ", ".join(sorted("float32" if one == "auto" else one for one in asked))
    steps = {
        one: f"{run.manifest.steps} steps of {run.recipe.batch.global_batch_size}"
        for one, run in runs.items()
    }
    rows = [
        row(
            "SmolLM2-135M-Instruct", folder / "lora", "base", first=True, scores=folder / "teacher"
        ),
        row(f"fine-tuned for {steps['teacher']}: the teacher", folder / "teacher"),
        row(f"{taught('LoRA', runs['lora'])}, {steps['lora']}", folder / "lora"),
        row("the 15-layer prune, before", folder / "15l", "base", first=True),
        row(f"{taught('the prune', runs['15l'])}, {steps['15l']}", folder / "15l"),
    ]
    cut = SETS[name][0].upper() + SETS[name][1:]
    said = f"**{cut}** ({runs['lora'].manifest.device}, {formats}, commit {commits})"
    return f"{said}\n\n{table(HEAD, rows, 'lrrrrrrr')}".replace("\u00a0", " ")


def taught(student: str, run: Run) -> str:
    """A student by what it learned from."""
    return f"{student} from {'that teacher' if run.recipe.objective.kd_weight else 'the texts'}"


def row(
    name: str, folder: Path, model: str = "student", first: bool = False, scores: Path | None = None
) -> list[str]:
    """A model's line: held-out rows before the first or after the last step, and its score."""
    lines = (folder / "validation.jsonl").read_text().splitlines()
    held_out = json.loads(lines[0 if first else -1])
    score = json.loads(((scores or folder) / "eval.json").read_text())["scores"].get(model)
    numbers = [held_out.get(key) for key in ("ce_cot", "kl_cot", "ce_answer", "kl_answer")]
    return [
        name,
        *(DASH if number is None else f"{number:.3f}" for number in numbers),
        *answers(score),
    ]


def answers(score: dict | None) -> list[str]:
    if score is None:
        return [DASH] * 3
    interval = f"{percent(score['low'])} to {percent(score['high'])}"
    return [
        percent(1 - score["unfinished"]),
        f"{score['mean_tokens']:.0f}",
        f"{percent(score['accuracy'])} ({interval})",
    ]


if __name__ == "__main__":
    app()
