"""What a chat template drops, known before a row is rendered.

A conversation of the same shape (roles, calls, tools), with a sentinel in each place, goes through
the template once, and what does not come out again was dropped.
"""

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_distill.data.content import printable
from mlx_distill.data.rendering import SENTINEL, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Lost(NamedTuple):
    """Of a conversation's shape: the first thing that the template drops, "" where it drops none,
    and unread keys.
    """

    dropped: str
    unread: dict[str, int]


# of a message: role, whether it has text, its calls, its other keys
Shape = tuple[str, bool, int, tuple[str, ...]]


def shape_of(message: dict[str, Any]) -> Shape:
    """What the template may treat one message by."""
    others = tuple(sorted(message.keys() - {"role", "content", "tool_calls"}))
    return (
        message["role"],
        bool(message["content"].strip()),
        len(message.get("tool_calls", ())),
        others,
    )


@lru_cache(maxsize=4096)
def lost_in(
    tokenizer: "PreTrainedTokenizerFast",
    template: str,
    rendering: Rendering,
    shapes: tuple[Shape, ...],
    tools: bool,
) -> Lost:
    """Render sentinels in a conversation of this shape, and see which of them come out."""
    messages = [_sentinels(place, shape) for place, shape in enumerate(shapes)]
    text = rendering.text(tokenizer, template, messages, _sentinel_tools() if tools else None)
    unread: Counter[str] = Counter()
    for place, (role, has_text, calls, others) in enumerate(shapes):
        name = printable(role)
        if has_text and _sentinel(place, "content") not in text:
            return Lost("text beside a tool call" if calls else f"{name} turn", {})
        for call in range(calls):
            if (
                _sentinel(place, f"call{call}") not in text
                or _sentinel(place, f"argument{call}") not in text
            ):
                return Lost("tool calls", {})
        for key in others:
            if _sentinel_key(place, key) not in text:
                unread[f"key {key}"] += 1
    if tools and not all(
        f"{SENTINEL}{part}" in text for part in ("tool", "description", "parameter")
    ):
        return Lost("tools", {})
    return Lost("", dict(unread))


def _sentinels(place: int, shape: Shape) -> dict[str, Any]:
    role, has_text, calls, others = shape
    message: dict[str, Any] = {
        "role": role,
        "content": _sentinel(place, "content") if has_text else "",
    }
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call{place:03d}{call:02d}"[:9],
                "type": "function",
                "function": {
                    "name": _sentinel(place, f"call{call}"),
                    "arguments": {"x": _sentinel(place, f"argument{call}")},
                },
            }
            for call in range(calls)
        ]
    return message | {key: _sentinel_key(place, key) for key in others}


def _sentinel(place: int, part: str) -> str:
    return f"{SENTINEL}{part}x{place}x"


def _sentinel_key(place: int, key: str) -> str:
    """Ids have nine letters and digits, which is what Mistral's templates insist on."""
    return f"id{place:07d}" if key == "tool_call_id" else _sentinel(place, key)


def _sentinel_tools() -> list[dict[str, Any]]:
    parameter = {"type": "string", "description": "x"}
    schema = {
        "type": "object",
        "properties": {f"{SENTINEL}parameter": parameter},
        "required": [f"{SENTINEL}parameter"],
    }
    function = {
        "name": f"{SENTINEL}tool",
        "description": f"{SENTINEL}description",
        "parameters": schema,
    }
    return [{"type": "function", "function": function}]
