"""Runs the command line and stops it at a chosen place: a helper of tests/test_resume.py, a program
of its own.

It imports everything once, and then forks a child for each job that stands as one JSON line on
stdin, so that a run costs a second and not the start of an interpreter. A job is {"arguments": […],
"at": "module:Class.function", "call": n, "when": "before" | "after", "signals": ["KILL"],
"file_limit": bytes, "rank": "n", "fork_jobs": true}: before (or after) the n-th call of that
function the process (of several ranks the one named) sends itself the signals. With "fork_jobs" the
runs of a sweep are forks too. The answer is one JSON line: {"code": exit code or -signal, "out": …,
"err": …}. With a job as its argument the program is that job and nothing else.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile

import mlx_distill.backends.mlx.backend  # before anything else of MLX: it loads the BLAS
import mlx_distill.pipeline
import mlx_distill.sweeps.jobs
import mlx_distill.sweeps.queue
import mlx_distill.verify.tasks
from mlx_distill.cli import main


def send_at(place: str, call: int, when: str, signals: list[str]) -> None:
    """Replace the function by one that sends `signals` to this process at its `call`-th call."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, name), iter(range(1, 10**9))

    def watched(*args, **kwargs):
        here = next(calls) == call
        for which in signals if here and when == "before" else ():
            os.kill(os.getpid(), getattr(signal, f"SIG{which}"))
        result = function(*args, **kwargs)
        for which in signals if here and when == "after" else ():
            os.kill(os.getpid(), getattr(signal, f"SIG{which}"))
        return result

    setattr(owner, name, watched)


def run(job: dict) -> None:
    """Run the job in this process, which ends with it."""
    sys.argv = ["mlx-distill", *job["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
    if job.get("at") and job.get("rank", "0") == os.environ.get("RANK", "0"):
        send_at(
            job["at"], job.get("call", 1), job.get("when", "before"), job.get("signals", ["KILL"])
        )
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Forked:
    """A job of a sweep as `subprocess.Popen` would show it, but a fork of this process, which has
    imported everything.
    """

    def __init__(self, arguments: tuple[str, ...], log: str):
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            os.setsid()
            _close_locks()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            run({"arguments": arguments})

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, which: int) -> None:
        os.kill(self.pid, which)


def _close_locks() -> None:
    """What a new program would not inherit: a sweep that was killed holds its folder no longer,
    though its runs go on.
    """
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            if os.readlink(f"/proc/self/fd/{number}").endswith(".lock"):
                os.close(int(number))


def in_child(job: dict, out: int, err: int) -> int:
    """The exit code of the job, run in a fork; in a new process where forking is not safe after
    imports (macOS).
    """
    if sys.platform != "linux":
        return subprocess.run(
            [sys.executable, __file__, json.dumps(job)],
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
        ).returncode
    process = os.fork()
    if not process:
        if job.get("fork_jobs"):
            mlx_distill.sweeps.jobs._start = lambda one, environment: Forked(
                one.arguments, str(one.log)
            )
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        run(job)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def serve() -> None:
    """Answer jobs until stdin ends."""
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = in_child(json.loads(line), out.fileno(), err.fileno())
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps({"code": code, "out": texts[0], "err": texts[1]}), flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1])) if len(sys.argv) > 1 else serve()
