"""The messages of a row → `Turn`s with the same names for the same things, whoever wrote the row.

In: a list of messages in the layouts of OpenAI, ShareGPT, Anthropic and their kin. Out: `Turn`s.
Decided here: which roles, keys and kinds of content are understood (`ROLES`, `KEYS`, `TEXT_PARTS`,
…); all else that has content is counted by its name.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.data.examples import Skip, Turn, Turns
from mlx_distill.data.reasoning import split_reasoning
from mlx_distill.errors import DataError
from mlx_distill.readers import parse_json

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool", "tool_response": "tool",
    "tool_result": "tool", "function_response": "tool",
}  # fmt: skip
CALL_ROLES = (
    "function_call",
    "tool_call",
    "tool_calls",
)  # an assistant's turn whose content is the call
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
NOT_LEARNED_KEYS = (
    "weight",
    "train",
    "training",
    "trainable",
    "loss",
)  # 0 or false: a turn that is not to be learned
KEYS = frozenset({
    *REASONING_KEYS, *NOT_LEARNED_KEYS, "tool_calls", "function_call", "tool_call_id", "name", "refusal", "tools",
    "channel",
})  # fmt: skip
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments", "parameters")
MEDIA_KEYS = ("audio", "image", "images", "video", "videos", "file", "files")
CHANNELS = ("analysis", "commentary", "final")
SWITCHES = {
    "0": 0,
    "1": 1,
    "false": False,
    "true": True,
}  # as text, in tables and from careless writers
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
EARLIER_REASONING = "reasoning of earlier turns"


@dataclass
class Message:
    """One message as it was read. `not_learned` says why its answer is not to be learned, "" where
    it may be.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    keys: dict[str, Any] = field(
        default_factory=dict
    )  # for the template: a result's name and the id of its call
    tools: Any = None  # what it says can be called
    channel: str = ""  # harmony's (gpt-oss), where each message has one
    not_learned: str = ""

    def turn(self, keeps_reasoning: bool = False) -> Turn:
        """(role, content), and a third place with the other keys of the message as JSON where it
        has any.
        """
        more = dict(self.keys)
        if self.calls:
            more["tool_calls"] = self.calls
        if keeps_reasoning and self.reasoning.strip():
            more["reasoning_content"] = self.reasoning.strip()
        plain = (self.role, self.content)
        return (*plain, json.dumps(more, ensure_ascii=False)) if more else plain


def has_content(value: Any) -> bool:
    """Whether a value says anything: null, empty text, NaN, and lists and objects of nothing else
    do not.
    """
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, dict):
        return any(map(has_content, value.values()))
    if isinstance(value, list | tuple):
        return any(map(has_content, value))
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def as_text(value: Any) -> str:
    """A scalar as text: numbers are written out, null and what is no number are empty."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if has_content(value) or isinstance(value, str) else ""


def count_unused(found: dict[str, Any], known: Any, kind: str, unused: Counter[str]) -> None:
    """Count by name what has content and is not known."""
    for name, value in found.items():
        if name not in known and has_content(value):
            unused[f"{kind} {printable(name)}"] += 1


def printable(name: Any) -> str:
    """A name that data gave, fit for a terminal."""
    text = str(name)
    text = text if len(text) <= 60 else f"{text[:59]}…"
    if not text.strip():
        return repr(text)
    return (
        text
        if text.isprintable()
        else repr(text)[1:-1].encode("ascii", "backslashreplace").decode()
    )


# one message


def read_message(found: dict[str, Any], who: str, what: str, unused: Counter[str]) -> Message:
    """One message; raises `Skip` for content that is not text and calls that cannot be read."""
    count_unused(found, {who, what, *KEYS}, "key", unused)
    written = found[who] if isinstance(found[who], str) else ""
    if not written.strip():
        raise Skip("a turn without a role")
    normal = written.strip().lower().replace("-", "_")
    if normal in CALL_ROLES:
        message = Message("assistant", "", calls=read_calls(found.get(what), unused))
    else:
        message = Message(ROLES.get(normal, written), "")
        _read_content(message, found.get(what), unused)
    message.calls += read_calls(found.get("tool_calls"), unused) + read_calls(
        found.get("function_call"), unused
    )
    _read_reasoning(message, found, unused)
    _read_refusal(message, found)
    _read_learned(message, found, unused)
    message.tools = found.get("tools")
    _read_channel(message, found.get("channel"), unused)
    if not (message.content or message.calls or message.reasoning) and any(
        has_content(found.get(key)) for key in MEDIA_KEYS
    ):
        raise Skip("content that is not text")
    for key in ("name", "tool_call_id"):
        if has_content(found.get(key)):
            if message.role == "tool":
                message.keys[key] = as_text(found[key])
            else:
                unused[f"key {key}"] += 1
    return message


def _read_content(message: Message, value: Any, unused: Counter[str]) -> None:
    parts = [value] if isinstance(value, dict) and "type" in value else value
    if isinstance(parts, list) and all(isinstance(part, str) or _is_part(part) for part in parts):
        if len(parts) > 1 and any(
            _is_part(part) and part.get("type") == "tool_result" for part in parts
        ):
            raise Skip("several results or texts in one turn")
        for part in parts:
            _read_part(
                message, {"type": "text", "text": part} if isinstance(part, str) else part, unused
            )
    elif isinstance(value, list | dict):
        if message.role != "tool":
            raise Skip("content that is not text")
        message.content = json.dumps(value, ensure_ascii=False)  # a result may be any JSON
    elif isinstance(value, bytes):  # of a Parquet file
        raise Skip("content that is not text")
    else:
        message.content = as_text(value)


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and ("type" in part or "text" in part)


def _read_part(message: Message, part: dict[str, Any], unused: Counter[str]) -> None:
    kind = as_text(part.get("type", "text"))
    if kind in TEXT_PARTS:
        message.content += as_text(part.get("text"))
        known = {"type", "text"}
    elif kind in REASONING_PARTS:
        places = (kind, "text", "thinking", "reasoning", "content", "summary")
        key = next((key for key in places if has_content(part.get(key))), kind)
        message.reasoning += _inner_text(part.get(key))
        known = {"type", key, "signature", "closed"}  # a signature is the service's own
    elif kind == "refusal":
        message.content += as_text(part.get("refusal"))
        message.not_learned = "its answer is a refusal"
        known = {"type", "refusal"}
    elif kind == "tool_use":
        message.calls += read_calls(
            {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}, unused
        )
        known = {"type", "id", "name", "input"}
    elif kind == "tool_result" and not message.content:
        message.role, message.content = "tool", _inner_text(part.get("content"))
        if has_content(part.get("tool_use_id")):
            message.keys["tool_call_id"] = as_text(part["tool_use_id"])
        known = {"type", "tool_use_id", "content"}
    else:
        unused[f"part {printable(kind)}"] += 1
        raise Skip("content that is not text")
    count_unused(part, known, "key", unused)


def _inner_text(value: Any) -> str:
    """Reasoning is text, or (Mistral's) a list of text parts."""
    if isinstance(value, list):
        return "".join(
            as_text(part.get("text")) if isinstance(part, dict) else as_text(part) for part in value
        )
    return as_text(value)


def _read_reasoning(message: Message, found: dict[str, Any], unused: Counter[str]) -> None:
    for key in REASONING_KEYS:
        value = found.get(key)
        if not has_content(value):
            continue
        if isinstance(value, str) and not message.reasoning.strip():
            message.reasoning = value
        elif value != message.reasoning:
            unused[f"key {key}"] += 1
    if message.reasoning.strip() and message.role == "assistant":
        try:
            cot, answer = split_reasoning(message.content)
        except Skip:
            return
        if cot.strip() == message.reasoning.strip():  # it stands there twice
            message.content = answer


def _read_refusal(message: Message, found: dict[str, Any]) -> None:
    if has_content(found.get("refusal")):
        message.content = message.content or as_text(found["refusal"])
        message.not_learned = "its answer is a refusal"


def _read_channel(message: Message, channel: Any, unused: Counter[str]) -> None:
    if message.role == "assistant" and channel in CHANNELS:
        message.channel = channel
    elif has_content(channel):
        unused["key channel"] += 1


def join_channels(messages: list[Message]) -> list[Message]:
    """Harmony's messages of one turn as one message: `analysis` is the reasoning of what the
    assistant says next.
    """
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if (
            before
            and before.channel == "analysis"
            and message.role == "assistant"
            and not before.calls
        ):
            joined.pop()
            message.reasoning = "\n\n".join(
                text for text in (before.content, message.reasoning) if text.strip()
            )
            if message.channel == "analysis":
                message.content = "\n\n".join(
                    text for text in (message.reasoning, message.content) if text.strip()
                )
                message.reasoning = ""
        joined.append(message)
    return joined


def _read_learned(message: Message, found: dict[str, Any], unused: Counter[str]) -> None:
    for key in NOT_LEARNED_KEYS:
        value = found.get(key)
        if not has_content(value):
            continue
        value = SWITCHES.get(value.strip().lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            unused[f"key {key}"] += 1
        elif not value:
            message.not_learned = (
                f"its answer is not to be learned ({key} = {'false' if value is False else 0})"
            )


# calls and tools


def read_calls(value: Any, unused: Counter[str]) -> list[dict[str, Any]]:
    """Tool calls as OpenAI writes them, from a list or one of them, as values or as JSON text."""
    value = _from_json(value)
    if not has_content(value):
        return []
    calls = []
    for call in map(_from_json, value if isinstance(value, list) else [value]):
        function = _from_json(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not has_content(function.get("name")):
            raise Skip("a tool call that cannot be read")
        for part in (call, function):
            count_unused(part, CALL_KEYS, "key", unused)
        arguments = function.get("arguments", function.get("parameters"))
        named = {
            "name": as_text(function["name"]),
            "arguments": arguments if has_content(arguments) else {},
        }
        identity = {"id": as_text(call["id"])} if has_content(call.get("id")) else {}
        calls.append({**identity, "type": "function", "function": named})
    return calls


def read_tools(value: Any) -> str:
    """The tools that a model may call, as JSON text of a list in OpenAI's layout; "" where there
    are none.
    """
    value = _from_json(value)
    if not has_content(value):
        return ""
    tools = []
    for tool in map(_from_json, value if isinstance(value, list) else [value]):
        if not isinstance(tool, dict):
            raise Skip("tools that cannot be read")
        if "function" not in tool and "name" in tool:
            tool = {
                "type": "function",
                "function": {key: part for key, part in tool.items() if key != "type"},
            }
        tools.append(tool)
    return json.dumps(tools, ensure_ascii=False)


def _from_json(value: Any) -> Any:
    """The value of JSON text; other text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, "")
    except DataError:
        return value


# turns before an answer


def before_answer(messages: list[Message], unused: Counter[str]) -> tuple[Turns, str, Turns]:
    """(turns before what the user says last, that text, turns after it) of the messages before an
    answer.

    Reasoning of earlier assistant turns is left out and counted; where the assistant works with
    tools between the user's last words and the answer, its reasoning is still part of the same
    answer and goes to the template.
    """
    asked = max(
        (index for index, message in enumerate(messages) if message.role == "user"), default=-1
    )
    if asked < 0:
        raise Skip("no user turn before the last assistant turn")
    if messages[-1].role == "assistant":
        called = messages[-1].calls
        raise Skip(
            "a tool call without its result"
            if called
            else "another assistant turn right before its answer"
        )
    for message in messages:
        if message.role == "assistant":
            _take_reasoning(message)
    if left_out := sum(bool(message.reasoning.strip()) for message in messages[:asked]):
        unused[EARLIER_REASONING] += left_out
    history = tuple(message.turn() for message in messages[:asked])
    return (
        history,
        messages[asked].content,
        tuple(message.turn(True) for message in messages[asked + 1 :]),
    )


def _take_reasoning(message: Message) -> None:
    try:
        cot, answer = split_reasoning(message.content)
    except Skip:
        return
    message.reasoning, message.content = message.reasoning or cot, answer.strip()
