"""The SHA-256 of a run's files, and which of them are no longer as the run wrote them."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_distill.files import is_left_by_a_system, one_line, sha256_of


def all_files(folder: Path) -> list[str]:
    """The files in a folder, at any depth, by their paths in it, but for a system's own."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not is_left_by_a_system(path.name)
    )


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Name → SHA-256 of files in a folder, read side by side: one thread is slower than a fast
    disk.
    """
    names = list(names)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(sha256_of, [folder / name for name in names]))
    return dict(zip(names, found, strict=True))


def changed(folder: Path, kept: dict[str, str]) -> str:
    """The first file that is missing or has another SHA-256 than was kept, as a sentence; "" if
    none.
    """
    try:
        missing = [name for name in kept if not (folder / name).is_file()]
        found = {} if missing else digests(folder, kept)
    except OSError as error:
        return f"{folder} cannot be read ({one_line(error)})"
    if missing:
        return f"{folder / missing[0]} is missing"
    wrong = [name for name, digest in kept.items() if found[name] != digest]
    return (
        f"{folder / wrong[0]} is damaged: its SHA-256 is not the one it was saved with"
        if wrong
        else ""
    )
