"""README's run command as a stranger gives it: in a fresh clone, with a fresh environment.

    python benchmarks/first_command.py run [BLAS …]   append to results/first_command.csv, rewrite
                                                      README's sentence
    python benchmarks/first_command.py write          rewrite the sentence only

`BLAS` is what `MLX_DISTILL_BLAS` says, "scipy" unless named: what a machine without OpenBLAS has.
Packages come from pip's cache where it has them.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machines, workers
from benchmarks.tables import append_rows, read_rows, rewrite_section

ROOT = Path(__file__).resolve().parents[1]
FILE = "first_command"
NAMES = {"scipy": "scipy's OpenBLAS", "bundled": "MLX's bundled BLAS"}
app = typer.Typer(add_completion=False)


def command() -> list[str]:
    """What README says to type: its parts, in order."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- run-command -->\n```sh\n(.*)\n```", text)
    assert found
    return found[1].split(" && ")


@app.command()
def run(blas: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    append_rows(FILE, [measured(one) for one in blas or ["scipy"]])
    write()


def measured(blas: str) -> dict[str, object]:
    hidden = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", *workers.THREADS)
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    *install, last = command()
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "mlx-distill"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment |= {
            "MLX_DISTILL_BLAS": blas,
            "MLX_DISTILL_CACHE": f"{scratch}/cache",
            "MLX_DISTILL_SCORES": "off",
        }
        row = {**machines.facts(), "blas": blas}
        for name, words in (("install", " && ".join(install)), ("run", last)):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(["bash", "-euc", words], cwd=clone, env=environment, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            row[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
            row[f"{name}_cpu_seconds"] = round(
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
            )
        scores = json.loads((clone / "runs" / "cot50" / "eval.json").read_text())
        row["accuracy"] = scores["scores"]["student"]["accuracy"]
    return row


@app.command()
def write() -> None:
    newest = {row["blas"]: row for row in read_rows(FILE)}
    text = "; ".join(
        f"with {NAMES.get(blas, blas)} {float(row['install_seconds']):.0f} s to install, "
        f"{float(row['run_seconds']):.0f} s to run ({float(row['run_cpu_seconds']):.0f} s of "
        f"processor time, {float(row['accuracy']):.1%})"
        for blas, row in newest.items()
    )
    said = f"This command, typed in a fresh clone on {next(iter(newest.values()))['cores']} cores: "
    rewrite_section("first-command", f"{said}{text}.", ROOT / "README.md")


if __name__ == "__main__":
    app()
