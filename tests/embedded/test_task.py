"""The dial task: the same problems for the same seed, partitions apart, every step of a trace
re-derived from the rules.
"""

import re
from collections import Counter

import pytest

from mlx_distill.embedded import EMBEDDED, task
from mlx_distill.errors import DataError

TURN = {"a": 1, "b": 5, "c": 8, "d": 11}  # the rules once more, on purpose
STEP = re.compile(r"([a-d])([A-Z])(\d)(\d)(\d)(\d)")


def replay(example):
    """(wrong turns, all turns) of a trace whose levers and counters must all be right and whose
    answer must follow.

    A wrong turn is (lever, letter before, how many letters too far).
    """
    dial, *counters = example.prompt
    counters, wrong, lines = [int(digit) for digit in counters], [], example.cot.split("\n")
    for text in lines:
        lever, after, *digits = STEP.fullmatch(text).groups()
        assert counters["abcd".index(lever)] > 0, "the lever had no pulls left"
        counters["abcd".index(lever)] -= 1
        assert [int(digit) for digit in digits] == counters
        off = (ord(after) - ord(dial) - TURN[lever]) % 26
        if off:
            wrong.append((lever, dial, off))
        dial = after
    assert counters == [0, 0, 0, 0] and example.answer == dial
    return wrong, len(lines)


def steps(example):
    """(lever, letter before it is pulled) of each step."""
    letters = [example.prompt[0], *(text[1] for text in example.cot.split("\n"))]
    return zip((text[0] for text in example.cot.split("\n")), letters, strict=False)


def test_the_same_seed_gives_the_same_examples_and_another_seed_others():
    first, again, other = (task.generate("train", 50, seed) for seed in (3, 3, 4))
    assert first == again
    assert {example.prompt for example in first} != {example.prompt for example in other}
    assert task.generate("train", 20, 3) == first[:20]


def test_a_problem_is_what_it_was():
    """Shipped weights were trained and scored on these: a change of the generator must not go
    unnoticed.
    """
    example = task.generate("held_out", 1, 0)[0]
    assert (example.prompt, example.cot.split("\n")[:2], example.answer) == FIRST_HELD_OUT


FIRST_HELD_OUT = ("Z8108", ["dK8107", "aL7107"], "W")


@pytest.mark.parametrize("partition", task.SHARES)
def test_problems_are_as_long_as_documented(partition):
    shortest, longest = task.PULLS[partition]
    assert {len(example.cot.split("\n")) for example in task.generate(partition, 1000, 0)} == set(
        range(shortest, longest + 1)
    )


@pytest.mark.parametrize("partition", task.SHARES)
def test_no_prompt_twice(partition):
    examples = task.generate(partition, 3000, 0)
    assert len({example.prompt for example in examples}) == len(set(examples)) == 3000


def test_partitions_share_no_prompt_whatever_the_seed():
    prompts = {
        partition: {
            example.prompt for seed in (0, 1) for example in task.generate(partition, 2000, seed)
        }
        for partition in task.SHARES
    }
    for partition, own in prompts.items():
        for other, theirs in prompts.items():
            assert partition == other or not own & theirs
    assert sum(task.SHARES.values()) == 256


@pytest.mark.parametrize("partition", ["teacher", "held_out"])
def test_every_clean_step_follows_from_the_one_before(partition):
    for example in task.generate(partition, 500, 1):
        assert replay(example)[0] == []


def test_a_clean_answer_does_not_depend_on_the_order():
    for example in task.generate("held_out", 200, 2):
        dial, *counters = example.prompt
        total = (
            ord(dial)
            - 65
            + sum(TURN[lever] * int(pulls) for lever, pulls in zip("abcd", counters, strict=True))
        )
        assert example.answer == chr(65 + total % 26)


def test_a_writer_slips_as_often_as_documented_and_to_any_letter():
    replays = [replay(example) for example in task.generate("train", 3000, 0)]
    wrong, turns = (
        [slip for slips, _ in replays for slip in slips],
        sum(count for _, count in replays),
    )
    assert len(wrong) / turns == pytest.approx(
        task.SLIP_RATE["train"], abs=0.01
    )  # 54,000 turns: ± 0.002
    seen = Counter(off for _, _, off in wrong)
    assert set(seen) == set(range(1, 26)) and max(seen.values()) < 1.5 * min(seen.values())


def test_the_base_learned_on_a_worn_dial_and_never_slips():
    wrong = [slip for example in task.generate("base", 2000, 0) for slip in replay(example)[0]]
    worn = {(lever, letter) for lever, letters in task.WORN["base"].items() for letter in letters}
    assert {(lever, letter) for lever, letter, _ in wrong} == worn
    assert {off for _, _, off in wrong} == {25}  # one letter too few
    clean = [example for example in task.generate("base", 300, 0) if not replay(example)[0]]
    assert all((lever, dial) not in worn for example in clean for lever, dial in steps(example))


def test_the_order_of_the_levers_is_free():
    openings = {example.cot[0] for example in task.generate("teacher", 200, 0)}
    assert openings == set("abcd")


@pytest.mark.parametrize("text", ["\n\nK", "K", " K\n", "K<|im_end|>"])
def test_the_verifier_accepts_the_right_letter(text):
    assert task.verify("K", text)


@pytest.mark.parametrize("text", ["", "\n\n", "L", "k", "KK", "K L", "The answer is K", "K0000"])
def test_the_verifier_refuses_anything_else(text):
    assert not task.verify("K", text)


def test_an_unknown_partition_is_refused():
    with pytest.raises(KeyError):
        task.generate("test", 1, 0)


def test_more_examples_than_there_are_prompts_are_refused():
    with pytest.raises(DataError, match="at most 9,000"):
        task.generate("train", 9_001, 0)


def test_it_can_be_named_in_a_recipe():
    assert EMBEDDED[task.NAME] is task.generate
