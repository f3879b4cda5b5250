"""The messages before an answer → `Turn`s: what was said before, what is asked, and what follows.

In: `Message`s. Out: `Turn`s. Decided here: which messages are one turn, and that the reasoning of
earlier turns is left out (and counted).
"""

from collections import Counter

from mlx_distill.data.examples import Skip, Turns
from mlx_distill.data.messages import Message
from mlx_distill.data.reasoning import split_reasoning

EARLIER_REASONING = "reasoning of earlier turns"


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
