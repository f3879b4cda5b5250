"""Rows for `benchmarks/real`: worked problems of three kinds that a small language model can learn.

`python benchmarks/real/problems.py data/worked` writes `train.jsonl`, `pilot.jsonl` (rates are
chosen on it) and `test.jsonl`, whose prompts are disjoint; the kinds take turns.

- **sum**: a chain of additions and subtractions, tens before units, as `chain_sum` of
  reasoning-gym asks it;
- **bits**: the ones in the binary form of a number, by halving it, as its `count_bits`;
- **legs**: the legs of some animals together, as its `leg_counting`.

A solution has 8 to 15 steps, a line each, and every line needs the one before it: an answer that
comes early is a guess. A line is worded in one of three ways, drawn anew, so that a teacher is not
certain of each token and has more to say than the text. reasoning-gym itself is not used. It has no worked solutions for these
three, so the numbers are all that it would give; its prompts carry 10 to 40 tokens of instructions
more, so that half of a sequence would be mostly prompt; and its nearby seeds share problems.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

STEPS = range(8, 16)
PARTS = {"test": 501, "pilot": 300, "train": 3000}
SEED = 20261126
LEGS = {
    "hen": 2,
    "duck": 2,
    "dog": 4,
    "cat": 4,
    "horse": 4,
    "cow": 4,
    "ant": 6,
    "bee": 6,
    "spider": 8,
    "crab": 10,
}
ADDED = (
    "Then {verb} {part}: {sum}.",
    "Next we {verb} {part}, so {sum}.",
    "Now {sum}.",
)
HALVED = (
    "{left} is {parity}, so {ones} so far. {next}",
    "{left} is {parity}, which makes {ones}. {next}",
    "Since {left} is {parity} we have {ones} now. {next}",
)
NEXT = ("Half of it is {half}.", "Halving gives {half}.", "Then comes {half}.")
OF_A_KIND = (
    "A {animal} has {legs} legs, so {many} {animal}s have {product}.",
    "{many} {animal}s with {legs} legs each have {product} legs.",
    "Each {animal} has {legs} legs: {product}.",
)
TOGETHER = (
    "Together that makes {sum}.",
    "So far there are {sum} legs.",
    "Adding them gives {sum}.",
)
Row = dict[str, str]


def chain_sum(draw: random.Random) -> Row:
    """5 to 9 terms up to 60; the total never falls below 0."""
    total = first = draw.randint(1, 60)
    asked, lines = f"What is {first}", [f"Start with {first}."]
    for _ in range(draw.randint(4, 8)):
        term = draw.choice((draw.randint(1, 9), draw.randint(10, 60)))
        sign = draw.choice("+-") if total >= term else "+"
        asked += f" {sign} {term}"
        verb = "add" if sign == "+" else "take away"
        for part in (term // 10 * 10, term % 10):
            if part:
                found = total + part if sign == "+" else total - part
                worked = f"{total} {sign} {part} = {found}"
                lines.append(draw.choice(ADDED).format(verb=verb, part=part, sum=worked))
                total = found
    return _row("sum", f"{asked}?", lines, total)


def count_bits(draw: random.Random) -> Row:
    """A number of 8 to 11 binary digits."""
    number = left = draw.randint(128, 2047)
    ones, lines = 0, []
    while left:
        ones += left % 2
        half = draw.choice(NEXT).format(half=left // 2) if left > 1 else "That was the last one."
        parity = "odd" if left % 2 else "even"
        said = draw.choice(HALVED)
        lines.append(said.format(left=left, parity=parity, ones=ones, next=half))
        left //= 2
    return _row("bits", f"How many ones are in the binary form of {number}?", lines, ones)


def leg_counting(draw: random.Random) -> Row:
    """2 to 9 of each of 4 to 7 animals."""
    total, asked, lines = 0, [], []
    for animal in draw.sample(sorted(LEGS), draw.randint(4, 7)):
        many, legs = draw.randint(2, 9), LEGS[animal]
        asked.append(f"{many} {animal}s")
        product, added = f"{many} * {legs} = {many * legs}", f"{total} + {many * legs}"
        total += many * legs
        said = draw.choice(OF_A_KIND)
        lines.append(said.format(animal=animal, legs=legs, many=many, product=product))
        lines.append(draw.choice(TOGETHER).format(sum=f"{added} = {total}"))
    listed = ", ".join(asked[:-1]) + f" and {asked[-1]}"
    return _row("legs", f"How many legs do {listed} have?", lines, total)


def _row(kind: str, prompt: str, lines: list[str], answer: int) -> Row:
    return {"kind": kind, "prompt": prompt, "cot": "\n".join(lines), "answer": str(answer)}


KINDS: tuple[Callable[[random.Random], Row], ...] = (chain_sum, count_bits, leg_counting)


def rows() -> list[Row]:
    """All rows, no prompt twice; the same ones each time."""
    draw, found = random.Random(SEED), {}
    while len(found) < sum(PARTS.values()):
        kind = KINDS[len(found) % len(KINDS)]
        row = kind(draw)
        if row["cot"].count("\n") + 1 in STEPS:
            found.setdefault(row["prompt"], row)
    return list(found.values())


def write(destination: Annotated[Path, typer.Argument(help="folder for the rows")]) -> None:
    """Write train.jsonl, pilot.jsonl and test.jsonl."""
    drawn = rows()
    destination.mkdir(parents=True, exist_ok=True)
    for name, many in PARTS.items():
        part, drawn = drawn[:many], drawn[many:]
        text = "".join(json.dumps(row) + "\n" for row in part)
        (destination / f"{name}.jsonl").write_text(text, encoding="utf-8")
        typer.echo(f"{destination}/{name}.jsonl: {many:,} rows")


if __name__ == "__main__":
    typer.run(write)
