"""How a chat template wants to be asked.

In: a fast tokenizer and its template. Out: a `Rendering`, found by trying: which switches turn
thinking on, and calls' arguments as objects or as text. Thinking is switched on; a template that
ends each prompt in `</think>` whatever it is told is refused.
"""

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_distill.data.examples import Skip
from mlx_distill.errors import DataError, ModelError
from mlx_distill.files import all_lines
from mlx_distill.readers import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTINEL = "mlxdistillsentinel"
SWITCHES = (("enable_thinking",), ("enable_thinking", "thinking"))


class Rendering(NamedTuple):
    """How a template wants to be asked: which switches turn thinking on, and calls' arguments as
    objects or as text.
    """

    switches: tuple[str, ...]
    arguments: str  # "object" or "text"

    def text(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        template: str,
        messages: list[dict[str, Any]],
        tools: list | None,
    ) -> str:
        switched: dict[str, Any] = dict.fromkeys(self.switches, True)
        if tools:
            switched["tools"] = tools
        try:
            return tokenizer.apply_chat_template(
                [self._called(message) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **switched,
            )
        except Skip:
            raise
        except Exception as error:  # jinja2's own kinds, and what a template raises about roles
            raise Skip(f"the chat template refuses it ({all_lines(error, 120)})") from None

    def _called(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its calls' arguments in the template's form."""
        if "tool_calls" not in message:
            return message
        as_asked = _as_object if self.arguments == "object" else _as_json
        calls = []
        for call in message["tool_calls"]:
            function = call["function"]
            asked = {"arguments": as_asked(function["arguments"])}
            calls.append(call | {"function": function | asked})
        return message | {"tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, "arguments")
        except DataError:
            raise Skip("a tool call whose arguments are not JSON") from None
    return arguments


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@lru_cache(maxsize=64)
def rendering_of(tokenizer: "PreTrainedTokenizerFast", template: str) -> Rendering:
    """What a template wants, tried out; raises `ModelError` where nothing that is tried switches
    thinking on.
    """
    question = [{"role": "user", "content": SENTINEL}]
    for switches in SWITCHES:
        rendering = Rendering(switches, "object")
        try:
            text = rendering.text(tokenizer, template, question, None)
        except Skip:  # each row will be told why
            break
        if not closes_thinking(text):
            break
    else:
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path}: its chat template ends each prompt in </think>, "
            f"so no reasoning can follow; {_advice(template)}"
        )
    return (
        rendering
        if _calls_come_out(tokenizer, template, rendering)
        else rendering._replace(arguments="text")
    )


def _calls_come_out(
    tokenizer: "PreTrainedTokenizerFast", template: str, rendering: Rendering
) -> bool:
    """Whether arguments as an object are written as JSON, or at all; where text does no better,
    too.
    """
    found = []
    for form in ("object", "text"):
        try:
            text = rendering._replace(arguments=form).text(tokenizer, template, _calling(), None)
        except Skip:
            text = ""
        found.append(f'"{SENTINEL}key": "{SENTINEL}value"' in re.sub(r'":\s*"', '": "', text))
    return found[0] or not found[1]


def _calling() -> list[dict[str, Any]]:
    arguments = {f"{SENTINEL}key": f"{SENTINEL}value"}
    call = {
        "id": "sentinel0",
        "type": "function",
        "function": {"name": f"{SENTINEL}name", "arguments": arguments},
    }
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "x", "name": f"{SENTINEL}name", "tool_call_id": "sentinel0"},
    ]


def closes_thinking(text: str) -> bool:
    """Whether thinking is over where this prompt ends."""
    return text.rstrip().endswith("</think>")


def _advice(template: str) -> str:
    from jinja2 import Environment, TemplateError, meta

    try:
        names = meta.find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        )
    except TemplateError:
        names = set()
    named = sorted(name for name in names if re.search("think|reason", name))
    if named:
        return (
            f"it switches on {' or '.join(named)}: let its default in chat_template.jinja turn "
            "thinking on"
        )
    return "it has no switch: use the chat_template.jinja of the reasoning model of its family"
