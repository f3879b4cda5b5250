import gzip
import json
from pathlib import Path

import pytest

from mlx_distill.errors import CacheError, DataError, DistillError, NotFound, RecipeError
from mlx_distill.readers import (
    DEEPEST,
    is_text,
    parse_json,
    parse_toml,
    path_of,
    read_json,
    read_json_lines,
    read_text,
    read_toml,
)


@pytest.fixture
def written(tmp_path):
    def write(name: str, content: bytes | str) -> Path:
        content = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def refused(error: type[DistillError], read, *arguments) -> str:
    """The line of the error that reading raises."""
    with pytest.raises(error) as caught:
        read(*arguments)
    line = str(caught.value)
    assert "\n" not in line and 0 < len(line) < 800
    return line


def lines_of(path: Path, name: str = "") -> list:
    return list(read_json_lines(path, name))


# JSON


@pytest.mark.parametrize(
    ("text", "value"),
    {
        '{"a": [1, 2.5, "x", null, true]}': {"a": [1, 2.5, "x", None, True]},
        '\ufeff{"a": 1}': {"a": 1},
        "[NaN, Infinity, -Infinity]": [None, None, None],
        '{"a": 1, "a": 1}': {"a": 1},
        "[" * DEEPEST + "]" * DEEPEST: None,
        '["' + "[{" * 1000 + '"]': ["[{" * 1000],
        "[" + "[]," * 1000 + "[]]": [[]] * 1001,
        "-0.0": 0.0,
        "0e999": 0.0,
    }.items(),
)
def test_json_that_can_be_read(text, value):
    found = parse_json(text, "here")
    assert value is None or found == value
    assert parse_json(text.encode(), "here") == found


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "": "here: empty",
        " \r\n": "here: empty",
        '{"a": 1': "here: not valid JSON (Expecting ',' delimiter at character 8)",
        "{'a': 1}": "here: not valid JSON",
        '{"a": 1} {"a": 2}': "here: not valid JSON (Extra data at character 10)",
        '"a\tb"': "here: not valid JSON (Invalid control character",
        "9" * 5000: "here: not valid JSON: a number of more than 4,300 digits",
        "[1e999]": "here: not valid JSON: the number 1e999 is out of a float's range",
        "-" + "9" * 400 + ".0": "is out of a float's range",
        "1e-999": "here: not valid JSON: the number 1e-999 is out of a float's range",
        "[" * 100_000: f"here: nested more than {DEEPEST} levels deep",
        "[" * 100_000 + "]" * 100_000: f"here: nested more than {DEEPEST} levels deep",
        "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1): f"here: nested more than {DEEPEST} levels deep",
        '{"a":' * (DEEPEST + 1)
        + "1"
        + "}" * (DEEPEST + 1): f"here: nested more than {DEEPEST} levels deep",
        '{"a": 1, "a": 2}': "here: the key 'a' has two values",
        b'{"a": "\xff"}': "here, line 1: byte 0xff is not UTF-8",
        '{"a": 1}'.encode("utf-16"): "here: UTF-16 or UTF-32 text",
        '{"a": 1}'.encode("utf-32"): "here: UTF-16 or UTF-32 text",
        '{"a": 1}'.encode("utf-16-le"): "here, line 1: holds a NUL byte",
    }.items(),
    ids=range(19),
)
def test_json_that_cannot_be_read_is_one_line(text, says):
    assert says in refused(CacheError, parse_json, text, "here", CacheError)


@pytest.mark.parametrize(
    ("content", "line"),
    {
        "[\n1,\n2\n3]": 4,
        "[\n1,\n" + "9" * 5000 + "]": 3,
        "[\n1,\n\n1e999]": 4,
        "[\n" + "[" * 100_000: 2,
        "[\n\n" + "[" * DEEPEST + "]" * DEEPEST + "]": 3,
        b'[\n"a",\n"\xe9"]': 3,
        '[\n"a\0"]': 2,
    }.items(),
    ids=range(7),
)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "A.JSON.GZ"])
def test_a_json_files_errors_name_file_and_line(written, name, content, line):
    content = content.encode() if isinstance(content, str) else content
    path = written(name, content)
    if name.isupper():
        path.write_bytes(gzip.compress(content))
    assert refused(DataError, read_json, path).startswith(f"{path}, line {line}: ")
    assert refused(DataError, read_json, path, "rows").startswith(f"rows, line {line}: ")


# JSON lines


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_are_numbered_as_an_editor_does(written, name, end, mark):
    path = written(name, mark + end.join(['{"a": 1}', "", "  ", '{"a": "\u2028\x85"}', "3"]))
    assert lines_of(path) == [(1, {"a": 1}), (4, {"a": "\u2028\x85"}), (5, 3)]


@pytest.mark.parametrize(
    ("bad", "says"),
    {
        '{"a": ': "not valid JSON",
        "[" * 20_000: "nested more than",
        "9" * 5000: "a number of more than",
        b'"\xc3\x28"': "byte 0xc3 is not UTF-8",
        b"1\x00": "NUL",
        '\ufeff{"a": 1}'.replace("{", "{{"): "not valid JSON",
    }.items(),
    ids=range(6),
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_bad_line_is_named_after_the_good_ones_were_given(written, name, bad, says):
    bad = bad.encode() if isinstance(bad, str) else bad
    rows = read_json_lines(written(name, b"1\n\n2\n" + bad + b"\n4\n"), "rows")
    assert [next(rows), next(rows)] == [(1, 1), (3, 2)]
    assert refused(DataError, next, rows).startswith("rows, line 4: ")


def test_what_is_not_gzip_or_ends_early_is_one_line(written, tmp_path):
    whole = written("a.jsonl.gz", "\n".join(str(number) for number in range(50_000)))
    packed = whole.read_bytes()
    whole.write_bytes(packed[: len(packed) // 2])
    assert "cannot be unpacked" in refused(DataError, lines_of, whole)
    assert "cannot be unpacked" in refused(DataError, read_text, whole)
    whole.write_bytes(b"{}\n")
    assert "cannot be unpacked" in refused(DataError, lines_of, whole)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    whole.write_bytes(damaged)
    refused(DataError, lines_of, whole)


# TOML


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_toml_with_a_mark_and_any_line_ends(written, mark, end):
    assert read_toml(written("a.toml", mark + end.join(["[a]", "b = 1_000.5", ""]))) == {
        "a": {"b": 1000.5}
    }


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "a = ": "not valid TOML: Invalid value (at line 1, the last)",
        "\na = 1\na = 2": "not valid TOML: Cannot overwrite a value (at line 3, the last)",
        "\na = " + "9" * 5000: ", line 2: not valid TOML: a number of more than 4,300 digits",
        "\na = 0x" + "f" * 5000: "an integer of more than 1,024 bits",
        "\na = 1e999": ", line 2: not valid TOML: the number 1e999 is out of a float's range",
        "\na = 1e-999": ", line 2: not valid TOML: the number 1e-999 is out of a float's range",
        "\na = " + "[" * 5000: ", line 2: nested more than",
        "\na = " + "[" * 101 + "]" * 101: ", line 2: nested more than",
        "a." * 2000 + "a = 1": "nested more than",
        b"\n\na = '\xff'": ", line 3: byte 0xff is not UTF-8",
        "a = 1".encode("utf-16"): "UTF-16",
        "a = '\0'": ", line 1: holds a NUL byte",
        "a = '\ud83d'".encode(errors="surrogatepass"): ", line 1: byte 0xed is not UTF-8",
        'a = "\\ud83d"': "not valid TOML",
        "# " + "x" * (1 << 20): "larger than 1,024 KiB",
    }.items(),
    ids=range(15),
)
def test_toml_that_cannot_be_read_is_one_line(written, content, says):
    path = written("a.toml", content)
    line = refused(RecipeError, read_toml, path)
    assert line.startswith(str(path)) and says in line
    refused(CacheError, read_toml, path, CacheError)


def test_toml_keeps_its_infinities_for_the_field_to_refuse():
    assert parse_toml("a = inf", "here") == {"a": float("inf")}


# files that are none


@pytest.mark.parametrize("read", [read_text, read_json, lines_of, read_toml])
def test_what_is_no_file_is_one_line(read, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("1")
    assert "no file at" in refused(NotFound, read, tmp_path / "missing")
    assert "which is a folder" in refused(NotFound, read, tmp_path)
    assert "a device or pipe, expected a file" in refused(DistillError, read, Path("/dev/zero"))
    for wrong in ("loop", "y" * 300, "file/inside", "nul\0", "half \udcff"):
        refused(DistillError, read, tmp_path / wrong)


# half of a character, and paths


def test_half_of_a_character_is_read_and_found():
    half, pair = (
        parse_json(r'{"a": ["x", "\ud83d"]}', "here"),
        parse_json(r'["\ud83d\ude00"]', "here"),
    )
    assert half == {"a": ["x", "\ud83d"]} and not is_text(half)
    assert pair == ["😀"] and is_text(pair)
    assert not is_text({"\udcff": 1}) and is_text({"é": (1, None)})
    with pytest.raises(UnicodeEncodeError):
        json.dumps(half, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "~nobody-is-called-so/x": "there is no home folder '~nobody-is-called-so'",
        "a\0b": "NUL",
        "a/" + "y" * 300: "found one of 300 bytes",
        "a/" + "ä" * 200: "found one of 400 bytes",
        "ab/" * 2000: "can have 4,096 bytes",
    }.items(),
    ids=range(5),
)
def test_a_path_that_no_file_can_have_is_one_line(text, says):
    line = refused(RecipeError, path_of, text, "run.folder")
    assert line.startswith("run.folder: ") and says in line


def test_a_path_that_can_be_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert path_of("~/a", "run.folder") == Path("/home/somebody/a")
    assert path_of("y" * 255, "run.folder") == Path("y" * 255)
