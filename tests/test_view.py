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


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_view(width=80, terminal=False):
    clock = Clock()
    screen = Screen(file=io.StringIO(), width=width, force_terminal=terminal)
    return View(screen, clock), clock


def numbers_of(step):
    more = {"loss": 0.5, "kd": 0.25, "ce": 1.0, "peak_bytes": 5.6e8}
    return more if step == 1 else more | {"tokens_per_second": 12_345.6}


def test_the_time_left_is_told_without_a_terminal_and_the_first_step_is_not_counted():
    view, clock = make_view(200)
    view.start(20, 0)
    for step in range(1, 21):
        clock.now += 60 if step == 1 else 2  # it compiles
        view.step(step, numbers_of(step), ["kd"])
    lines = view.console.file.getvalue().splitlines()
    assert lines[0] == "training 1/20  loss 0.5000  kd 0.2500  peak 0.56 GB"
    assert lines[1].startswith("training 2/20  left 36 s  loss 0.5000")
    assert lines[1].endswith("  12,346 tok/s  peak 0.56 GB")
    assert "training 19/20  left 2.0 s" in lines[18] and "left" not in lines[19]


def test_a_continued_run_tells_its_own_pace():
    view, clock = make_view(200)
    view.start(20, 10)
    for step in (11, 12, 13):
        clock.now += 3
        view.step(step, numbers_of(step), [])
    assert "training 13/20  left 21 s  loss" in view.console.file.getvalue().splitlines()[-1]


def test_other_work_tells_its_time_from_its_first_piece_on():
    view, clock = make_view()
    count = view.count("asking the teacher", 40)
    clock.now += 5
    count(10)
    count(0)
    clock.now += 5
    count(30)
    said = "asking the teacher 10/40  left 15 s\nasking the teacher 40/40\n"
    assert view.console.file.getvalue() == said


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_lines_are_folded_between_their_fields(width):
    view, clock = make_view(width)
    view.start(4, 0)
    for step in (1, 2, 3):
        clock.now += 100
        view.step(step, numbers_of(2), ["kd", "ce"])
    view.validation(
        3,
        {f"{name}_{part}": 0.125 for name in ("kl", "ce") for part in ("cot", "answer")}
        | {"loss": 1},
    )
    text = view.console.file.getvalue()
    assert max(map(len, text.splitlines())) <= max(
        width, len("validation after step 3: loss 1.0000")
    )
    fields = [field for line in text.splitlines() for field in line.strip().split("  ")]
    assert fields[6:13] == [
        "training 2/4", "left 3 min 20 s", "loss 0.5000", "kd 0.2500", "ce 1.0000", "12,346 tok/s",
        "peak 0.56 GB",
    ]  # fmt: skip
    assert fields[-4:] == ["kl_cot 0.1250", "kl_answer 0.1250", "ce_cot 0.1250", "ce_answer 0.1250"]


def test_a_live_bar_fits_its_terminal():
    for width in (60, 80):
        view, clock = make_view(width, terminal=True)
        with view:
            view.start(10_000, 9_000)
            for step in (9_001, 9_002):
                clock.now += 100
                view.step(step, numbers_of(2), ["kd"])
            shown = view._bar.get_renderable()
            lines = view.console.render_lines(shown, pad=False)
            said = "".join(segment.text for segment in lines[0])
            assert len(lines) == 1 and len(said) <= width
            assert "9002/10000" in said and "left 27 h 43 min" in said
            assert ("loss 0.5000" in said) == (width == 80)
            view.doing("half of the tokens, with the teacher, seed 1: training 50/100", True)
            lines = view.console.render_lines(view._bar.get_renderable(), pad=False)
            assert len(lines) == 1


def test_what_a_run_is_at_is_a_line_where_it_is_news():
    view, _ = make_view()
    view.doing("a tenth of the tokens: training 3/10", False)
    view.doing("a tenth of the tokens: training 5/10", True)
    assert view.console.file.getvalue() == "a tenth of the tokens: training 5/10\n"
