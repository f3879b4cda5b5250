"""The header of a `.gguf` file, walked before anything believes it.

In: a file. Out: nothing, or a `ValueError` that says what does not fit. Decided here: every length,
count and offset of the header must fit into the file, because the library that reads it next
reserves what a header asks for.
"""

import math
import mmap
import struct
from pathlib import Path

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# value type → bytes
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
DEEPEST = 3  # arrays inside each other
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # of tensors, unless the file says otherwise


def check_header(path: Path) -> None:
    """Raise `ValueError` unless every length in the header fits into the file, and every tensor
    lies in it alone.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{size} bytes, the shortest header has 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _Walk(content, size).whole()


class _Walk:
    """A place in the file that moves forward; nothing is kept but what the tensors need."""

    def __init__(self, content: mmap.mmap, size: int):
        self.content, self.size, self.at = content, size, 0
        self.alignment = ALIGNMENT

    def whole(self) -> None:
        if self.content[:4] != MAGIC:
            raise ValueError("GGUF magic invalid")
        self.at = 4
        self.order = "<" if self.content[4:6] != b"\0\0" else ">"
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, not one of {VERSIONS}")
        tensors, fields = self.number("Q"), self.number("Q")
        self.fits(fields, 13, "fields")
        self.fits(tensors, 24, "tensors")
        for _ in range(fields):
            key = self.text()
            kind = self.number("I")
            if key == b"general.alignment" and kind == 4:
                self.alignment = self.peek()
            self.value(kind, 0)
        self.tensors(tensors)

    def peek(self) -> int:
        alignment = self.number("I")
        self.at -= 4
        if not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment}, a power of two was expected")
        return alignment

    def tensors(self, count: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        places = []
        for _ in range(count):
            name = self.text().decode("utf-8", "replace")[:60]
            dimensions = self.number("I")
            if not 0 < dimensions <= MOST_DIMENSIONS:
                raise ValueError(
                    f"tensor {name} has {dimensions} dimensions, at most {MOST_DIMENSIONS} were "
                    "expected"
                )
            shape = [self.number("Q") for _ in range(dimensions)]
            kind = GGMLQuantizationType(self.number("I"))  # ValueError for one that there is not
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[0] % block:
                raise ValueError(
                    f"tensor {name} has the shape {shape}, which {kind.name} cannot have"
                )
            places.append((self.number("Q"), math.prod(shape) // block * block_bytes, name))
        start = -(-self.at // self.alignment) * self.alignment
        end, before = 0, ""
        for offset, length, name in sorted(places):
            if offset < end:
                raise ValueError(f"tensors {before} and {name} lie over each other")
            end, before = offset + length, name
            if offset % self.alignment or start + end > self.size:
                raise ValueError(f"tensor {name} ends at byte {start + end:,} of {self.size:,}")

    def value(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            each = SCALARS.get(inner)
            self.fits(count, each or 8, "values of an array")
            if each:
                self.skip(count * each)
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        elif kind in SCALARS:
            self.skip(SCALARS[kind])
        else:
            raise ValueError(f"a value of the type {kind}, which there is not")

    def text(self) -> bytes:
        length = self.number("Q")
        begin = self.at
        self.skip(length)
        return self.content[begin : begin + length] if length <= 1000 else b""

    def number(self, form: str) -> int:
        begin = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(self.order + form, self.content, begin)[0]

    def skip(self, length: int) -> None:
        if length > self.size - self.at:
            raise ValueError(f"{length:,} bytes are asked at byte {self.at:,} of {self.size:,}")
        self.at += length

    def fits(self, count: int, least: int, what: str) -> None:
        if count * least > self.size - self.at:
            raise ValueError(f"{count:,} {what} in a file of {self.size:,} bytes")
