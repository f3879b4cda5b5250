"""Runs the command line and stops it at a chosen place: a helper of tests that run it in a process
of its own.

It imports everything once, and then forks a child for each job that stands as one JSON line on
stdin, so that a run costs half a second and not the start of an interpreter. A job is
{"arguments": […], "at": "module:Class.function", "call": n, "when": "before" | "after",
"signals": ["KILL"], "file_limit": bytes, "rank": "n", "fork_jobs": true, "environments": [{…}, …],
"returns": {"module:function": value}, "mlx_fails": {"accumulate": text}}: before (or after) the n-th call of that function the process
(of several ranks the one named) sends itself the signals. With "fork_jobs" the runs of a sweep are
forks too. With "environments" there is a process for each of them, with these variables, as a
launcher of ranks starts them. Functions in "returns" do nothing but return that. Within a
function of the MLX backend in "mlx_fails", MLX raises a RuntimeError of that text when it is to
compute something. The answer is one JSON line: {"code": exit code or -signal, the first that is not
0, "out": …, "err": …}. With a job as its argument the program is that job and nothing else.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
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

# What a tiny run imports where it is needed, 1,800 modules in all
LATE = (
    *("matplotlib.backends.backend_svg", "matplotlib.figure", "matplotlib.style"),
    *("mlx_lm.models.llama", "transformers.models.llama.modeling_llama"),
    *("peft.utils.transformers_weight_conversion", "torch.profiler._cupti_monitor"),
)


def import_everything() -> None:
    """Our own modules and what a tiny run imports late: a fork inherits them."""
    ours = [module.name for module in pkgutil.walk_packages(mlx_distill.__path__, "mlx_distill.")]
    for name in (*ours, *LATE):
        if not name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's collector need not walk through all of it


def send_at(place: str, call: int, when: str, signals: list[str]) -> None:
    """Replace the function by one that sends `signals` to this process at its `call`-th call."""
    owner, name = found(place)
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


def found(place: str) -> tuple[object, str]:
    """Whose attribute "module:Class.function" is, and its name there."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), name


def let_mlx_fail(within: dict[str, str]) -> None:
    """MLX tells failures of a GPU when something is evaluated: make it fail in these functions."""
    import mlx.core as mx

    def failing(function):
        def call(*args, **kwargs):
            frame = sys._getframe(1)
            while frame is not None:
                ours = frame.f_globals.get("__name__", "").startswith("mlx_distill.backends.mlx")
                if ours and frame.f_code.co_name in within:
                    raise RuntimeError(within[frame.f_code.co_name])
                frame = frame.f_back
            return function(*args, **kwargs)

        return call

    for name in ("eval", "async_eval", "save_safetensors"):
        setattr(mx, name, failing(getattr(mx, name)))
    for name in ("item", "tolist"):
        setattr(mx.array, name, failing(getattr(mx.array, name)))


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
    for place, value in job.get("returns", {}).items():
        owner, name = found(place)
        assert callable(getattr(owner, name)), place
        setattr(owner, name, lambda *args, value=value, **kwargs: value)
    if job.get("mlx_fails"):
        let_mlx_fail(job["mlx_fails"])
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
    for number in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            if os.readlink(f"/dev/fd/{number}").endswith(".lock"):
                os.close(int(number))


def in_children(job: dict, out: int, err: int) -> int:
    """The exit code of the job, run in a fork for each of its environments; in new processes where
    forking is not safe after imports (macOS).
    """
    start = _fork if sys.platform == "linux" or os.environ.get("FAKEMAC") == "1" else _spawn
    waits = [start(job, environment, out, err) for environment in job.get("environments", [{}])]
    codes = [wait() for wait in waits]
    return next(filter(None, codes), 0)


def _fork(job: dict, environment: dict, out: int, err: int):
    process = os.fork()
    if not process:
        os.environ.update(environment)
        if job.get("fork_jobs"):
            mlx_distill.sweeps.jobs._start = lambda one, environment: Forked(
                one.arguments, str(one.log)
            )
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        run(job)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _spawn(job: dict, environment: dict, out: int, err: int):
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(job)],
        stdout=out,
        stderr=err,
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
    ).wait


def serve() -> None:
    """Answer jobs until stdin ends."""
    import_everything()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = in_children(json.loads(line), out.fileno(), err.fileno())
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps({"code": code, "out": texts[0], "err": texts[1]}), flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1])) if len(sys.argv) > 1 else serve()
