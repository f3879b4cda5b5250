"""The peak memory of a run, measured: one step of its costliest micro-batch in a child process.

In: a `Question`: a recipe, its models' folders, the shapes of the micro-batches, a machine. Out:
`Measured`, kept on disk. Decided here: what a kept answer depends on (shapes, settings, backend,
device, versions and the code that computes), and what the end of a child means. A child of its own
so that the memory goes back, and that one which runs out of it takes nothing with it.
"""

import hashlib
import json
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_distill import backends
from mlx_distill.caches import forget_unused, kept_for_later, mark_used
from mlx_distill.cost.plan import Costliest, Measured
from mlx_distill.errors import DistillError, OutOfMemory, says_out_of_memory
from mlx_distill.files import write_json
from mlx_distill.machine import Machine, processor_name, versions
from mlx_distill.models.folder import read_config
from mlx_distill.processes import program
from mlx_distill.readers import read_json
from mlx_distill.recipe.recipe import Recipe

PROGRAM = program("mlx_distill.cost.one_step")


class ProbeFailed(DistillError):
    """A probe that gave no number, for another reason than memory."""


@dataclass(frozen=True)
class Question:
    """What a probe does: `teacher` is None where the recipe names none."""

    recipe: Recipe
    student: Path
    teacher: Path | None
    costliest: Costliest
    machine: Machine

    def asked(self) -> dict[str, Any]:
        """As the child reads it."""
        return {
            "backend": self.machine.backend,
            "recipe": self.recipe.model_dump(mode="json"),
            "student": str(self.student.resolve()),
            "teacher": str(self.teacher.resolve()) if self.teacher else "",
            **asdict(self.costliest),
        }

    def key(self) -> str:
        """Digits of everything that the answer depends on; where the models lie is not of it."""
        recipe = self.recipe.model_dump(mode="json")
        named, kept = {"model", "revision"}, {"cache_folder"}
        tables = {
            name: {field: recipe[name][field] for field in recipe[name].keys() - named - kept}
            for name in ("student", "teacher", "objective")
        }
        content = {
            "models": [read_config(folder) for folder in (self.student, self.teacher) if folder],
            "tables": tables | {"optimizer": recipe["optim"]["optimizer"]},
            "prune": recipe["prune"] if self.recipe.prune.cuts else {},
            "shapes": asdict(self.costliest),
            "machine": [asdict(self.machine), processor_name()],
            "versions": versions(),
            "code": _code_digest(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def kept_answer(question: Question) -> Measured | None:
    """What an earlier probe of the same question measured, if one did."""
    with suppress(DistillError, KeyError, TypeError, ValueError):
        kept = read_json(_kept_file(question))
        mark_used(_kept_file(question))
        return Measured(float(kept["training_bytes"]), float(kept["validation_bytes"]))
    return None


def probe(question: Question) -> Measured:
    """Measure, or read what was kept. Raises `OutOfMemory` and `ProbeFailed`, both of one line."""
    if kept := kept_answer(question):
        return kept
    found = _ask_child(question.asked())
    measured = Measured(float(found["training_bytes"]), float(found["validation_bytes"]))
    if measured.training_bytes < found["least_bytes"]:
        raise ProbeFailed(
            f"the probe's memory counter is not believed: {measured.training_bytes:,.0f} bytes at "
            f"the peak, where the weights alone take {found['least_bytes']:,.0f}"
        )
    with suppress(OSError):  # a home that cannot be written costs another probe, no more
        file = _kept_file(question)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(measured))
        forget_unused(file.parent)
    return measured


def _ask_child(asked: dict[str, Any]) -> dict[str, Any]:
    """The child's answer. It ends when we do: its stdin, which we hold open, closes then."""
    reading, writing = os.pipe()
    child = subprocess.Popen(
        PROGRAM,
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C comes to us alone
    )
    os.close(reading)
    try:
        with suppress(BrokenPipeError):  # it ended before it read
            os.write(writing, f"{json.dumps(asked)}\n".encode())
        out, err = child.communicate()
    finally:
        os.close(writing)
        child.kill()
        child.wait()
    return _understood(child.returncode, out, err)


def _understood(code: int, out: str, err: str) -> dict[str, Any]:
    """The last line of what a child printed, or the error that its end stands for."""
    lines = out.splitlines()
    if code == 0 and lines:
        found = json.loads(lines[-1])
        if "wrong" not in found:
            return found
        kind, said = found["wrong"], found["said"]
    elif code == -signal.SIGKILL:
        kind, said = "memory", "killed by the system, which does that when memory runs out"
    else:
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        kind, said = "memory" if says_out_of_memory(err) else "crashed", f"{ended}: {last[:300]}"
    if kind == "memory":
        raise OutOfMemory(f"the probe ran out of memory: {said}")
    raise ProbeFailed(f"the probe {kind if kind == 'crashed' else 'was refused'}: {said}")


def _kept_file(question: Question) -> Path:
    return kept_for_later("probes") / f"{question.key()}.json"


def _code_digest() -> str:
    """Of the files that compute a step."""
    files = sorted(Path(backends.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
