"""BLAS threads by the width of what is computed: each case is a process, for libraries keep them."""

import json
import os
import subprocess
import sys

import pytest

from mlx_distill.machine import THREADS

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
ASK = """
import json, numpy, sys
import mlx_distill.backends.mlx.loading as loading
from mlx_distill.backends.mlx.threads import threads
from mlx_distill.models.hub import model_folder
from threadpoolctl import threadpool_info

def each():
    return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]

found = [each()]
for step in {steps}:
    loading.load_teacher(model_folder("embedded:student"), "s", 0) if step == "load" else (
        threads.suit(step))
    found.append(each())
print(json.dumps(found))
"""


def found(*steps: object, **variables: str) -> list[list[int]]:
    """The threads of each BLAS in the process: before, and after each step."""
    environment = {name: value for name, value in os.environ.items() if name not in THREADS}
    ran = subprocess.run(
        [sys.executable, "-c", ASK.replace("{steps}", repr(steps))],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@linux
def test_narrow_models_are_computed_by_one_thread():
    before, loaded, beside = found("load", 192)
    assert before and set(loaded + beside) == {1}
    assert os.cpu_count() == 1 or max(before) > 1


@linux
def test_a_wide_model_gets_all_of_them_back_for_good():
    before, narrow, wide, after = found(128, 576, 128)
    assert set(narrow) == {1}
    assert wide == after == before


@linux
@pytest.mark.parametrize("name", THREADS)
def test_whoever_sets_a_variable_decides(name: str):
    before, after = found(128, **{name: "2"})
    assert after == before
