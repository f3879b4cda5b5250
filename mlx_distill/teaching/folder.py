"""A teacher cache on disk: which outputs are there, and whether they are of what is asked for.

    CACHE_FOLDER/KIND-KEY/  manifest.json   write.lock   head/ (hidden)   part-000000/ …

In: a folder and the `CacheFields` that a recipe asks for. Out: the `Record` of a row of tokens.
Decided here: a manifest whose fields differ is refused by field. Outputs are found by an example's
id and its tokens: the tokens must be the start of a kept sequence of that id, so another template,
other data or another order of examples can do no harm. Reading needs no lock, since a part that is
there is complete.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import CacheError, DistillError, NotFound
from mlx_distill.readers import read_json
from mlx_distill.teaching.fields import CacheFields
from mlx_distill.teaching.parts import Part, Record

MANIFEST = "manifest.json"
HEAD = "head"
PART = re.compile(r"part-([0-9]{6,})")


class TeacherCache:
    """The cache of these fields under `root`, which need not be there yet."""

    def __init__(self, root: Path, fields: CacheFields):
        self.root, self.fields, self.path = root, fields, root / fields.name
        self._parts: dict[str, Part] = {}
        self._records: dict[str, list[Record]] = {}
        self.refresh()

    @classmethod
    def at(cls, path: Path) -> "TeacherCache":
        """The cache that lies in a folder; raises `CacheError` where none does."""
        try:
            return cls(path.parent, CacheFields(**_read_fields(path)))
        except (NotFound, TypeError) as error:
            raise CacheError(f"{path} holds no teacher cache of this version ({error})") from None

    def refresh(self) -> None:
        """See what other processes have written since. Raises `CacheError` if the manifest is not
        of these fields.
        """
        manifest = self.path / MANIFEST
        if not manifest.exists():
            return
        for field, found in self.fields.differing(_read_fields(self.path)).items():
            raise CacheError(
                f"{manifest}: {field} {getattr(self.fields, field)!r} asked, {found!r} found: "
                "set teacher.cache_folder to another folder or delete this cache"
            )
        for path in self.part_folders():
            if path.name not in self._parts:
                self._parts[path.name] = part = Part(path)
                for example, record in part.records():
                    self._records.setdefault(example, []).append(record)

    def part_folders(self) -> list[Path]:
        """The folders of the parts, in order; what has another name is somebody else's."""
        found = self.path.glob("part-*")
        parts = [path for path in found if PART.fullmatch(path.name) and path.is_dir()]
        return sorted(parts, key=_number)

    def next_part(self) -> Path:
        """The folder of a part to write: its number is above all that are there."""
        numbers = [_number(path) for path in self.path.glob("part-*") if PART.fullmatch(path.name)]
        return self.path / f"part-{max(numbers, default=-1) + 1:06d}"

    def foreign(self) -> list[str]:
        """Names in the folder that look like parts and are not."""
        ours = self.part_folders()
        return sorted(path.name for path in self.path.glob("part-*") if path not in ours)

    def near(self) -> list[str]:
        """For each other cache under the root: its name and in which fields it differs."""
        lines = []
        for path, found in _kept_under(self.root, self.fields.kind):
            differing = [
                f"{field} {there!r} (asked: {getattr(self.fields, field)!r})"
                for field, there in self.fields.differing(found).items()
            ]
            if differing:
                lines.append(f"{path.name} has {', '.join(differing)}")
        return lines

    def find(self, example: str, tokens: np.ndarray) -> Record | None:
        """The record of which `tokens` [T] are the start."""
        for record in self._records.get(example, ()):
            stop = min(record.stop, record.start + len(tokens))
            if np.array_equal(record.part.rows("tokens", record.start, stop), tokens):
                return record
        return None

    def missing(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Those without outputs, each once, in the order in which they are asked: the same after a
        kill.
        """
        wanted = {(sequence.id, sequence.tokens.tobytes()): sequence for sequence in sequences}
        lacking = [
            sequence
            for sequence in wanted.values()
            if self.find(sequence.id, sequence.tokens) is None
        ]
        return sorted(lacking, key=lambda sequence: (len(sequence), sequence.id))

    @cached_property
    def head(self) -> np.ndarray:
        """The teacher's head [V, D] (hidden)."""
        return Part(self.path / HEAD).array("head")

    def size(self) -> tuple[int, int, int]:
        """Examples, tokens and bytes."""
        kept = [record for records in self._records.values() for record in records]
        files = [file for file in self.path.rglob("*") if file.is_file()]
        tokens = sum(record.stop - record.start for record in kept)
        return len(kept), tokens, sum(file.stat().st_size for file in files)


def dates_of(root: Path, fields: CacheFields) -> list[str]:
    """The dates of the caches under a folder that differ from these fields in nothing else, the
    newest first.
    """
    same = [
        found["date"]
        for _, found in _kept_under(root, fields.kind)
        if fields.differing(found).keys() <= {"date"} and isinstance(found.get("date"), str)
    ]
    return sorted(filter(None, same), reverse=True)


def _kept_under(root: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The caches of a kind under a folder, with their fields; one that cannot be read is not ours
    to mend.
    """
    for manifest in sorted(root.glob(f"{kind}-*/{MANIFEST}")):
        try:
            found = _read_fields(manifest.parent)
        except DistillError:
            continue
        yield manifest.parent, found


def _read_fields(path: Path) -> dict[str, Any]:
    """The fields of the cache in a folder, as its manifest has them."""
    file = path / MANIFEST
    remedy = f"delete the folder {path}, or put a copy of the file in its place"
    try:
        content = read_json(file, error=CacheError)
    except CacheError as error:
        raise CacheError(f"{error}: {remedy}") from None
    if not isinstance(content, dict) or not isinstance(content.get("fields"), dict):
        raise CacheError(f"{file} is damaged (it holds no fields): {remedy}")
    return content["fields"]


def _number(path: Path) -> int:
    return int(path.name.removeprefix("part-"))
