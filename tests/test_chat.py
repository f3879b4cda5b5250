"""Talking to a model: what is thinking, what is remembered, how a talk ends."""

import io

import pytest

from mlx_distill.backends.protocol import Sampling
from mlx_distill.data.sequences import generation_prompt
from mlx_distill.embedded.tokenizer import build_tokenizer
from mlx_distill.errors import DataError
from mlx_distill.terminal.chat import Talk, Thinking, _talk
from mlx_distill.view import Screen, View

TEXTS = {
    "<think>\na1\n</think>\n\n7": ("<think>\na1\n</think>", "\n\n7"),
    "a1</think>7": ("", "a1</think>7"),
    "7<think>": ("<think>", "7"),
    "1 < 2 <b> </b>": ("", "1 < 2 <b> </b>"),
    "<think>a<think>b</think>c</think>": ("<think>a<think>b</think>", "c</think>"),
    "<think>never closed </thin": ("<think>never closed </thin", ""),
}


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("text", TEXTS)
def test_thinking_is_told_from_answer_wherever_pieces_end(text, size):
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    told = list(Thinking(begun=False).of(iter(pieces)))
    assert "".join(piece for piece, _ in told) == text
    for part, expected in zip((True, False), TEXTS[text], strict=True):
        assert "".join(piece for piece, thinks in told if thinks is part) == expected


def test_a_prompt_that_opens_the_thinking_needs_no_tag():
    told = list(Thinking(begun=True).of(iter(["so ", "</thi", "nk>7"])))
    assert told == [("so ", True), ("</think>", True), ("7", False)]


class Recited:
    """A model that says given texts, one after the other, and keeps what it was asked."""

    def __init__(self, tokenizer, *texts: str):
        self.said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.asked: list[list[int]] = []

    def stream(self, prompt, sampling):
        self.asked.append(list(prompt))
        yield from self.said[len(self.asked) - 1]


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def talk_of(tokenizer, *texts: str) -> Talk:
    stops = frozenset(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"])
    return Talk(Recited(tokenizer, *texts), tokenizer, Sampling(99, stop_ids=stops))


def test_an_answer_is_remembered_without_its_thinking(tokenizer):
    talk = talk_of(tokenizer, "<think>\na1\n</think>\n\n7<|im_end|>", "8")
    said = "".join(piece for piece, _ in talk.ask("a"))
    assert said == "<think>\na1\n</think>\n\n7" and talk.finished
    assert talk.turns == [("user", "a"), ("assistant", "7")]
    list(talk.ask("b"))
    turns = (("user", "a"), ("assistant", "7"), ("user", "b"))
    assert talk.model.asked[1] == generation_prompt(turns, tokenizer).tokens
    assert not talk.finished


def typed(*lines):
    """What a person types, an exception for a key that raises it; then Ctrl-D."""
    left = iter([*lines, EOFError()])

    def read() -> str:
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_a_talk_goes_on_until_the_input_ends(tokenizer):
    out = io.StringIO()
    view = View(Screen(file=out, width=80))
    talk = talk_of(tokenizer, "7<|im_end|>", "8<|im_end|>", "9")
    _talk(talk, view, typed("a", "", "/new", "b", "c"))
    assert out.getvalue().split("\n")[:3:2] == ["7", "8"]
    assert talk.model.asked[1] == generation_prompt((("user", "b"),), tokenizer).tokens
    assert len(talk.turns) == 4 and "unfinished: stopped at --max-new-tokens" in out.getvalue()


def test_ctrl_c_ends_an_answer_and_then_the_talk(tokenizer):
    out = io.StringIO()
    talk = talk_of(tokenizer, "7", "8<|im_end|>")
    plain = talk.model.stream

    def stopped(prompt, sampling):
        yield from plain(prompt, sampling)
        if len(talk.model.asked) == 1:
            raise KeyboardInterrupt

    talk.model.stream = stopped
    _talk(talk, View(Screen(file=out, width=80)), typed("a", "b", KeyboardInterrupt(), "c"))
    assert "(stopped)" in out.getvalue() and len(talk.model.asked) == 2
    assert talk.turns == [("user", "b"), ("assistant", "8")]


def test_what_cannot_be_asked_costs_itself_alone(tokenizer, monkeypatch):
    out = io.StringIO()
    talk = talk_of(tokenizer, "8<|im_end|>")
    ask = talk.ask

    def refusing(text: str):
        if text == "a":
            raise DataError("this cannot be asked: a")
        return ask(text)

    monkeypatch.setattr(talk, "ask", refusing)
    _talk(talk, View(Screen(file=out, width=80)), typed("a", "b"))
    assert out.getvalue().startswith("error: this cannot be asked: a\n8\n")


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_model_answers_one_prompt(tiny_recipe, command_line, backend):
    model = tiny_recipe.parent / "teacher"
    words = ("--prompt", "2 + 2?", "--max-new-tokens", "4", "--backend", backend)
    result = command_line("chat", model, *words)
    assert result.code == 0, result.err
    assert "(4 tokens, " in result.out and "unfinished: stopped at --max-new-tokens" in result.out
