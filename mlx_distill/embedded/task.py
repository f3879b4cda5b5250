"""The embedded task `dial`: pull every lever as often as its counter says, in any order; where does
the dial stop?

In: a partition, a count and a seed. Out: `Worked` problems that never repeat. Decided here: the
rules, how hard a problem is, which problems belong to which partition, and how reliable the writer
of each partition's reasoning is.

A prompt is a dial (a letter) and four counters (digits): `K3725`. Pulling lever a, b, c or d takes
one from its counter and turns the dial 1, 5, 8 or 11 letters on, past Z to A. A step of the
reasoning names the lever and writes the dial and the counters after it:

    K3725 -> cS3715 -> aT2715 -> ... -> dP0000, answer P

Every order ends on the same letter, since turns commute; so up to four next steps are right and a
teacher trained on all orders is uncertain by nature. Each step needs only the line before it, and
there are 16 to 20 of them, so small errors compound: 96 % right steps give half the answers, 90 %
one in seven.

Partitions (`teacher`, `base`, `train`, `held_out`) share no prompt, whatever the seeds and counts:
a hash of the prompt says to which one it belongs. Problems have 16 to 20 pulls; those of `teacher`
1 to 20, from which the end of a trace and its answer are learned sooner. The partitions differ in
the hand that writes the reasoning:

- `teacher` and `held_out` are right in every step.
- `train`, which the student learns from, slips: with probability `SLIP_RATE["train"]` a turn ends
  on a wrong letter, uniformly among the 25, and the writer goes on from there; the answer is where
  that writer's dial stopped. Levers and counters are always right.
- `base` never slips but learned on a worn dial: from the letters of `WORN` the levers named there
  turn one letter too few. So a student base that has learned it well knows the format and every
  counter, and believes something wrong.
"""

import hashlib
import random
from functools import cache
from itertools import product
from string import ascii_uppercase
from typing import NamedTuple

from mlx_distill.errors import DataError

NAME = "dial"
LEVERS = "abcd"
TURNS = (1, 5, 8, 11)
DIAL = ascii_uppercase
PULLS = {"teacher": (1, 20), "base": (16, 20), "train": (16, 20), "held_out": (16, 20)}
SHARES = {"teacher": 128, "base": 48, "train": 32, "held_out": 48}  # of 256
MOST = 9_000  # the smallest partition, train, holds some 10,700 prompts
SLIP_RATE = {"teacher": 0.0, "base": 0.0, "train": 0.3, "held_out": 0.0}
WORN = {"base": {"c": "AEIO", "d": "AEIO"}}  # {partition: {lever: letters}}


class Worked(NamedTuple):
    """A problem as a row of data: what is asked, the steps, and where they end."""

    prompt: str
    cot: str
    answer: str


def generate(partition: str, count: int, seed: int) -> list[Worked]:
    """`count` examples of a partition, no prompt twice; the same arguments give the same examples.

    Raises `KeyError` for an unknown partition, `DataError` where more than `MOST` examples are
    asked for.
    """
    if count > MOST:
        raise DataError(
            f"embedded:{NAME}: {count:,} examples asked for; ask for at most {MOST:,}, its "
            "prompts are finite"
        )
    slip_rate = SLIP_RATE[partition]
    writer = random.Random(f"{NAME}/{partition}/{seed}")
    examples: dict[str, Worked] = {}
    while len(examples) < count:
        dial, counters = draw(partition, writer)
        prompt = line(dial, counters)
        if partition_of(prompt) == partition and prompt not in examples:
            examples[prompt] = work(dial, counters, slip_rate, WORN.get(partition, {}), writer)
    return list(examples.values())


def verify(expected: str, text_after_think: str) -> bool:
    """Whether the text after `</think>` is the expected letter and nothing else, white space and a
    turn's end aside.
    """
    return text_after_think.removesuffix("<|im_end|>").strip() == expected


def partition_of(prompt: str) -> str:
    """The one partition to which a prompt belongs, by its hash."""
    byte = hashlib.sha256(prompt.encode()).digest()[0]
    for partition, share in SHARES.items():
        if byte < share:
            return partition
        byte -= share
    raise AssertionError("the shares add up to 256")


def draw(partition: str, writer: random.Random) -> tuple[int, list[int]]:
    """(dial, counters) of a problem: first how many pulls, uniformly, then uniformly among the
    counters that have so many.
    """
    pulls = writer.randint(*PULLS[partition])
    return writer.randrange(len(DIAL)), list(writer.choice(counters_by_pulls()[pulls]))


@cache
def counters_by_pulls() -> dict[int, list[tuple[int, ...]]]:
    """All settings of the four counters, by their sum."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for counters in product(range(10), repeat=len(LEVERS)):
        found.setdefault(sum(counters), []).append(counters)
    return found


def work(
    dial: int, counters: list[int], slip_rate: float, worn: dict[str, str], writer: random.Random
) -> Worked:
    """One example: levers pulled in random order, uniformly among those left, by a writer who
    slips, on a dial that may be worn.
    """
    prompt, left, steps = line(dial, counters), list(counters), []
    while any(left):
        lever = writer.choice([index for index, pulls in enumerate(left) if pulls])
        left[lever] -= 1
        is_worn = DIAL[dial] in worn.get(LEVERS[lever], "")
        dial = (pull(dial, lever) - is_worn) % len(DIAL)
        if writer.random() < slip_rate:
            dial = (dial + writer.randrange(1, len(DIAL))) % len(DIAL)
        steps.append(LEVERS[lever] + line(dial, left))
    return Worked(prompt, "\n".join(steps), DIAL[dial])


def pull(dial: int, lever: int) -> int:
    """Where the dial stands after a lever is pulled once."""
    return (dial + TURNS[lever]) % len(DIAL)


def line(dial: int, counters: list[int]) -> str:
    """A state as it is written: the dial's letter and the four counters."""
    return DIAL[dial] + "".join(map(str, counters))
