"""A part of a teacher cache: arrays in a folder of their own, checked before they are believed.

    part-000000/  index.json  tokens.npy  …        (and head/, which holds no examples)

In: named arrays, with a row for each token of some sequences, or for each of their draws. Out: the
same arrays, memory-mapped, and a `Record` for each sequence. Decided here: a part appears by one
rename; `index.json` holds the SHA-256 of each file, compared when the file is first used, and of
each example its id, its first token, the token after its last, and its first draw.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_distill.errors import CacheError, NotFound
from mlx_distill.files import made_whole, one_line, sha256_of
from mlx_distill.readers import read_json

REMEDY = "delete this part's folder and run `mlx-distill teach` again, which makes what is missing"
Example = tuple[str, int, int, int]  # id, start, stop, first draw


class Record(NamedTuple):
    """Where the outputs for a sequence lie: in the rows `start` to `stop` of a part, its draws
    from `first_draw` on.
    """

    part: "Part"
    start: int
    stop: int
    first_draw: int


class Part:
    """A part on disk. Raises `CacheError` where its index or one of its files is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._checked: set[str] = set()
        index = self._read_index()
        self.sha256: dict[str, str] = index["sha256"]
        self.examples: list[Example] = index["examples"]
        if "distinct" in self.sha256:
            self._check_first_draws()

    def records(self) -> Iterator[tuple[str, Record]]:
        """Each example's id, and where its outputs lie."""
        for example, start, stop, first_draw in self.examples:
            yield example, Record(self, start, stop, first_draw)

    def array(self, name: str) -> np.ndarray:
        """The whole array, memory-mapped."""
        if name not in self.sha256:
            raise self._damaged(f"it has no {name}")
        file, expected = self.path / f"{name}.npy", self.sha256[name]
        try:
            if name not in self._checked:
                found = sha256_of(file)
                if found != expected:
                    raise CacheError(
                        f"{file}: SHA-256 {expected[:12]}… expected, {found[:12]}… found: {REMEDY}"
                    )
                self._checked.add(name)
            return _mapped(file, expected)
        except OSError as error:
            raise CacheError(f"{file} cannot be read ({one_line(error)}): {REMEDY}") from None

    def _read_index(self) -> dict[str, Any]:
        try:
            index = read_json(self.path / "index.json", error=CacheError)
        except (CacheError, NotFound) as error:
            raise CacheError(f"{error}: {REMEDY}") from None
        if found := _damage(index):
            raise self._damaged(found)
        return index

    def _check_first_draws(self) -> None:
        """An example's draws begin after those of all tokens before it."""
        draws_before = np.append(0, np.cumsum(self.array("distinct"), dtype=np.int64))
        for _, start, _, first_draw in self.examples:
            if start >= len(draws_before) or first_draw != draws_before[start]:
                raise self._damaged("an example's draws begin elsewhere")

    def _damaged(self, found: str) -> CacheError:
        return CacheError(f"{self.path / 'index.json'} is damaged ({found}): {REMEDY}")


def write_part(path: Path, columns: dict[str, np.ndarray], examples: list[Example]) -> None:
    """A folder of arrays and their index, whole or not at all. Raises `OSError`."""
    with made_whole(path) as half:
        for name, array in columns.items():
            np.save(half / f"{name}.npy", array)
        digests = {name: sha256_of(half / f"{name}.npy") for name in columns}
        index = json.dumps({"sha256": digests, "examples": examples})
        (half / "index.json").write_text(index, encoding="utf-8")


@lru_cache(maxsize=64)  # each holds a file descriptor, of which macOS gives a process 256
def _mapped(file: Path, sha256: str) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def _damage(index: Any) -> str:
    """What is wrong with a part's index, "" if nothing is."""
    if not isinstance(index, dict) or not isinstance(index.get("sha256"), dict):
        return "it holds no digests"
    if not all(isinstance(digest, str) for digest in index["sha256"].values()):
        return "a digest is no text"
    if not isinstance(index.get("examples"), list):
        return "it holds no examples"
    end = 0
    for row in index["examples"]:
        if not isinstance(row, list) or [type(value) for value in row] != [str, int, int, int]:
            return "an example is not an id and three numbers"
        example, start, stop, first_draw = row
        if start != end or stop <= start or first_draw < 0:
            return f"example {example!r} does not begin where the one before it ends"
        end = stop
    return ""
