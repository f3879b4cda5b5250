"""Child processes side by side: order, limits, failures, Ctrl-C. The children are short Python
programs instead of mlx-distill.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import mlx_distill
from mlx_distill.processes import program
from mlx_distill.sweeps import jobs
from mlx_distill.sweeps.jobs import Job, side_by_side

SPAN = "import sys, time, pathlib; p = pathlib.Path(sys.argv[1]); p.with_suffix('.on').touch(); "
WAIT_FOR = (
    SPAN
    + "\nwhile not all(pathlib.Path(other).exists() for other in sys.argv[2:]): time.sleep(0.01)"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(jobs, "PROGRAM", (sys.executable, "-c"))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)


def job(folder: Path, name: str, code: str, *words: str, **more) -> Job:
    return Job(name, (code, str(folder / name), *words), folder / "logs" / f"{name}.log", **more)


def test_two_at_once_overlap_and_one_at_a_time_does_not(tmp_path):
    """Each of the pair ends only when the other has begun."""
    pair = [
        job(tmp_path, a, WAIT_FOR, str(tmp_path / f"{b}.on")) for a, b in (("a", "b"), ("b", "a"))
    ]
    assert {(ended.job.name, ended.code) for ended in side_by_side(pair, at_once=2)} == {
        ("a", 0),
        ("b", 0),
    }
    order = [
        ended.job.name
        for ended in side_by_side([job(tmp_path, name, "pass") for name in "cde"], at_once=1)
    ]
    assert order == ["c", "d", "e"]


@pytest.mark.parametrize(("memory", "most"), [(0, 3), (25, 2), (10, 1), (5, 1)])
def test_memory_limits_how_many_run_together(tmp_path, memory, most, monkeypatch):
    """A job that alone is too large runs alone: its own plan says no more than that it is close."""
    seen, start = [], jobs._next

    def watched(waiting, running, *more):
        seen.append(len(running))
        return start(waiting, running, *more)

    monkeypatch.setattr(jobs, "_next", watched)
    five = [job(tmp_path, str(i), "import time; time.sleep(0.15)", peak_bytes=10) for i in range(5)]
    assert len(list(side_by_side(five, at_once=3, memory_bytes=memory))) == 5
    assert max(seen) == most


def test_a_failure_is_told_in_its_own_words_and_takes_no_other_with_it(tmp_path):
    made = [
        job(
            tmp_path,
            "told",
            "import sys; print('error: the lamp is out; light it', file=sys.stderr); sys.exit(2)",
        ),
        job(tmp_path, "bug", "raise KeyError('oops')"),
        job(tmp_path, "killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        job(tmp_path, "silent", "import sys; sys.exit(3)"),
        job(tmp_path, "fine", "print('error: only in passing')"),
    ]
    troubles = {ended.job.name: ended.trouble for ended in side_by_side(made, at_once=2)}
    assert troubles["told"] == "the lamp is out; light it" and troubles["fine"] == ""
    assert "KeyError: 'oops'" in troubles["bug"] and "bug.log" in troubles["bug"]
    assert (
        "killed by SIGKILL" in troubles["killed"]
        and "exit code 3: it said nothing" in troubles["silent"]
    )


def test_one_whose_work_is_under_way_elsewhere_comes_last(tmp_path):
    free, said = tmp_path / "free", []
    held = job(tmp_path, "held", "pass", busy=lambda: not free.exists())
    other = job(tmp_path, "other", "pass")

    def say(text: str) -> None:
        said.append(text)
        free.touch()

    assert [ended.job.name for ended in side_by_side([held, other], say=say)] == ["other", "held"]
    assert said == ["held: another process is at it; waiting"]


STOPPED = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler); "


def test_no_more_jobs_are_looked_at_than_have_to_be(tmp_path):
    """Each look opens a lock's file, and one is to start whenever another one ends."""
    looked_at = []

    def waiting(number: int) -> Job:
        def busy() -> bool:
            looked_at.append(number)
            return number == 0

        return Job(str(number), (), tmp_path / "log", busy=busy)

    chosen = jobs._next([waiting(i) for i in range(100)], [], 1, 0, print)
    assert chosen.name == "1" and looked_at == [0, 1]


def test_ctrl_c_asks_every_child_to_stop_and_waits_for_it(tmp_path):
    """The children save, also where a script's `&` made them deaf to SIGINT; what has not begun
    does not begin.
    """
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    saves = (
        deaf
        + STOPPED
        + SPAN
        + "\ntry: time.sleep(60)\nexcept KeyboardInterrupt: p.with_suffix('.saved').touch(); "
        "sys.exit(130)"
    )
    three = [job(tmp_path, name, saves) for name in "abc"]
    ended = []

    def press():
        while not all((tmp_path / f"{name}.on").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        for one in side_by_side(three, at_once=2):
            ended.append(one.code)
    presser.join()
    assert (
        all((tmp_path / f"{name}.saved").exists() for name in "ab")
        and not (tmp_path / "c.on").exists()
    )
    assert set(ended) == {130}


def test_a_reader_that_stops_leaves_no_child_behind(tmp_path):
    saves = (
        STOPPED
        + SPAN
        + "\ntry: time.sleep(60)\nexcept KeyboardInterrupt: p.with_suffix('.saved').touch()"
    )
    quick = job(tmp_path, "quick", WAIT_FOR, str(tmp_path / "slow.on"))
    for _ in side_by_side([quick, job(tmp_path, "slow", saves)], at_once=2):
        break
    assert (tmp_path / "slow.saved").exists()


def test_a_child_runs_this_package_and_imports_nothing_from_the_working_folder(
    tmp_path, monkeypatch
):
    for name in ("yaml.py", "typer.py", "mlx_distill.py", "rich/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("open('ran', 'a').write(__name__)")
    monkeypatch.chdir(tmp_path)
    show = program()[-1].replace(
        "main()", "import mlx_distill, typer; print(mlx_distill.__file__, typer.__file__)"
    )
    monkeypatch.setattr(
        jobs, "PROGRAM", ("env", "-u", "PYTHONPATH", sys.executable, "-P", "-c", show)
    )
    (ended,) = side_by_side([Job("one", (), tmp_path / "log")])
    ours, theirs = ended.job.log.read_text().split()
    assert (
        ours == mlx_distill.__file__
        and not theirs.startswith(str(tmp_path))
        and not (tmp_path / "ran").exists()
    )


def test_children_share_cores_and_know_of_each_other(tmp_path, monkeypatch):
    for name in jobs.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    show = (
        "import os; print(*map(os.environ.get, ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', "
        "'MLX_DISTILL_JOBS')))"
    )
    one = job(tmp_path, "one", show)

    def shown(at_once: int) -> str:
        (ended,) = side_by_side([one], at_once=at_once)
        return ended.job.log.read_text().strip()

    assert (shown(1), shown(4)) == ("None None None", "2 2 4")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert shown(4) == "3 2 4"
