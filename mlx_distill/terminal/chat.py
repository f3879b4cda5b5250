"""Talking to a model: `mlx-distill chat`.

In: the name of a run or a model, and what a person types, or one prompt. Out: what the model
writes, as it writes it; what it thinks is dimmed. Decided here: that an answer is remembered
without its thinking, as chat templates do, and that Ctrl-C ends an answer and not the talk.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from mlx_distill.backends import choose_backend
from mlx_distill.backends.protocol import Model, Sampling
from mlx_distill.data.examples import Skip
from mlx_distill.data.sequences import THINK_TAGS, generation_prompt
from mlx_distill.errors import DataError
from mlx_distill.runs.named import Named
from mlx_distill.view import View, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AGAIN = "/new"


@dataclass
class Talk:
    """A model, and what was said so far. day: what prompts say where their template reads it."""

    model: Model
    tokenizer: "PreTrainedTokenizerFast"
    sampling: Sampling
    day: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0  # all that were written
    finished: bool = False  # whether the last answer ended by itself

    def ask(self, text: str) -> Iterator[tuple[str, bool]]:
        """(a piece of the answer, whether it is thinking) as it is written; then both turns are
        remembered.

        Raises `DataError` for what the chat template refuses.
        """
        turns = (*self.turns, ("user", text))
        try:
            prompt = generation_prompt(turns, self.tokenizer, day=self.day).tokens
        except Skip as skip:
            raise DataError(f"this cannot be asked: {skip}") from None
        begun = self.tokenizer.decode(prompt).rstrip().endswith(THINK_TAGS[0])
        parts = Thinking(begun)
        answer = ""
        for piece, thinks in parts.of(self._text(prompt)):
            answer += "" if thinks else piece
            yield piece, thinks
        self.turns = [*turns, ("assistant", answer.strip())]

    def _text(self, prompt: list[int]) -> Iterator[str]:
        """The new text, without the token that ends it."""
        decoded = DecodeStream(skip_special_tokens=False)
        with closing(self.model.stream(prompt, self.sampling)) as tokens:  # type: ignore[type-var]
            for token in tokens:
                self.tokens += 1
                self.finished = token in self.sampling.stop_ids
                if not self.finished:
                    yield decoded.step(self.tokenizer.backend_tokenizer, token) or ""


class Thinking:
    """Tells thinking from answer in a text that comes in pieces; a tag may come in several."""

    def __init__(self, begun: bool):
        self.thinks, self._held = begun, ""

    def of(self, pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
        """(text, whether it is thinking); the tags belong to the thinking."""
        for piece in pieces:
            self._held += piece
            yield from self._known()
        if self._held:
            yield self._held, self.thinks

    def _known(self) -> Iterator[tuple[str, bool]]:
        tag = THINK_TAGS[self.thinks]
        while tag in self._held:
            before, _, self._held = self._held.partition(tag)
            if self.thinks:
                yield before + tag, True
            else:
                yield from filter(lambda part: part[0], [(before, False), (tag, True)])
            self.thinks = not self.thinks
            tag = THINK_TAGS[self.thinks]
        held = next(n for n in range(len(tag), -1, -1) if self._held.endswith(tag[:n]))
        ready, self._held = self._held[: len(self._held) - held], tag[:held]
        if ready:
            yield ready, self.thinks


def chat(
    name: str, sampling: Sampling, prompt: str, view: View, backend_name: str = "auto"
) -> None:
    """Answer `prompt`, or all that a person types until Ctrl-D where it is empty.

    `sampling` without stop ids; the model's are added. Raises `DistillError`.
    """
    asked = Named.of(name)
    model = choose_backend(backend_name).load_teacher(asked.folder, name)
    sampling = replace(sampling, stop_ids=asked.stop_ids)
    talk = Talk(model, asked.tokenizer, sampling, asked.day)
    if prompt:
        _answer(talk, prompt, view)
        return
    view.say(f"{name}: ask something; {AGAIN} forgets what was said, Ctrl-D ends")
    _talk(talk, view, lambda: view.console.input("> "))


def _talk(talk: Talk, view: View, read: Callable[[], str]) -> None:
    """Until the input ends; a prompt that cannot be asked costs itself alone."""
    while True:
        try:
            text = read().strip()
        except (EOFError, KeyboardInterrupt):
            view.say("")
            return
        if text == AGAIN:
            talk.turns = []
        elif text:
            try:
                _answer(talk, text, view)
            except KeyboardInterrupt:
                view.say("\n(stopped)")
            except DataError as error:
                view.say(f"error: {error}")


def _answer(talk: Talk, text: str, view: View) -> None:
    begun, before = time.perf_counter(), talk.tokens
    for piece, thinks in talk.ask(text):
        style = "dim" if thinks else ""
        view.console.print(plain(piece), end="", style=style, soft_wrap=True, markup=False)
    tokens, seconds = talk.tokens - before, time.perf_counter() - begun
    ended = "" if talk.finished else ", unfinished: stopped at --max-new-tokens"
    said = f"({tokens:,} tokens, {tokens / seconds:,.0f} a second{ended})"
    view.console.print(f"\n{said}", style="dim", soft_wrap=True)
