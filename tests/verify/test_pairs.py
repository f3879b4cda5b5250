"""The table of pairs, each held against the verifier."""

import pytest
from pairs import PAIRS

from mlx_distill.verify import compared_as, states

CASES = [
    (gold, answer, right)
    for gold, _, good, bad in PAIRS
    for answers, right in ((good, True), (bad, False))
    for answer in answers
]


def test_the_table_is_large():
    assert len(set(CASES)) > 1200


@pytest.mark.parametrize(("gold", "how"), [(gold, how) for gold, how, _, _ in PAIRS])
def test_how_a_gold_answer_is_compared(gold, how):
    assert compared_as(gold) == how


@pytest.mark.parametrize(("gold", "answer", "right"), CASES)
def test_a_pair(gold, answer, right):
    assert states(gold, answer) is right
