"""Files and folders that appear whole or not at all; locks; digests; what a disk says when it
refuses.

In: paths. Out: files that a kill at any moment leaves as they were before, or as they are after.
Decided here: how something is written so that this holds, what a left-over of a kill is called, and
what a person can do about each way in which a disk refuses. Nothing here knows what the files are
for: callers turn an `OSError` into an error of their own with `told_as`.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mlx_distill.errors import DistillError

REMEDIES = {
    errno.ENOSPC: "free some disk and run the same command again",
    errno.EDQUOT: "your quota is used up: delete some of your files and run the same command again",
    errno.EROFS: "that disk is mounted for reading only: choose a folder on another one",
    errno.EACCES: "you have no permission there: change it, or choose another folder",
    errno.EPERM: "you have no permission there: change it, or choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: name the folder itself",
    errno.EISDIR: "a folder has that name: move it away",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away",
    errno.EEXIST: "something has that name already: move it away",
    errno.ENOTEMPTY: "a folder with other files has that name: move it away",
    errno.ENOENT: "its folder is gone: was it moved or deleted meanwhile?",
    errno.EFBIG: "files of that size are not allowed there: raise `ulimit -f`",
    errno.EMFILE: "too many files are open: raise `ulimit -n` and run the same command again",
    errno.EIO: "the disk itself fails: choose a folder on another one",
    errno.ESTALE: "the network disk went away: mount it again and run the same command again",
    errno.ENOLCK: "that disk cannot lock files: choose a folder on another one",
    errno.ENOTSUP: "that disk cannot do this: choose a folder on another one",
}
WORDS_OF_LIBRARIES = {  # a library that writes by itself says in words why it could not
    "no space left": errno.ENOSPC,
    "quota": errno.EDQUOT,
    "read-only": errno.EROFS,
    "permission denied": errno.EACCES,
    "too long": errno.ENAMETOOLONG,
}
ANY_REMEDY = (  # a library that says no cause: most often there is no room, in one way or another
    "free some disk (or raise your quota, or `ulimit -f`) and run the same command again"
)
LEFT_OVER = re.compile(r"\.(?P<name>.+?)(-[0-9a-f]{8})?\.tmp")  # no digits: of an older version
LEFT_BY_SYSTEMS = (".DS_Store", "lost+found")  # in every folder that a Mac showed, on new disks
COMPANION = "._"  # macOS keeps beside `x`, in `._x`, what FAT and network disks cannot hold of it
FREE, HELD, UNKNOWN = "free", "held", "unknown"
ONE_LINE_CHARACTERS = 300


class InUse(DistillError, BlockingIOError):
    """Another process holds the lock."""

    __str__ = Exception.__str__


# what went wrong


def first_line(error: BaseException) -> str:
    """The error's text as it is, but for further lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def all_lines(error: BaseException, most: int = ONE_LINE_CHARACTERS) -> str:
    """All of an error's text on one line, cut after `most` characters; its kind where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def one_line(error: BaseException) -> str:
    """What an error of the system or of a library says, as one printable line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0][:ONE_LINE_CHARACTERS].rstrip(".") if lines else type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in first)


def remedy(error: BaseException) -> str:
    """What a person can do about a failure to write, by its cause."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        said = str(error).lower()
        found = (number for words, number in WORDS_OF_LIBRARIES.items() if words in said)
        number = next(found, None)
    return ANY_REMEDY if number is None else REMEDIES.get(number, ANY_REMEDY)


@contextmanager
def told_as(
    kind: type[DistillError], path: Path, kept: str = "", otherwise: str = ""
) -> Iterator[None]:
    """Turn a failure to write `path` into one line of this kind; `kept` says what is intact,
    `otherwise` what a person can do instead of the remedy.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        intact = f"{kept}; " if kept else ""
        instead = f", or {otherwise}" if otherwise else ""
        raise kind(
            f"{path}: cannot be written ({one_line(error)}); {intact}{remedy(error)}{instead}"
        ) from error


# whole or not at all


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, through to the disk. Raises `OSError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush_file(file)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # the first failure is the one to tell
            temporary.unlink()
        raise


def write_json(path: Path, content: dict | list) -> None:
    """The same, of JSON that a person can read."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which appears as `folder` by one rename, or not at all.

    What a killed process left half made under this name is removed first; what is being made is
    not. Raises whatever the filling raised, and `OSError`.
    """
    for path in left_overs(folder.parent, re.compile(re.escape(folder.name))):
        shutil.rmtree(path, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        with _held(temporary):
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_overs(parent: Path, name: re.Pattern) -> list[Path]:
    """The half-made folders of such names in `parent` that no process is making now."""
    found = []
    for path in sorted(parent.glob(".*.tmp")):
        match = LEFT_OVER.fullmatch(path.name)
        ours = match and name.fullmatch(match["name"]) and path.is_dir() and not path.is_symlink()
        if ours and _lock_of(path) is FREE:
            found.append(path)
    return found


def is_left_by_a_system(name: str) -> bool:
    """Whether an operating system makes files of this name by itself, in anybody's folder."""
    return name in LEFT_BY_SYSTEMS or name.startswith(COMPANION)


def of_people(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder under such names, in order, but for what a system put there. Nothing
    where there is no folder; raises `OSError` for one that cannot be read.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        path for path in there if path.match(pattern) and not is_left_by_a_system(path.name)
    )


# through to the disk


def flush_file(file: IO[Any]) -> None:
    """Wait until an open file lies on the disk; macOS has a call of its own for its last cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # a disk that does not know it
            fcntl.fcntl(file.fileno(), full)
            return
    os.fsync(file.fileno())


def flush_to_disk(folder: Path) -> None:
    """Wait until every file and folder in it lies on the disk."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with path.open("rb") as file:
                flush_file(file)
        else:
            flush_folder(path)


def flush_folder(folder: Path) -> None:
    """The same for a folder's list of names, after a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# one process at a time


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path` for this process; raises `OSError` where it cannot be made or
    locked.

    Where another process holds it: raises `InUse`, or calls `waiting` and waits.
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise InUse(f"{path} is held by another process") from None
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file now. Writes nothing; False where that cannot be
    known.
    """
    return _lock_of(path) is HELD


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network disk that cannot: its left-overs stay
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _lock_of(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return UNKNOWN
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return HELD
    except OSError:
        return UNKNOWN
    finally:
        os.close(descriptor)
    return FREE


# digests


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
