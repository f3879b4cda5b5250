"""Answers that were not written to be read: they end, they are wrong, nothing is printed, and the
next one is judged.
"""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_distill.verify import compared_as, states, sympy_child

REFUSED = [
    "9**9**9**9",
    "9^{9^{9^9}}",
    "9^9^9^9",
    "100000!",
    "(10^6)!",
    "20!!",
    "2^{10^{10}}",
    "2^{100000}",
    "1e999999",
    "10^999999999",
    r"\sum_{k=1}^{10^9} k",
    r"\binom{1000000}{500000}",
    r"\prod_{k=1}^{10^9} k",
    "(x+1)^{999}",
    "(" * 5000 + ")" * 5000,
    r"\frac{" * 2000,
    r"\sqrt{" * 200 + "2" + "}" * 200,
    "9" * 20000,
    "1," * 5000,
    "1 or " * 5000,
    r"\boxed{" * 5000,
    "answer is " * 3000,
    "$a" * 9000,
    "**" * 9000,
    "1 " * 9000,
    "1=1=" * 9000,
    "\ud83d",
    "\x00\x1b[31m",
    "1/0",
    "<a>" * 9000,
    "(1," * 300 + ")" * 300,
    "wait " * 9000,
]


@pytest.mark.parametrize("answer", REFUSED, ids=lambda answer: ascii(answer[:12]))
def test_a_hostile_answer_ends_and_is_wrong(answer, capfd):
    for gold in ("6", r"\sqrt{2}+x", "1, 2", "B", "Paris"):
        for said in (answer, rf"\boxed{{{answer}}}", f"The answer is {answer}."):
            assert not states(gold, said)
    assert capfd.readouterr() == ("", "")


def test_what_takes_too_long_is_not_equal_and_costs_no_other_answer():
    assert not states(r"\sqrt{2}+x", "((((10^99)^99)^99)^99)^99")
    assert states(r"\sqrt{2}+x", r"x + \sqrt{2}")


def test_a_child_that_was_killed_is_started_again():
    assert sympy_child.same("x+1", "1+x")
    sympy_child._child.process.kill()
    sympy_child._child.process.wait()
    assert sympy_child.same("x+2", "2+x")


def test_threads_and_forks_judge_too():
    cases = [(f"x+{i}", f"{i + wrong}+x", not wrong) for i in range(10) for wrong in (0, 1)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: states(*case[:2]), cases)) == [case[2] for case in cases]
    assert threading.current_thread() is threading.main_thread()
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        told = json.dumps([states("y+1", "1+y"), states("y+1", "2+y")])
        sympy_child._child.close()
        os.write(writing, told.encode())
        os._exit(0)
    os.waitpid(process, 0)
    assert json.loads(os.read(reading, 99)) == [True, False]
    assert states("y+5", "5+y"), "the parent's child is its own"


def test_a_gold_answer_may_be_anything():
    for gold in REFUSED:
        try:
            way = compared_as(gold)
        except ValueError as error:
            assert str(error) == "it says nothing"
        else:
            assert way in ("mathematics", "text")
