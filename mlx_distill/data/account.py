"""What of a data set was not used, as text, and what to do where nothing usable is left.

In: the counts that readers and renderers made, by reason or by name. Out: lines for a person, and
the one remedy that belongs to the commonest reason: advice for another cause than the one at hand
sends people the wrong way.
"""

from collections import Counter
from collections.abc import Mapping

# by the beginning of a reason
REMEDIES = {
    "no reasoning": 'mark it with <think>…</think>, or name its column: data.format = "columns" '
    "and data.cot_column",
    "reasoning never closed": "these rows were cut off while they were written; give their writer "
    "more tokens",
    "no answer": "an answer is the text after the reasoning; rows without one cannot be learned",
    "no prompt": "name the column that holds it in data.prompt_column",
    "no assistant turn": "name the column of whole conversations in data.messages_column",
    "no user turn": "conversations need a question before the answer",
    "no ####": 'format "gsm8k" reads worked steps, then #### and the answer; set data.format to '
    "what the rows hold",
    "no steps": 'format "gsm8k" learns the steps before ####; name a source whose rows have some',
    "not chosen by data.where": "correct data.where",
    "same as an earlier row": "the rows repeat each other; name a source with more of them",
    "content that is not text": "only text can be learned; remove such rows or name another source",
    "its answer is a tool call": "conversations must end in an answer that is text",
    "its answer is not to be learned": "set that key to 1 in rows whose last answer is to be "
    "learned",
    "its answer is a refusal": "name a source whose conversations end in answers",
    "its prompt is in the validation set": "lower data.validation_examples",
    "its prompt alone outlasts the cut": "raise truncation.fraction or max_tokens, or set "
    'truncation.span = "cot", '
    "which keeps prompts whole",
    "longer than data.longest_tokens": "raise data.longest_tokens",
    "literal ": "remove that control text from the rows",
    "the chat template ": "name a student whose chat template has a place for it, or take it out "
    "of the rows",
    **dict.fromkeys(
        ("no <think> in", "no </think> in"),
        "this chat template takes the reasoning out of a finished answer: name a student whose "
        'template leaves it there (Qwen3), or set data.compat = "none"',
    ),
    "its prompt closes thinking": "take the words that switch thinking off out of the rows",
}


def remedy(reasons: Mapping[str, int], otherwise: str = "") -> str:
    """What to do about the commonest reason that has a remedy."""
    for reason, _ in Counter(reasons).most_common():
        for begins, advice in REMEDIES.items():
            if reason.startswith(begins):
                return advice
    return otherwise


def listed(reasons: Mapping[str, int]) -> str:
    """ "3 × no reasoning, 1 × no answer": the commonest first."""
    return ", ".join(f"{count:,} × {reason}" for reason, count in Counter(reasons).most_common())


def unused_lines(unused: Mapping[str, int]) -> list[str]:
    """ "column tools in 40 rows", "key name in 3 turns": what most rows carry first."""
    ordered = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    return [f"{name} in {count:,} {_unit(name, count)}" for name, count in ordered]


def _unit(name: str, count: int) -> str:
    unit = "row" if name.startswith("column ") else "turn"
    return unit if count == 1 else f"{unit}s"
