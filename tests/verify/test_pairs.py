"""The table of pairs, each held against the verifier."""

import re
from pathlib import Path

import pytest
from pairs import PAIRS

from mlx_distill.verify import compared_as, states

ROOT = Path(__file__).parents[2]
CASES = [
    (gold, answer, right)
    for gold, _, good, bad in PAIRS
    for answers, right in ((good, True), (bad, False))
    for answer in answers
]


def test_the_table_is_large_and_as_large_as_is_said():
    assert len(set(CASES)) > 1200
    for name in ("docs/scoring.md", "CHANGELOG.md"):
        said = re.findall(r"([\d,]+) pairs", (ROOT / name).read_text(encoding="utf-8"))
        assert said == [f"{len(set(CASES)):,}"], name


@pytest.mark.parametrize(("gold", "how"), [(gold, how) for gold, how, _, _ in PAIRS])
def test_how_a_gold_answer_is_compared(gold, how):
    assert compared_as(gold) == how


@pytest.mark.parametrize(("gold", "answer", "right"), CASES)
def test_a_pair(gold, answer, right):
    assert states(gold, answer) is right
