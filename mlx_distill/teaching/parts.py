"""A part of a teacher cache: arrays in a folder of their own, checked before they are believed.

    part-000000/  index.json  tokens.npy  …        (and head/, which holds no examples)

In: named arrays, with a row for each token of some sequences, or for each of their draws. Out: rows
of these arrays, and a `Record` for each sequence. Decided here: a part appears by one
rename; `index.json` holds the SHA-256 of each file, compared when the file is first used, and of
each example its id, its first token, the token after its last, and its first draw. Rows are read
from where they lie in a file, and no file stays open or mapped: of parts there may be thousands,
and macOS gives a process 256 descriptors.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
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


class Layout(NamedTuple):
    """How an array lies in its file, from byte `begin` on."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    by_rows: bool  # one row after another (C order)


class Part:
    """A part on disk. Raises `CacheError` where its index or one of its files is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._layouts: dict[str, Layout] = {}  # of the files that were checked
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
        self._layout(name)
        with self._told(name) as file:
            return _mapped(file)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The rows `start` to `stop` of an array."""
        layout = self._layout(name)
        row = prod(layout.shape[1:])
        begin, count = layout.begin + start * row * layout.dtype.itemsize, (stop - start) * row
        with self._told(name) as file:
            if not layout.by_rows:
                return np.array(_mapped(file)[start:stop])
            found = np.fromfile(file, layout.dtype, count, offset=begin)
        if len(found) < count:
            raise CacheError(f"{file} is shorter than it was: {REMEDY}")
        return found.reshape(-1, *layout.shape[1:])

    def _layout(self, name: str) -> Layout:
        """How an array lies in its file, which is checked and looked at once."""
        if name not in self._layouts:
            if name not in self.sha256:
                raise self._damaged(f"it has no {name}")
            with self._told(name) as file:
                found, expected = sha256_of(file), self.sha256[name]
                if found != expected:
                    raise CacheError(
                        f"{file}: SHA-256 {expected[:12]}… expected, {found[:12]}… found: {REMEDY}"
                    )
                array = _mapped(file)
            layout = Layout(array.dtype, array.shape, array.offset, array.flags.c_contiguous)
            self._layouts[name] = layout
        return self._layouts[name]

    @contextmanager
    def _told(self, name: str) -> Iterator[Path]:
        """The file of an array; that it cannot be read is a `CacheError`."""
        file = self.path / f"{name}.npy"
        try:
            yield file
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
            np.save(half / f"{name}.npy", np.ascontiguousarray(array))
        digests = {name: sha256_of(half / f"{name}.npy") for name in columns}
        index = json.dumps({"sha256": digests, "examples": examples})
        (half / "index.json").write_text(index, encoding="utf-8")


def _mapped(file: Path) -> np.memmap:
    found: np.memmap = np.load(file, mmap_mode="r")
    return found


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
