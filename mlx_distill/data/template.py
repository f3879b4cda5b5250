"""A tokenizer's chat template: the text that it makes of turns, up to where an answer begins.

In: turns, tools, a day and a fast tokenizer. Out: text, or `Skip` with the reason why there is
none. Decided here:

- A row is never rendered without one of its turns, calls or tools (`dropped.py` knows what a
  template drops).
- A prompt in which thinking is closed again is refused: what follows would not be learned there.
- A template that reads the clock reads the day that it is given, so that a run which is continued
  tomorrow renders the prompts of today.
"""

import datetime
import json
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mlx_distill.data.content import printable
from mlx_distill.data.dropped import lost_in, shape_of
from mlx_distill.data.examples import Skip, Turn, Turns
from mlx_distill.data.rendering import closes_thinking, rendering_of
from mlx_distill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CLOCK = "strftime_now"
DIRECTIVES = (
    *(f"%-{letter}" for letter in "dmHIMSjy"),
    *(f"%{letter}" for letter in "aAbBdeDFmyYjHIMSpTRUWuwxXcGVgCh"),
)


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
    rendering_of(tokenizer, chat_template(tokenizer))


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
    rendering = rendering_of(tokenizer, template)
    messages = [_message(turn) for turn in turns]
    lost = lost_in(tokenizer, template, rendering, tuple(map(shape_of, messages)), bool(tools))
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
    if closes_thinking(text):
        raise Skip("its prompt closes thinking before the reasoning")
    return text


def _message(turn: Turn) -> dict[str, Any]:
    role, content, *more = turn
    return {"role": role, "content": content, **(json.loads(more[0]) if more else {})}


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


def _stands_in(content: str, text: str) -> bool:
    """Whether a turn's text is in the prompt, whatever was done to its white space."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())
