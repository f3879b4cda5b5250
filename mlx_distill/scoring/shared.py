"""What a model that no run changes wrote for a task, shared by all runs that ask it the same.

In: a teacher's or a base's generations. Out: the same, kept in the user's cache folder beside those
of other runs. Decided here: two runs ask the same where model, task, prompts, answers, settings,
device, versions and this program's code are the same; a file that is not as it was written is not
read, and made again. `MLX_DISTILL_SCORES=off` neither reads nor writes.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import mlx_distill
from mlx_distill.backends.protocol import Backend
from mlx_distill.caches import forget_unused, kept_for_later, mark_used
from mlx_distill.errors import DistillError
from mlx_distill.files import write_json
from mlx_distill.machine import processor_name, versions
from mlx_distill.readers import read_json
from mlx_distill.scoring.generations import Generation, Generations

SWITCH = "MLX_DISTILL_SCORES"
ROOMS = (
    "backends",
    "data",
    "embedded",
    "models",
    "scoring",
    "verify",
)  # whose code texts depend on


class SharedGenerations(Generations):
    """Generations that another run may have made, and that others may use."""

    def computed_by(self, backend: Backend) -> "SharedGenerations":
        """Say on what they are computed: another device's last digits are others."""
        device = backend.device()
        self._device = [device.backend, device.device, device.dtype, processor_name()]
        return self

    def begin(self, batches: list[list[tuple[str, int]]], **asked: Any) -> None:
        """As its parent; what is missing then is taken from an earlier run, if one asked the same."""
        super().begin(batches, **asked)
        self._asked = [one for batch in batches for one in batch]
        content = {
            **{key: value for key, value in self.fields.items() if key != "model"},
            **asked,
            "batches": batches,
            "device": self._device,
            "versions": versions(),
            "code": _code_digest(),
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._file = kept_for_later("scores") / f"{digest[:32]}.json"
        if self._missing() and (found := self._found()):
            self.add([row for row in found if (row.problem, row.sample) not in self.kept])
            self.say(f"{self.model}: answers of an earlier run, from {self._file}")

    def share(self) -> None:
        """Keep them for other runs, if all are there; a folder that cannot be written costs no more
        than that.
        """
        if _switched_off() or self._missing() or self._file.exists():
            return
        rows = [asdict(self.kept[one]) for one in self._asked]
        with suppress(OSError, DistillError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"sha256": _digest(rows), "generations": rows})
        forget_unused(self._file.parent)

    def _missing(self) -> bool:
        return any(one not in self.kept for one in self._asked)

    def _found(self) -> list[Generation]:
        """All that is asked for, as an earlier run kept it; nothing of a file that is not whole."""
        if _switched_off() or not self._file.exists():
            return []
        try:
            kept = read_json(self._file, self._file.name)
            rows = [Generation.of(row) for row in kept["generations"]]
            whole = kept["sha256"] == _digest(kept["generations"])
        except (DistillError, OSError, KeyError, TypeError, AttributeError):
            rows, whole = [], False
        by_place = {(row.problem, row.sample): row for row in rows if row}
        if whole and by_place.keys() == set(self._asked):
            mark_used(self._file)
            return [by_place[one] for one in self._asked]
        self.say(f"note: {self._file} is not as it was written and is made again")
        with suppress(OSError):
            self._file.unlink()
        return []


def _switched_off() -> bool:
    return os.environ.get(SWITCH, "") == "off"


def _digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


@cache
def _code_digest() -> str:
    here = Path(mlx_distill.__file__).parent
    files = [file for room in ROOMS for file in sorted((here / room).rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
