"""Rows of a dataset → `Example`s.

In: a row. Out: plain text split into prompt, reasoning and answer. Decided here: how a row is read
(`FORMATS`, one function each). `data/reading.py` walks over the rows.

A row that cannot be *understood* (bad JSON, no such column) stops the run with its file, line and
remedy. A row that has nothing to *learn from* (no reasoning, no answer) raises `Skip`; whoever
walks the rows counts its reason. What a row carries besides (a column, a key of a message) is
counted by its name in `unused`: nothing is lost in silence.

Column settings left empty take the format's usual names (`COLUMNS`). Public datasets have names of
their own, which `data/named.py` reads as settings of this table.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlx_distill.data.calls import read_tools
from mlx_distill.data.columns import Place
from mlx_distill.data.content import as_text, has_content, printable
from mlx_distill.data.examples import Example, Skip, make_example
from mlx_distill.data.messages import Message, read_message
from mlx_distill.data.reasoning import BEGIN_OF_THOUGHT, calls_a_tool, split_reasoning
from mlx_distill.data.sources import Row
from mlx_distill.data.turns import before_answer
from mlx_distill.errors import DataError
from mlx_distill.readers import parse_json

# what the Stratos family tells a model about its own marks, which are gone when it is learned
MARKER_INSTRUCTION = re.compile(
    r"Your role as an assistant involves thoroughly exploring questions through a systematic "
    r"(?:long )?thinking process"
    r"[^|]*<\|begin_of_thought\|>[^|]*<\|end_of_thought\|>"
    r"[^|]*<\|begin_of_solution\|>[^|]*<\|end_of_solution\|>"
    r"(?:\s*Now, try to solve the following question through the above guidelines:?)?"
)
MARKER_NAME = f"system text that asks for {BEGIN_OF_THOUGHT}"


def _columns(row: Row, place: Place) -> Example:
    """Three columns of text: prompt, cot, answer."""
    return _worked(
        _prompt(row, place), place.text(row, "cot"), place.text(row, "answer"), row, place
    )


def _response(row: Row, place: Place) -> Example:
    """A prompt and one text that holds reasoning and answer; either may be a list of messages
    (TRL).
    """
    messages = _prompt(row, place)
    if isinstance(place.value(row, "response"), list):
        return _last_turn([*messages, *place.messages(row, "response")], row, place)
    said = place.text(row, "response")
    return _worked(messages, *split_reasoning(said), row, place, said=said)


def _alpaca(row: Row, place: Place) -> Example:
    """Alpaca: instruction and, where there is one, its input are the prompt; the output holds
    reasoning and answer.
    """
    asked = [place.text(row, "prompt"), as_text(row.get("input"))]
    messages = _pairs(row.get("history"), place)
    messages.append(Message("user", "\n".join(text for text in asked if text.strip())))
    return _worked(messages, *split_reasoning(place.text(row, "response")), row, place)


def _messages(row: Row, place: Place) -> Example:
    """A list of role/content messages whose last assistant turn is learned."""
    return _last_turn(place.messages(row, "messages"), row, place)


def _conversations(row: Row, place: Place) -> Example:
    """The same in ShareGPT's words: from/value."""
    return _last_turn(place.messages(row, "messages", "from", "value"), row, place)


def _gsm8k(row: Row, place: Place) -> Example:
    """GSM8K: worked steps with `<<48/2=24>>` annotations (removed), then `#### N`."""
    steps, mark, answer = place.text(row, "answer").rpartition("####")
    if not mark:
        raise Skip("no #### before the answer")
    if not steps.strip():
        raise Skip("no steps before the ####")
    return make_example(place.text(row, "prompt"), re.sub(r"<<[^<>]*>>", "", steps), answer)


def _prompts(row: Row, place: Place) -> Example:
    """A prompt to be answered and, where it is known, the answer that a text is to state."""
    answer = place.text(row, "answer") if place.column("answer") in row else ""
    return _worked(_prompt(row, place), "", answer, row, place, solved=False)


FORMATS: dict[str, Callable[[Row, Place], Example]] = {
    "columns": _columns,
    "response": _response,
    "alpaca": _alpaca,
    "messages": _messages,
    "conversations": _conversations,
    "gsm8k": _gsm8k,
    "prompts": _prompts,
}


def _last_turn(messages: list[Message], row: Row, place: Place) -> Example:
    last = max(
        (index for index, message in enumerate(messages) if message.role == "assistant"), default=-1
    )
    if last < 0:
        raise Skip("no assistant turn")
    for message in messages[last + 1 :]:
        place.unused[f"{printable(message.role)} turn after the last answer"] += 1
    answered = messages[last]
    if answered.calls:
        raise Skip("its answer is a tool call")
    if answered.not_learned:
        raise Skip(answered.not_learned)
    cot, answer, said = answered.reasoning, answered.content, ""
    if not cot.strip():
        said = answer
        cot, answer = split_reasoning(said)
    return _worked(messages[:last], cot, answer, row, place, said=said)


def _worked(
    messages: list[Message],
    cot: str,
    answer: str,
    row: Row,
    place: Place,
    solved: bool = True,
    said: str = "",
) -> Example:
    """The example of the messages before an answer, the row's system text and tools among them.
    `said` is the answer with its reasoning, as the row has it in one text.
    """
    if calls_a_tool(answer):
        raise Skip("its answer is a tool call")
    messages = _with_system(messages, row.get("system"), place)
    history, prompt, after = before_answer(messages, place.unused)
    tools = _tools(messages, row, place)
    kept = said if place.data.compat == "paper" else ""
    return make_example(prompt, cot, answer, history, after, tools, solved, kept)


def _with_system(messages: list[Message], column: Any, place: Place) -> list[Message]:
    """A row's system text first, once; without the instruction to write marks that are gone from
    what is learned.
    """
    if has_content(column):
        first = read_message({"role": "system", "content": column}, "role", "content", place.unused)
        same = (
            messages
            and messages[0].role == "system"
            and messages[0].content.strip() == first.content.strip()
        )
        messages = [first, *messages[1 if same else 0 :]]
    kept = [message for message in messages if not _is_marker_instruction(message)]
    if dropped := len(messages) - len(kept):
        place.unused[MARKER_NAME] += dropped
    return kept


def _is_marker_instruction(message: Message) -> bool:
    return message.role == "system" and bool(
        MARKER_INSTRUCTION.fullmatch(" ".join(message.content.split()))
    )


def _tools(messages: list[Message], row: Row, place: Place) -> str:
    """The tools of a row, from its column or from one of its messages; others than the first are
    counted.
    """
    named = [(f"column {name}", row.get(name)) for name in ("tools", "functions")]
    named += [("key tools", message.tools) for message in messages]
    chosen = ""
    for name, value in named:
        found = read_tools(value)
        if found and chosen and found != chosen:
            place.unused[name] += 1
        chosen = chosen or found
    return chosen


def _prompt(row: Row, place: Place) -> list[Message]:
    if not isinstance(place.value(row, "prompt"), list):
        return [Message("user", place.text(row, "prompt"))]
    messages = place.messages(row, "prompt")
    if not messages or messages[-1].role not in ("user", "tool"):
        raise Skip("no user turn at the end of the prompt")
    return messages


def _pairs(value: Any, place: Place) -> list[Message]:
    """Alpaca's history: a list of what was asked and answered before, in a table's cell as JSON."""
    if isinstance(value, str) and has_content(value):
        with suppress(DataError):  # told below
            value = parse_json(value, place.where)
    if not has_content(value):
        return []
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in value
    ):
        raise DataError(
            f"{place.where}: column 'history' is no list of [question, answer]; rename it, or "
            "correct it"
        )
    both = ("user", "assistant")
    return [
        Message(role, as_text(text))
        for pair in value
        for role, text in zip(both, pair, strict=True)
    ]
