"""The functions that a loaded shared library calls in others, pointed elsewhere.

In: a library of this process (64-bit ELF, so Linux) and addresses by function name. Out: its slots
(the entries of its global offset table), changed in this process alone; no file is touched.
Decided here: that all named functions are found and changed, or none.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SECTION = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("address", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("align", "<u8"),
        ("entry", "<u8"),
    ]
)
RELOCATION = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])
SYMBOL = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("section", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)
RELA, DYNAMIC_SYMBOLS = 4, 11  # types of sections
# (jump slot, global data) by machine: x86-64 and aarch64
SLOT_KINDS = {62: (7, 6), 183: (1026, 1025)}


def slots(library: Path) -> dict[str, list[int]]:
    """Function → where its slots lie, relative to where the library is loaded. Raises `OSError`, or
    `ValueError` for a file that is no such library.
    """
    content = library.read_bytes()
    if content[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{library} is no 64-bit little-endian ELF file")
    machine = int.from_bytes(content[0x12:0x14], "little")
    if machine not in SLOT_KINDS:
        raise ValueError(f"{library} is for machine {machine}, known are {list(SLOT_KINDS)}")
    start = int.from_bytes(content[0x28:0x30], "little")
    count = int.from_bytes(content[0x3C:0x3E], "little")
    sections = np.frombuffer(content, SECTION, count, start)
    found: dict[str, list[int]] = {}
    for section in sections[sections["type"] == RELA]:
        symbols = sections[section["link"]]
        if symbols["type"] != DYNAMIC_SYMBOLS:
            continue
        names = _part(content, symbols, SYMBOL)["name"]
        text_at = int(sections[symbols["link"]]["offset"])
        rows = _part(content, section, RELOCATION)
        for row in rows[np.isin(rows["info"] & 0xFFFFFFFF, SLOT_KINDS[machine])]:
            begin = text_at + int(names[int(row["info"]) >> 32])
            name = content[begin : content.index(b"\0", begin)].decode()
            found.setdefault(name, []).append(int(row["offset"]))
    return found


def _part(content: bytes, section: np.void, rows: np.dtype) -> np.ndarray:
    count = int(section["size"]) // rows.itemsize
    return np.frombuffer(content, rows, count, int(section["offset"]))


def slots_in_memory(library: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Function → the addresses of its slots in this process. Raises `ValueError` where one of them
    has no slot or the library is not loaded.
    """
    base, known, wanted = loaded_at(library), slots(library), set(names)
    if missing := wanted - known.keys():
        raise ValueError(f"{library} does not call {', '.join(sorted(missing))}")
    return {name: [base + offset for offset in known[name]] for name in wanted}


def read(slot: int) -> int:
    """The address that a slot calls."""
    return ctypes.c_uint64.from_address(slot).value


def write(addresses: Mapping[int, int]) -> dict[int, int]:
    """Let slots call these addresses; returns what they called before. Raises `OSError` where the
    memory of one stays closed; then all call what they called before.
    """
    before: dict[int, int] = {}
    try:
        for slot, address in addresses.items():
            with _writable(slot):
                before[slot] = read(slot)
                ctypes.c_uint64.from_address(slot).value = address
    except (OSError, ValueError):
        write(before)
        raise
    return before


class _Loaded(ctypes.Structure):
    """The beginning of `struct dl_phdr_info`."""

    _fields_ = (("base", ctypes.c_uint64), ("name", ctypes.c_char_p))


def loaded_at(library: Path) -> int:
    """The address at which a library is loaded in this process. Raises `ValueError`."""
    wanted, found = library.resolve(), list[int]()

    def look(info: ctypes.Array, size: int, data: None) -> int:
        name = info[0].name
        if name and Path(name.decode(errors="surrogateescape")).resolve() == wanted:
            found.append(info[0].base)
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(kind(look), None)
    if not found:
        raise ValueError(f"{library} is not loaded")
    return found[0]


@contextmanager
def _writable(address: int) -> Iterator[None]:
    """Open the page of an address, and close it again where it was closed."""
    page = address & ~(mmap.PAGESIZE - 1)
    closed = not _is_writable(address)
    if closed:
        _protect(page, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        yield
    finally:
        if closed:
            _protect(page, mmap.PROT_READ)


def _is_writable(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        places, rights, *_ = line.split(maxsplit=2)
        begin, end = (int(place, 16) for place in places.split("-"))
        if begin <= address < end:
            return "w" in rights
    raise ValueError(f"no memory at {address:#x}")


def _protect(page: int, rights: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), rights):
        raise OSError(ctypes.get_errno(), "mprotect")
