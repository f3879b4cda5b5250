"""An Ollama `Modelfile` beside a `.gguf` file.

In: a tokenizer with its chat template, and the ids that end a text. Out: the file, and what could
not be said in it, as sentences. Decided here: Ollama's own language of templates is used where it
says the same. What a template puts around each turn is found in talks of marked turns; put together
from these pieces they must be the rendered talks again. A template that does more than put pieces
around turns is left to Ollama, which looks for one that it knows in the `.gguf` file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.data.examples import Skip
from mlx_distill.data.template import prompt_text
from mlx_distill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "Modelfile"
Talk = tuple[tuple[str, str], ...]
ASKED: Talk = (("user", "«u»"),)
TOLD: Talk = (("system", "«s»"), *ASKED)
AGAIN: Talk = (("assistant", "«a»"), ("user", "«v»"))


@dataclass(frozen=True)
class Pieces:
    """What a template writes: `first` before all turns, (before, after) around those of each role,
    `answer` where the answer begins, and the system message of a talk that has none.
    """

    first: str
    around: dict[str, tuple[str, str]]
    answer: str
    system: str = ""

    def text(self, talk: Talk) -> str:
        """A talk put together from the pieces."""
        if self.system and talk[0][0] != "system":
            talk = (("system", self.system), *talk)
        turns = (self.around[role][0] + content + self.around[role][1] for role, content in talk)
        return self.first + "".join(turns) + self.answer


def write_modelfile(
    folder: Path, file: str, tokenizer: "PreTrainedTokenizerFast", ends: Sequence[int]
) -> list[str]:
    """Write `folder/Modelfile` for the `.gguf` file of that name; notes on what it leaves open."""
    lines, notes = [f"FROM ./{file}"], []
    pieces = pieces_of(tokenizer)
    if pieces is None:
        notes.append(
            "the Modelfile has no TEMPLATE: this chat template does more than put text around "
            "turns, and Ollama takes one that it knows in its place, if there is one"
        )
    else:
        lines.append(f'TEMPLATE """{_in_go(pieces)}"""')
        if pieces.system:
            lines.append(f'SYSTEM """{pieces.system}"""')
    stops = [tokenizer.convert_ids_to_tokens(token) for token in ends]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def pieces_of(tokenizer: "PreTrainedTokenizerFast") -> Pieces | None:
    """The pieces of a chat template; None where it is none of this kind."""
    try:
        talks = {talk: _rendered(tokenizer, talk) for talk in (ASKED, TOLD, TOLD + AGAIN)}
        pieces = _found(talks)
        talks[ASKED + AGAIN] = _rendered(tokenizer, ASKED + AGAIN)
        same = all(pieces.text(talk) == text for talk, text in talks.items())
    except (Skip, ModelError, ValueError):
        return None
    return pieces if same else None


def _found(talks: dict[Talk, str]) -> Pieces:
    """Raises `ValueError` where a turn is not in its talk once."""
    before_alone, answer_after_user = _around(talks[ASKED], "«u»")
    before_system, between, _ = _around(talks[TOLD], "«s»", "«u»")
    *_, user_to_assistant, assistant_to_user, _ = _around(
        talks[TOLD + AGAIN], "«s»", "«u»", "«a»", "«v»"
    )
    before_user = _common_end(between, assistant_to_user, before_alone)
    after_system = between.removesuffix(before_user)
    alike = user_to_assistant.startswith(after_system) and answer_after_user.startswith(
        after_system
    )
    after_user = after_system if alike else ""
    begun = before_alone.removesuffix(before_user)
    first = begun if before_system.startswith(begun) else ""
    before_system = before_system.removeprefix(first)
    system = begun.removeprefix(first).removeprefix(before_system).removesuffix(after_system)
    return Pieces(
        first,
        {
            "system": (before_system, after_system),
            "user": (before_user, after_user),
            "assistant": (
                user_to_assistant.removeprefix(after_user),
                assistant_to_user.removesuffix(before_user),
            ),
        },
        answer_after_user.removeprefix(after_user),
        system,
    )


def _rendered(tokenizer: "PreTrainedTokenizerFast", talk: Talk) -> str:
    """Without the token that llama.cpp puts before every text by itself."""
    text = prompt_text(talk, tokenizer)
    first = tokenizer("a")["input_ids"][0]
    bos = tokenizer.bos_token if first == tokenizer.bos_token_id else None
    return text.removeprefix(bos) if isinstance(bos, str) else text


def _around(text: str, *marks: str) -> list[str]:
    """The text before, between and after the marks."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(mark)
        parts.append(before)
    return [*parts, text]


def _common_end(*texts: str) -> str:
    shortest = min(texts, key=len)
    for start in range(len(shortest) + 1):
        if all(text.endswith(shortest[start:]) for text in texts):
            return shortest[start:]
    return ""


def _in_go(pieces: Pieces) -> str:
    """The pieces in the language of Go's templates; as literals, whose white space nothing trims."""
    said = [_literal(pieces.first), "{{ range .Messages }}"]
    for place, (role, (before, after)) in enumerate(pieces.around.items()):
        branch = "if" if place == 0 else "else if"
        content = "{{ .Content }}"
        said.append(f'{{{{ {branch} eq .Role "{role}" }}}}')
        said.append(_literal(before) + content + _literal(after))
    return "".join([*said, "{{ end }}{{ end }}", _literal(pieces.answer)])


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
