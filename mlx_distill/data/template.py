"""A tokenizer's chat template: the text that it makes of turns, up to where an answer begins.

In: turns, tools, a day and a fast tokenizer. Out: text, or `Skip` with the reason why there is
none. Decided here:

- What a template drops is known before a row is rendered: a conversation of the same shape (roles,
  calls, tools), with a sentinel in each place, goes through the template once, and what does not
  come out again was dropped. A row is never rendered without one of its turns, calls or tools.
- Thinking is switched on. A prompt in which it is closed again is refused: what follows would not
  be learned there.
- A template that reads the clock reads the day that it is given, so that a run which is continued
  tomorrow renders the prompts of today.
"""

import datetime
import json
import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_distill.data.examples import Skip, Turn, Turns
from mlx_distill.data.turns import printable
from mlx_distill.errors import DataError, ModelError
from mlx_distill.files import all_lines
from mlx_distill.readers import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTINEL = "mlxdistillsentinel"
CLOCK = "strftime_now"
DIRECTIVES = (
    "%-d",
    "%-m",
    "%-H",
    "%-I",
    "%-M",
    "%-S",
    "%-j",
    "%-y",
    *(f"%{letter}" for letter in "aAbBdeDFmyYjHIMSpTRUWuwxXcGVgCh"),
)
SWITCHES = ({"enable_thinking": True}, {"enable_thinking": True, "thinking": True})


def chat_template(tokenizer: "PreTrainedTokenizerFast", tools: bool = False) -> str:
    """The tokenizer's default chat template, or the one that it has for tools.

    Raises `ModelError` where there is none, since a made-up layout would train (and later prompt)
    something that the model's users cannot know.
    """
    name = tokenizer.name_or_path
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {name}: it is a slow one ({type(tokenizer).__name__}) that "
            "gives no character offsets, needed to find segments; use a folder with a "
            "tokenizer.json"
        )
    found = tokenizer.chat_template
    if not found:
        raise ModelError(
            f"tokenizer {name}: no chat template; put the chat_template.jinja of the "
            "instruction-tuned model of its family into the folder"
        )
    if isinstance(found, dict):
        if "default" not in found:
            raise ModelError(
                f"tokenizer {name}: its chat templates are called "
                f"{', '.join(map(printable, found))} and none is the "
                "default; keep the one to train with as chat_template.jinja in the folder"
            )
        return found["tool_use"] if tools and "tool_use" in found else found["default"]
    return tokenizer.get_chat_template()


def refuse_unusable(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise `ModelError` at once where no prompt could be rendered for reasoning to follow."""
    _rendering(tokenizer, chat_template(tokenizer))


def reads_clock(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether prompts say on which day they were rendered."""
    return CLOCK in chat_template(tokenizer) or CLOCK in chat_template(tokenizer, tools=True)


def prompt_text(
    turns: Turns,
    tokenizer: "PreTrainedTokenizerFast",
    tools: str = "",
    day: str = "",
    unused: Counter[str] | None = None,
) -> str:
    """The text before an answer, generation prompt included.

    `day` ("2026-11-26") is what a template with a clock says, "" the machine's own. Keys of
    messages that the template has no use for are counted in `unused`. Raises `Skip` where the
    template refuses or drops a turn, `ModelError` where it switches thinking off in every prompt.
    """
    template = _dated(chat_template(tokenizer, bool(tools)), day)
    rendering = _rendering(tokenizer, template)
    messages = [_message(turn) for turn in turns]
    lost = _lost(tokenizer, template, rendering, tuple(map(_shape, messages)), bool(tools))
    if lost.dropped:
        raise Skip(f"the chat template drops its {lost.dropped}")
    if unused is not None:
        unused.update(lost.unread)
    text = rendering.text(tokenizer, template, messages, json.loads(tools) if tools else None)
    for message in messages:
        if (
            "tool_calls" not in message
            and message["role"] != "tool"
            and not _stands_in(message["content"], text)
        ):
            raise Skip(f"the chat template alters its {printable(message['role'])} turn")
    if _closes_thinking(text):
        raise Skip("its prompt closes thinking before the reasoning")
    return text


# ------------------------------------------------------------------------------------------------------------ rendering


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
        given = {"tools": tools} if tools else {}
        try:
            return tokenizer.apply_chat_template(
                [self._called(message) for message in messages], chat_template=template, tokenize=False,
                add_generation_prompt=True, **dict.fromkeys(self.switches, True), **given,
            )  # fmt: skip
        except Skip:
            raise
        except Exception as error:  # jinja2's own kinds, and what a template raises about roles
            raise Skip(f"the chat template refuses it ({all_lines(error, 120)})") from None

    def _called(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its calls' arguments in the template's form."""
        if "tool_calls" not in message:
            return message
        as_asked = _as_object if self.arguments == "object" else _as_json
        calls = [
            call
            | {
                "function": call["function"]
                | {"arguments": as_asked(call["function"]["arguments"])}
            }
            for call in message["tool_calls"]
        ]
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


def _message(turn: Turn) -> dict[str, Any]:
    role, content, *more = turn
    return {"role": role, "content": content, **(json.loads(more[0]) if more else {})}


@lru_cache(maxsize=64)
def _rendering(tokenizer: "PreTrainedTokenizerFast", template: str) -> Rendering:
    """What a template wants, tried out; raises `ModelError` where nothing that is tried switches
    thinking on.
    """
    question = [{"role": "user", "content": SENTINEL}]
    for switches in SWITCHES:
        rendering = Rendering(tuple(switches), "object")
        try:
            text = rendering.text(tokenizer, template, question, None)
        except Skip:  # each row will be told why
            break
        if not _closes_thinking(text):
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


def _closes_thinking(text: str) -> bool:
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


@lru_cache(maxsize=16)
def _dated(template: str, day: str) -> str:
    """The template with its clock stopped at a day: a macro of the clock's name, which stands
    before the clock.
    """
    if not day or CLOCK not in template:
        return template
    then = datetime.datetime.fromisoformat(day)
    written = 'format | replace("%%", "\\0")'
    for directive in DIRECTIVES:
        written += f" | replace({json.dumps(directive)}, {json.dumps(then.strftime(directive))})"
    return (
        f'{{%- macro {CLOCK}(format) -%}}{{{{ {written} | replace("\\0", "%") }}}}{{%- '
        f"endmacro +%}}{template}"
    )


# --------------------------------------------------------------------------------------------------- what is dropped


class Lost(NamedTuple):
    """Of a conversation's shape: the first thing that the template drops, "" where it drops none,
    and unread keys.
    """

    dropped: str
    unread: dict[str, int]


Shape = tuple[
    str, bool, int, tuple[str, ...]
]  # of a message: role, whether it has text, its calls, its other keys


def _shape(message: dict[str, Any]) -> Shape:
    others = tuple(sorted(message.keys() - {"role", "content", "tool_calls"}))
    return (
        message["role"],
        bool(message["content"].strip()),
        len(message.get("tool_calls", ())),
        others,
    )


@lru_cache(maxsize=4096)
def _lost(
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


def _stands_in(content: str, text: str) -> bool:
    """Whether a turn's text is in the prompt, whatever was done to its white space."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())
