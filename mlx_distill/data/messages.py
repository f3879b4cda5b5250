"""The messages of a row: the same names for the same things, whoever wrote the row.

In: messages in the layouts of OpenAI, ShareGPT, Anthropic and their kin. Out: `Message`s. Decided
here: which roles, keys and kinds of content are understood (`ROLES`, `KEYS`, `TEXT_PARTS`, …); all
else that has content is counted by its name.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mlx_distill.data.calls import read_calls
from mlx_distill.data.content import as_text, count_unused, has_content, printable
from mlx_distill.data.examples import Skip, Turn
from mlx_distill.data.reasoning import split_reasoning

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "observation": "tool", "function": "tool", "ipython": "tool",
    "tool_response": "tool", "tool_result": "tool", "function_response": "tool",
}  # fmt: skip
# an assistant's turn whose content is the call
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# 0 or false: a turn that is not to be learned
NOT_LEARNED_KEYS = ("weight", "train", "training", "trainable", "loss")
KEYS = frozenset({
    *REASONING_KEYS, *NOT_LEARNED_KEYS, "tool_calls", "function_call", "tool_call_id", "name",
    "refusal", "tools", "channel",
})  # fmt: skip
MEDIA_KEYS = ("audio", "image", "images", "video", "videos", "file", "files")
CHANNELS = ("analysis", "commentary", "final")
# as text, in tables and from careless writers
SWITCHES = {"0": 0, "1": 1, "false": False, "true": True}
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")


@dataclass
class Message:
    """One message as it was read. `not_learned` says why its answer is not to be learned, "" where
    it may be.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    # for the template: a result's name and the id of its call
    keys: dict[str, Any] = field(default_factory=dict)
    # what it says can be called
    tools: Any = None
    # harmony's (gpt-oss), where each message has one
    channel: str = ""
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
