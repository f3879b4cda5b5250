"""Rows of chain sums for `benchmarks/real`: a task that a small language model can learn.

`python benchmarks/real/chain_sums.py data/chain-sums` writes `train.jsonl` and `test.jsonl`, whose
prompts are disjoint. A prompt has 4 to 6 terms of one or two digits, the reasoning a line for each
of them; every line needs the one before it, so an answer that comes early is a guess.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import typer

TERMS, LARGEST = (4, 6), 99
TRAIN, TEST, SEED = 3000, 500, 20261126


def worked(draw: random.Random) -> dict[str, str]:
    """One problem as a row of the format "columns"."""
    terms = [draw.randint(1, LARGEST) * draw.choice((1, -1)) for _ in range(draw.randint(*TERMS))]
    asked = str(terms[0]) + "".join(f" {'+' if n > 0 else '-'} {abs(n)}" for n in terms[1:])
    total, lines = terms[0], [f"Start with {terms[0]}."]
    for n in terms[1:]:
        sign, verb = ("+", "Add") if n > 0 else ("-", "Subtract")
        lines.append(f"{verb} {abs(n)}: {total} {sign} {abs(n)} = {total + n}.")
        total += n
    prompt = f"What is {asked}? Work it out step by step."
    return {"prompt": prompt, "cot": "\n".join(lines), "answer": str(total)}


def write(destination: Annotated[Path, typer.Argument(help="folder for the rows")]) -> None:
    """Write train.jsonl and test.jsonl; the same rows each time."""
    draw, rows = random.Random(SEED), {}
    while len(rows) < TRAIN + TEST:
        row = worked(draw)
        rows[row["prompt"]] = row
    drawn = list(rows.values())
    destination.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", drawn[:TEST]), ("train", drawn[TEST:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (destination / f"{name}.jsonl").write_text(text, encoding="utf-8")
    typer.echo(f"{destination}: {TRAIN:,} rows to learn from, {TEST:,} to be asked")


if __name__ == "__main__":
    typer.run(write)
