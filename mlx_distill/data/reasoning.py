"""A response as one text → its reasoning and its answer.

Decided here: which marks are known, and that the whole text is either of one known layout or has no
reasoning: marks are never searched for in the middle of an answer.
"""

import re
from collections.abc import Iterator

from mlx_distill.data.examples import Skip

BEGIN_OF_THOUGHT = "<|begin_of_thought|>"

# opening and closing marks; after the last four an answer may have marks of its own, which are
# taken off with them
TAGS = (
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
ANSWER_TAGS = ("<answer>", "</answer>"), ("<|START_RESPONSE|>", "<|END_RESPONSE|>")

THINK = re.compile(r"\s*(?:<think>)?(?P<cot>.*?)</think>(?P<answer>.*)", re.DOTALL)
STRATOS = re.compile(
    r".*?<\|begin_of_thought\|>(?P<cot>.*?)<\|end_of_thought\|>\s*(?:<\|begin_of_solution\|>)?"
    r"(?P<answer>.*?)(?:<\|end_of_solution\|>\s*)?",
    re.DOTALL,
)
UNMARKED_CHANNELS = re.compile(
    r"analysis(?P<cot>.*?)assistantfinal(?P<answer>.*)", re.DOTALL
)  # its marks were not decoded

MESSAGE = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>(?P<channel>\w+)(?P<recipient>[^<]*)"
    r"(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(?P<text>.*?)(?P<end><\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>)|(?=<\|channel\|>)|\Z)",
    re.DOTALL,
)
TOOL_CALL = re.compile(
    r"<tool_call>.*</tool_call>|\A\s*(?:<functioncall>|<\|python_tag\|>|\[TOOL_CALLS\])", re.DOTALL
)


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of a response; raises `Skip` where its reasoning is missing or never
    closed.

    Understands `<think>…</think>answer` (the opening tag may be missing: some templates put it into
    the prompt), `<|begin_of_thought|>…<|end_of_thought|><|begin_of_solution|>…<|end_of_solution|>`,
    the pairs of `TAGS` with or without an answer in tags, and harmony's channels. A second pair of
    tags stays in the answer and is refused when the example is rendered.
    """
    if "<|channel|>" in text:
        return _channels(text)
    begins = text.lstrip()
    for opening, closing in TAGS:
        if begins.startswith(opening) and closing in begins:
            cot, _, answer = begins.removeprefix(opening).partition(closing)
            return cot, _without_tags(answer)
    for pattern in (THINK, STRATOS, UNMARKED_CHANNELS):
        if match := pattern.fullmatch(text):
            return match["cot"], match["answer"]
    opened = (
        "<think>" in text
        or BEGIN_OF_THOUGHT in text
        or begins.startswith(tuple(opening for opening, _ in TAGS))
    )
    raise Skip("reasoning never closed" if opened else "no reasoning")


def calls_a_tool(answer: str) -> bool:
    """Whether an answer is a tool call that was written as text."""
    return bool(TOOL_CALL.search(answer))


def _without_tags(answer: str) -> str:
    stripped = answer.strip()
    for opening, closing in ANSWER_TAGS:
        if stripped.startswith(opening) and stripped.endswith(closing):
            return stripped.removeprefix(opening).removesuffix(closing)
    return answer


def _channels(text: str) -> tuple[str, str]:
    """Harmony (gpt-oss): `analysis` is reasoning; `final` and what `commentary` says to the user
    are the answer.
    """
    analysis: list[str] = []
    visible: list[str] = []
    for message in _messages(text):
        if "to=" in message["recipient"] or message["end"] == "<|call|>":
            raise Skip("its answer is a tool call")
        part = analysis if message["channel"] == "analysis" else visible
        part.append(message["text"].strip())
    if not visible:
        raise Skip("reasoning never closed")
    return "\n\n".join(analysis), "\n\n".join(visible)


def _messages(text: str) -> Iterator[re.Match[str]]:
    """The messages of which the whole text consists."""
    place = 0
    while text[place:].strip():
        message = MESSAGE.match(text, place)
        if not message or message.end() == place:
            raise Skip("channels that cannot be told apart")
        yield message
        place = message.end()
