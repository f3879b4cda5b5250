"""Tool calls and tools, as OpenAI writes them, from whatever a row holds.

In: values, or JSON text of values. Out: lists of calls; tools as JSON text. What is not understood
is skipped with its row, or counted by its name.
"""

import json
from collections import Counter
from typing import Any

from mlx_distill.data.content import as_text, count_unused, has_content
from mlx_distill.data.examples import Skip
from mlx_distill.errors import DataError
from mlx_distill.readers import parse_json

CALL_KEYS = ("id", "type", "index", "function", "name", "arguments", "parameters")


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
        named: dict[str, Any] = {
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
