"""How a file of text, JSON, JSON lines or TOML is read, whoever reads it.

In: a path (or text) of a person, a library or an earlier run. Out: text or plain values. Decided
here: UTF-8 with or without its mark, `.gz` by a name's ending, how deep values may nest, which
numbers can be read, and that whatever cannot be read ends in one line that says the file, the line
and what is wrong there.

What is read here can be used without a second thought: it is never nested so deep that walking,
copying or printing it fails, its floats are finite and no key of an object has two values. A string
may hold half of a character (`\\ud83d` alone, as JSON can say it); it can't be encoded, so whoever
encodes asks `is_text` before.
"""

import gzip
import json
import re
import stat
import sys
import tomllib
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_distill.errors import DataError, DistillError, NotFound, RecipeError

DEEPEST = 100  # levels of lists and objects inside each other
LONGEST_TOML = 1 << 20  # bytes; TOML is written by hand
LONGEST_NAME = 255  # bytes that one part of a path may have
LONGEST_PATH = 4096
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")  # what UTF-16 and UTF-32 begin with
PIECES = re.compile(
    r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL
)  # of JSON: what nests, and strings, which do not
HALVES = re.compile("[\ud800-\udfff]")  # of characters beyond the first plane, as UTF-16 has them
Error = type[DistillError]


def read_text(path: Path, name: str = "", error: Error = DataError) -> str:
    """The whole file as text; `name` is what errors call it, and they are `error`s but for a
    missing file's `NotFound`.
    """
    name = name or str(path)
    content = b""
    with _opened(path, name, error) as file:
        try:
            content = file.read()
        except (OSError, EOFError, zlib.error) as why:
            raise error(f"{name}: {_unread(why)}") from None
    return _decoded(content, name, error)


def read_json(path: Path, name: str = "", error: Error = DataError) -> Any:
    """The value that a JSON file holds, as `parse_json` has it."""
    name = name or str(path)
    return _parsed(read_text(path, name, error), name, error, lines=True)


def read_json_lines(
    path: Path, name: str = "", error: Error = DataError
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) for each line that is not blank, read one at a time."""
    name = name or str(path)
    for number, line in read_lines(path, name, error):
        if line.strip():
            yield number, parse_json(line, f"{name}, line {number}", error)


def read_lines(path: Path, name: str = "", error: Error = DataError) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its end) for each line, read one at a time; only "\\n" ends a
    line.
    """
    name, number = name or str(path), 0
    with _opened(path, name, error) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, _decoded(line, name, error, number)
        except (OSError, EOFError, zlib.error) as why:
            raise error(f"{name}, line {number + 1}: {_unread(why)}") from None


def parse_json(text: str | bytes, where: str, error: Error = DataError) -> Any:
    """The value that JSON text says; a bare NaN or Infinity is None. `where` begins the line of an
    error.
    """
    if isinstance(text, bytes):
        text = _decoded(text, where, error)
    return _parsed(text.removeprefix("\ufeff"), where, error, lines=False)


def read_toml(path: Path, error: Error = RecipeError) -> dict[str, Any]:
    """The tables of a TOML file."""
    name = str(path)
    with _opened(path, name, error) as file:
        try:
            content = file.read(LONGEST_TOML + 1)
        except (OSError, EOFError, zlib.error) as why:
            raise error(f"{name}: {_unread(why)}") from None
    if len(content) > LONGEST_TOML:
        raise error(
            f"{name}: larger than {LONGEST_TOML // 1024:,} KiB; a file of settings is smaller: is "
            "it another file?"
        )
    return parse_toml(_decoded(content, name, error), name, error)


def parse_toml(text: str, where: str, error: Error = RecipeError) -> dict[str, Any]:
    """The tables that TOML text says; `where` begins the line of an error."""
    try:
        return _tables(text, where, error)
    except tomllib.TOMLDecodeError as why:
        end = f"at line {_line(text.rstrip(), len(text))}, the last"
        raise error(
            f"{where}: not valid TOML: {str(why).replace('at end of document', end)}"
        ) from None


def toml_value(text: str, where: str, error: Error = RecipeError) -> Any:
    """The value that TOML text says; text that is no single value is a bare word, and the value
    itself.
    """
    try:
        tables = _tables(f"value = {text}", where, error)
    except tomllib.TOMLDecodeError:
        return text.strip()
    return tables["value"] if len(tables) == 1 else text.strip()


def is_text(value: Any) -> bool:
    """Whether every string in a value that was read can be encoded: none has half of a character."""
    if isinstance(value, str):
        return value.isascii() or not HALVES.search(value)
    if isinstance(value, dict):
        return all(map(is_text, value.keys())) and all(map(is_text, value.values()))
    return not isinstance(value, list | tuple) or all(map(is_text, value))


def path_of(text: str, where: str, error: Error = RecipeError) -> Path:
    """The path that a field or an option names, `~` expanded; an `error` for one that no file can
    have.

    `where` is the field or option as a person wrote it. Whether the path is there is not asked.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0]
        raise error(f"{where}: there is no home folder {user!r}; write the path out") from None
    if "\0" in text:
        raise error(f"{where}: a path cannot hold a NUL character, found {text[:60]!r}")
    longest = max(
        (part.encode(errors="surrogatepass") for part in path.parts), key=len, default=b""
    )
    if len(longest) > LONGEST_NAME:
        found = f"{len(longest)} bytes ({longest[:20].decode(errors='replace')}…)"
        raise error(
            f"{where}: a name in a path can have {LONGEST_NAME} bytes, found one of {found}"
        )
    if len(str(path).encode(errors="surrogatepass")) > LONGEST_PATH:
        raise error(
            f"{where}: a path can have {LONGEST_PATH:,} bytes, found {len(str(path)):,} "
            f"({text[:20]}…)"
        )
    return path


# the bytes of a file


def _opened(path: Path, name: str, error: Error) -> BinaryIO | gzip.GzipFile:
    """The file's bytes, unpacked where its name ends in .gz."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"no file at {name}") from None
    except OSError as why:
        raise error(f"{name}: {_unread(why)}") from None
    except ValueError:  # a path with a NUL, or half of a character
        raise error(f"{name!r} is not a path that a file can have") from None
    if stat.S_ISDIR(kind):
        raise NotFound(f"no file at {name}, which is a folder")
    raise error(f"{name}: a device or pipe, expected a file")


def _unread(why: Exception) -> str:
    if isinstance(why, OSError) and why.strerror:
        return f"cannot be read ({why.strerror})"
    return f"cannot be unpacked ({' '.join(str(why).split())}); fetch or pack it again"


def _decoded(content: bytes, name: str, error: Error, line: int = 0) -> str:
    """Text of UTF-8 bytes, without a mark at its beginning; `line` is set where they are one line
    of a file.
    """
    if line <= 1 and content.startswith(WIDE_MARKS):
        raise error(f"{name}: UTF-16 or UTF-32 text, expected UTF-8; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig" if line <= 1 else "utf-8")
    except UnicodeDecodeError as why:
        at = f"line {line or _line(content, why.start)}"
        raise error(
            f"{name}, {at}: byte 0x{content[why.start]:02x} is not UTF-8; save it as UTF-8"
        ) from None
    if "\0" in text:
        at = f"line {line or _line(text, text.index(chr(0)))}"
        raise error(f"{name}, {at}: holds a NUL byte, so it is not text in UTF-8; save it as UTF-8")
    return text


def _line(text: Any, position: int) -> int:
    """The number of the line, from 1, in which a position of text or bytes lies."""
    return text.count(b"\n" if isinstance(text, bytes) else "\n", 0, position) + 1


# JSON and TOML values


class _NumberError(ValueError):
    """A number that a float cannot hold; its only argument is the number as it is written."""


class _TwiceError(ValueError):
    """A key with two values; its only argument is the key."""


def _parsed(text: str, where: str, error: Error, lines: bool) -> Any:
    """`lines`: whether `where` is a file, whose lines are to be named."""
    if not text.strip():
        raise error(f"{where}: empty, expected JSON")
    try:
        value = json.loads(
            text, parse_constant=_none, parse_float=_float, object_pairs_hook=_object
        )
    except json.JSONDecodeError as why:
        at = f", line {why.lineno}" if lines else ""
        raise error(f"{where}{at}: not valid JSON ({why.msg} at character {why.colno})") from None
    except RecursionError:
        raise error(_too_deep(where, text, "" if lines else None)) from None
    except _TwiceError as why:
        raise error(
            f"{where}: the key {why.args[0]!r} has two values in one object; delete one"
        ) from None
    except ValueError as why:  # a number
        at = _line_of_number(text, why) if lines else ""
        raise error(f"{where}{at}: not valid JSON: {_of_a_number(why)}") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise error(_too_deep(where, text, "" if lines else None))
    return value


def _tables(text: str, where: str, error: Error) -> dict[str, Any]:
    """What TOML text says; raises `TOMLDecodeError` where it is none, an `error` for what no one
    can use.
    """
    try:
        tables = tomllib.loads(text, parse_float=_float)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError:
        raise error(_too_deep(where, text, "")) from None
    except ValueError as why:  # a number
        at = _line_of_number(text, why)
        raise error(f"{where}{at}: not valid TOML: {_of_a_number(why)}") from None
    if _depth(tables) > DEEPEST:
        raise error(_too_deep(where, text, ""))
    bits = sys.float_info.max_exp  # hexadecimal digits have no limit of their own
    if _largest_bits(tables) > bits:
        raise error(f"{where}: not valid TOML: an integer of more than {bits:,} bits")
    return tables


def _none(_: str) -> None:
    """JSON has no NaN and no Infinity; Python writes them all the same where there is no number."""


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")) and "inf" not in text.lower():
        raise _NumberError(text)
    if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise _NumberError(text)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise _TwiceError(key)
    return found


def _of_a_number(why: ValueError) -> str:
    if isinstance(why, _NumberError):
        return f"the number {_short(why.args[0])} is out of a float's range"
    return f"a number of more than {sys.get_int_max_str_digits():,} digits"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:20]}…{text[-10:]}"


def _line_of_number(text: str, why: ValueError) -> str:
    """ ", line 3": where in a file the number stands that could not be read."""
    if isinstance(why, _NumberError):
        position = text.find(why.args[0])
    else:
        found = re.search(rf"[\d_]{{{sys.get_int_max_str_digits() + 1}}}", text)
        position = found.start() if found else -1
    return f", line {_line(text, position)}" if position >= 0 else ""


def _depth(value: Any) -> int:
    """How many lists and objects lie inside each other, without a call for each of them."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in _inside(one)]
    return depth


def _largest_bits(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return (
        max(map(_largest_bits, _inside(value)), default=0) if isinstance(value, dict | list) else 0
    )


def _inside(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _too_deep(where: str, text: str, line: str | None) -> str:
    """`line` is None where `where` names the line already."""
    if line is not None and (found := _line_of_depth(text)):
        line = f", line {found}"
    return f"{where}{line or ''}: nested more than {DEEPEST} levels deep"


def _line_of_depth(text: str) -> int | None:
    depth = 0
    for piece in PIECES.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(piece[0], 0)
        if depth > DEEPEST:
            return _line(text, piece.start())
    return None
