"""What is printed is shown, never obeyed, and every stream takes it."""

import io
import sys

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.pipeline import Pipeline
from mlx_distill.recipe.load import load_recipe
from mlx_distill.view import OBEYED, Screen, View, one_line, plain, show_what_can_be_shown

WILD = "\x1b]0;title taken\x07\x1b[2J\x9b31m\r\b\u202eevil\u2066\u2028[red]:smile:\udcff\U000e0041"


CONTROLS = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))]


@pytest.mark.parametrize("letter", [*CONTROLS, *"\u202a\u202e\u2066\u2069\u061c\U000e0041"])
def test_what_a_terminal_would_obey_is_written_out(letter):
    assert (
        OBEYED.search(letter)
        and not OBEYED.search(plain(letter))
        and plain(letter).startswith("\\")
    )
    assert plain(f"a{letter}b") == f"a{plain(letter)}b" == plain(plain(f"a{letter}b"))


def test_all_other_text_is_left_as_it_is():
    text = "a\tb\nc é 数 😀 👨‍👩‍👧 ⟦x⟧ \\x1b"
    assert plain(text) == text and one_line(text) == text.replace("\n", "\\n")


def printed(*renderables, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="nearest", newline="")
    screen = Screen(file=file, width=200, force_terminal=True)
    for renderable in renderables:
        screen.print(renderable)
    View(screen).say(WILD)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_nothing_on_a_screen_is_obeyed_whatever_it_is_in():
    table = Table(title=WILD, caption=WILD)
    table.add_column(WILD)
    table.add_row(WILD)
    table.add_row(Text(WILD, "bold red"))
    out = printed(WILD, Text(WILD, "red"), table)
    assert out.count("\\x1b]0;title taken") == 8 and out.count("[red]:smile:") == 8
    for start in out.split("\x1b")[1:]:
        assert start[0] == "[" and start.partition("m")[0][1:].replace(";", "").isdigit(), repr(
            start[:20]
        )  # colours alone
    assert not OBEYED.search(out.replace("\x1b", ""))


def test_markup_in_data_is_text():
    assert "[/] [bold]x[/bold] [link=a]" in printed("[/] [bold]x[/bold] [link=a]")


def test_a_stream_of_ascii_gets_the_nearest_text():
    out = printed("a × b · c … → é 数 ⟦x⟧", encoding="ascii")
    assert "a x b - c ... -> e ? [x]" in out


def test_the_programs_own_streams_take_any_text(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    show_what_can_be_shown()
    print("× \udcff", flush=True)
    assert sys.stdout.buffer.getvalue() == b"x ?\n"
    monkeypatch.setattr(sys, "stdout", None)  # closed by a shell
    show_what_can_be_shown()


@pytest.mark.parametrize("asked, said", [("auto", "float32: MLX"), ("bfloat16", "bfloat16: stud")])
def test_the_first_line_says_in_what_the_student_computes(tiny_recipe, asked, said):
    text = io.StringIO()
    recipe = load_recipe(tiny_recipe, [f"student.compute_dtype={asked}"])
    Pipeline(recipe, View(Console(file=text)), MlxBackend()).announce()
    assert text.getvalue().startswith("backend mlx on ") and f", {said}" in text.getvalue()
