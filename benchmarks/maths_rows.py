"""Rows for `benchmarks/maths.py`: a hundred problems each of GSM8K and of a procedural set, with
their worked solutions.

    python benchmarks/maths_rows.py data/maths --gsm8k FILE

In: a file of GSM8K's test rows (`question`, `answer`), and the package reasoning-gym (Apache-2.0),
which may live in an environment of its own: this script imports nothing of ours. Out: `gsm8k.jsonl`
and `chain_sum.jsonl` (`prompt`, `cot`, `answer`). reasoning-gym gives no solution of a chain of sums;
it is worked here, a line for each term.
"""

import json
import random
from pathlib import Path
from typing import Annotated

import typer

MANY = 100
SEED = 20261127
TERMS, DIGITS = (2, 4), (1, 2)
Row = dict[str, str]


def gsm8k_rows(path: Path) -> list[Row]:
    """`MANY` rows of a file, as they stand there."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return random.Random(SEED).sample(rows, MANY)


def chain_sums() -> list[Row]:
    """`MANY` different chains of two to four terms of one or two digits."""
    import reasoning_gym

    drawn = reasoning_gym.create_dataset(
        "chain_sum",
        min_terms=TERMS[0],
        max_terms=TERMS[1],
        min_digits=DIGITS[0],
        max_digits=DIGITS[1],
        seed=SEED,
        size=2 * MANY,
    )
    rows = {one["question"]: one for one in drawn}
    return [
        {
            "prompt": one["question"],
            "cot": worked(one["metadata"]["expression"]),
            "answer": one["answer"],
        }
        for one in list(rows.values())[:MANY]
    ]


def worked(expression: str) -> str:
    """ "12 - 5 + 1" → "12 - 5 = 7" and "7 + 1 = 8", a line each."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        found = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {found}")
        total = found
    return "\n".join(lines)


def write(
    destination: Annotated[Path, typer.Argument(help="folder for the rows")],
    gsm8k: Annotated[Path, typer.Option(help="GSM8K's test rows, a .jsonl")],
) -> None:
    """Write gsm8k.jsonl and chain_sum.jsonl."""
    destination.mkdir(parents=True, exist_ok=True)
    for name, rows in (("gsm8k", gsm8k_rows(gsm8k)), ("chain_sum", chain_sums())):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (destination / f"{name}.jsonl").write_text(text, encoding="utf-8")
        typer.echo(f"{destination}/{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    typer.run(write)
