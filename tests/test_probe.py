"""One measured step: what it measures, when it is asked again, how its child ends, and what is said."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from rich.console import Console
from test_plan import CONFIG, CPU, GPU, TORCH, prepared
from test_plan import recipe as recipe_of
from tiny import recipe_of as taught

from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.cost import one_step, probe
from mlx_distill.cost.memory import Micro
from mlx_distill.cost.plan import Costliest, Measured
from mlx_distill.cost.probe import ProbeFailed, Question, kept_answer
from mlx_distill.errors import DistillError, ModelError, OutOfMemory
from mlx_distill.models.hub import model_folder
from mlx_distill.objective import Objective
from mlx_distill.recipe.load import load_recipe
from mlx_distill.terminal import plan as printing

SHAPES = Costliest(Micro(2, 64, 64), Micro(1, 32, 32), accumulates=True)


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def question() -> Question:
    folders = model_folder("embedded:student"), model_folder("embedded:teacher")
    return Question(taught(), *folders, SHAPES, CPU)


def child(monkeypatch, code: str) -> None:
    monkeypatch.setattr(probe, "PROGRAM", (sys.executable, "-c", code))


# what it measures

NO_PEAK = not os.access("/proc/self/clear_refs", os.W_OK)
SKIP_TORCH = pytest.mark.skipif(
    NO_PEAK, reason="this system counts a process's peak from its start"
)


@pytest.mark.parametrize(
    "machine", [CPU, pytest.param(TORCH, marks=SKIP_TORCH)], ids=["mlx", "torch"]
)
def test_a_step_is_measured_once(machine, question, monkeypatch):
    """Both embedded models; MLX's peak is that of the same step in this process, torch's at least
    what is known to be held.
    """
    asked = replace(question, machine=machine)
    assert kept_answer(asked) is None
    found = probe.probe(asked)
    assert found.training_bytes > 0 < found.validation_bytes
    if machine is CPU:
        # which buffers live at once depends a little on how busy the machine is: 3 % was seen
        assert found.training_bytes == pytest.approx(peak_of_a_step(asked), rel=0.1)
    else:
        weights = 4 * (4 * 423_000 + 937_000)  # the student's, gradients and moments; the teacher's
        assert weights < found.training_bytes < 50 * weights
    child(monkeypatch, "raise SystemExit(1)")
    assert probe.probe(asked) == kept_answer(asked) == found


def peak_of_a_step(asked: Question) -> int:
    backend, before = MlxBackend(), mx.get_active_memory()
    student = backend.load_student(asked.student, "student", asked.recipe)
    teacher = backend.load_teacher(asked.teacher, "teacher")
    batch = one_step._batch(2, 64, 64, vocabulary=student.vocabulary_rows)
    backend.reset_peak_memory()
    for _ in range(2):
        student.accumulate(batch, teacher.targets(batch), Objective(), 64.0)
    student.apply(1e-4)
    return backend.memory().peak_bytes - before


@pytest.mark.parametrize("backend", ["mlx", pytest.param("torch", marks=SKIP_TORCH)])
@pytest.mark.parametrize("kind", ["top_k", "sampled", "hidden"])
def test_a_teacher_whose_answers_lie_on_disk_is_not_loaded(kind, backend, question):
    recipe = taught(teacher={"cache": kind})
    found = one_step.measure(replace(question, recipe=recipe).asked() | {"backend": backend})
    student = 423_000
    assert found["training_bytes"] > found["least_bytes"] == pytest.approx(4 * student, rel=0.01)


def test_a_run_without_teacher_or_validation(question):
    alone = replace(SHAPES, validation=None, accumulates=False)
    asked = replace(question, recipe=recipe_of(), teacher=None, costliest=alone).asked()
    found = one_step.measure(asked)
    assert found["validation_bytes"] == 0 < found["least_bytes"] < found["training_bytes"]


# what a kept answer depends on


def test_an_answer_is_kept_by_everything_that_it_depends_on(question, monkeypatch, tmp_path):
    child(monkeypatch, f"print({json.dumps(json.dumps(answered()))})")
    found = probe.probe(question)
    recipe = question.recipe
    others = [
        replace(question, costliest=replace(SHAPES, training=Micro(2, 64, 96))),
        replace(question, machine=replace(CPU, backend="torch")),
        replace(question, machine=replace(CPU, memory_bytes=5)),
        replace(question, recipe=taught(objective={"temperature": 2.0})),
        replace(question, recipe=taught(optim={"optimizer": "lion"})),
        replace(question, student=question.teacher),
    ]
    assert [kept_answer(other) for other in others] == [None] * len(others)
    named = {"student": {"model": "/elsewhere"}, "run": {"name": "other"}, "optim": {"epochs": 3}}
    same = taught(**named)
    assert recipe != same
    assert kept_answer(replace(question, recipe=same)) == found == Measured(8e9, 0.0)
    with monkeypatch.context() as context:
        context.setattr(probe, "versions", lambda: {"mlx": "9.9"})
        assert kept_answer(question) is None
    with monkeypatch.context() as context:
        context.setattr(probe, "_code_digest", lambda: "other")
        assert kept_answer(question) is None
    (file,) = (tmp_path / "cache").rglob("*.json")
    for damage in ("", "[]", '{"training_bytes": "x", "validation_bytes": 1}'):
        file.write_text(damage)
        assert kept_answer(question) is None


def test_a_home_that_cannot_be_written_costs_another_probe(question, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    child(monkeypatch, f"print({json.dumps(json.dumps(answered()))})")
    assert probe.probe(question) == Measured(8e9, 0.0) and kept_answer(question) is None


# how it ends


def answered(**values) -> dict:
    return {"training_bytes": 8e9, "validation_bytes": 0, "least_bytes": 6e9} | values


KILLED = "import os; os.kill(os.getpid(), {})"


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (KILLED.format(9), OutOfMemory, "ran out of memory: killed by the system"),
        (KILLED.format(11), ProbeFailed, "crashed: killed by SIGSEGV: it said nothing"),
        (
            "import sys; sys.exit('libc++abi: [METAL] Insufficient Memory (0008)')",
            OutOfMemory,
            "ran out of memory: exit code 1: libc++abi: [METAL] Insufficient Memory (0008)",
        ),
        ("1 / 0", ProbeFailed, "crashed: exit code 1: ZeroDivisionError: division by zero"),
        ("pass", ProbeFailed, "crashed: exit code 0: it said nothing"),
        (
            f"print({json.dumps(json.dumps(answered(training_bytes=0)))})",
            ProbeFailed,
            "counter is not believed: 0 bytes at the peak, where the weights alone take 6,000",
        ),
    ],
)
def test_the_end_of_a_child_is_one_line(code, kind, said, question, monkeypatch):
    child(monkeypatch, code)
    with pytest.raises(kind) as error:
        probe.probe(question)
    assert str(error.value).startswith("the probe") and said in str(error.value)
    assert "\n" not in str(error.value) and isinstance(error.value, DistillError)
    assert kept_answer(question) is None


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OutOfMemory("a step does not fit"), OutOfMemory, "ran out of memory: a step does not fit"),
        (MemoryError(), OutOfMemory, "ran out of memory: MemoryError"),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), OutOfMemory, "metal"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory, "Default"),
        (ModelError("model: no such family"), ProbeFailed, "was refused: model: no such family"),
        (KeyError("rope"), ProbeFailed, "crashed: KeyError: 'rope'"),
    ],
)
def test_what_goes_wrong_in_a_child_is_told(error, kind, said, monkeypatch):
    def measure(asked):
        raise error

    monkeypatch.setattr(one_step, "measure", measure)
    with pytest.raises(kind, match=said):
        probe._understood(0, json.dumps(one_step.answer({})), "")


ASKS = """
from mlx_distill.cost import probe
probe.PROGRAM = ({python!r}, "-c", {child!r})
probe._ask_child({{}})
"""
WAITS = """
import os, time
from pathlib import Path
from mlx_distill.cost import one_step
def measure(asked):
    Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(600)
one_step.measure = measure
one_step.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_with_who_asked(number, tmp_path):
    file = tmp_path / "pid"
    code = ASKS.format(python=sys.executable, child=WAITS.format(pid=str(file)))
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as asking:
        pid = int(waited(lambda: file.exists() and file.read_text()))
        assert alive(pid)
        asking.send_signal(number)
        asking.wait()
    waited(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def waited(for_what):
    for _ in range(1200):
        if found := for_what():
            return found
        time.sleep(0.1)
    raise AssertionError("it never came")


# what is said


@pytest.fixture
def answers(monkeypatch):
    """What the probe will say; out come the questions that it was asked."""
    asked: list[Question] = []

    def prepare(answer: Measured | Exception) -> list[Question]:
        def answering(question: Question) -> Measured:
            asked.append(question)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(printing, "probe", answering)
        return asked

    return prepare


def printed(path: Path) -> str:
    console = Console(file=io.StringIO(), width=80)
    try:
        printing.plan(load_recipe(path), console, "mlx", probed=True)
    finally:
        text = " ".join(console.file.getvalue().split())
    return text


def test_a_probed_plan_says_what_was_measured(tiny_recipe, answers):
    answers(Measured(3e6, 4e6))
    text = printed(tiny_recipe)
    assert "peak memory 4 MB (measured by one step)" in text
    assert "measured by one step │ 4 MB" in text


def test_a_plan_whose_probe_runs_out_of_memory_ends_with_advice(tiny_recipe, answers):
    answers(OutOfMemory("the probe ran out of memory: killed"))
    with pytest.raises(OutOfMemory) as error:
        printed(tiny_recipe)
    line = str(error.value)
    assert line.startswith("the probe ran out of memory: killed; planned was peak memory about")
    assert "batch.micro_batch_size=1 (saves " in line and "\n" not in line


def test_a_plan_whose_probe_fails_is_printed_all_the_same(tiny_recipe, answers, capsys):
    answers(ProbeFailed("the probe crashed: KeyError"))
    with pytest.raises(ProbeFailed, match="crashed"):
        printed(tiny_recipe)


def announced(tmp_path: Path, machine=GPU, steps: int = 50, **arguments) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    said: list[str] = []
    recipe = recipe_of(optim={"steps": steps}, batch={"micro_batch_size": 4})
    printing.announce(recipe, prepared([96] * 8), tmp_path, None, machine, said.append, **arguments)
    return said


def test_a_first_long_run_on_a_gpu_is_probed(tmp_path, answers):
    asked = answers(Measured(3e6, 4e6))
    said = announced(tmp_path)
    assert len(asked) == 1 and asked[0].costliest.training == Micro(4, 96, 384)
    assert "measured first" in said[0] and "4 MB (measured by one step)" in said[2]
    for others in ({"machine": CPU}, {"steps": 49}, {"force": True}, {"ranks": 2}):
        assert "estimated from the configs" in " ".join(announced(tmp_path, **others))
    assert len(asked) == 1


def test_a_run_whose_probe_runs_out_of_memory_is_refused(tmp_path, answers):
    """Also on a device that says that it has more."""
    answers(OutOfMemory("the probe ran out of memory: killed"))
    with pytest.raises(OutOfMemory, match=r"killed; planned was .*fits; set .*saves.*--force"):
        announced(tmp_path)


def test_a_run_whose_probe_fails_goes_on_with_the_estimate(tmp_path, answers):
    answers(ProbeFailed("the probe crashed: KeyError"))
    said = announced(tmp_path)
    assert said[1] == "plan: the probe crashed: KeyError"
    assert "estimated from the configs" in said[3]
