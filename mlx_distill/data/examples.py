"""`Example`: one worked problem as plain text.

Decided here: what an example's id depends on, what makes a row nothing to learn from (`Skip`),
how many are held out, and the order in which examples are taken.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mlx_distill.readers import is_text
from mlx_distill.recipe.tables import DataTable

MOST_HELD_OUT = 64  # where the recipe does not say how many are
Turn = tuple[str, str] | tuple[str, str, str]
Turns = tuple[Turn, ...]


@dataclass(frozen=True)
class Example:
    """One worked problem as plain text.

    `prompt` is what the user says last, `history` the turns before it, a system message included
    and without the reasoning of earlier assistant turns. `after` are the turns between the prompt
    and the answer: calls of tools and their results. A turn is (role, content), and where a message
    has more for the template (tool calls, a result's name, reasoning between calls) a third text:
    those keys as JSON. `tools` is the JSON text of what can be called, "" where there is nothing.
    `cot` is the reasoning without its `<think>` tags, `answer` what follows it; both without white
    space around them. `id` is a digest of the content (`example_id`), so it does not depend on the
    order of the file: two rows that say the same are one example. Where the data only asks, `cot`
    is empty, and `answer` too unless it is known. `said` is the whole answering turn as the row has
    it, for `data.compat = "paper"` alone.
    """

    id: str
    prompt: str
    cot: str
    answer: str
    history: Turns = ()
    after: Turns = ()
    tools: str = ""
    said: str = ""

    @property
    def turns(self) -> Turns:
        """All that stands before the answer, in order."""
        return (*self.history, ("user", self.prompt), *self.after)

    @property
    def solved(self) -> bool:
        """Whether there is a solution to learn from."""
        return bool(self.cot)


class Skip(Exception):
    """A row with nothing to learn from; its only argument is the reason under which it is counted.
    Never leaves data/.
    """


def held_out_of(rows: int, data: DataTable) -> int:
    """How many examples of so many rows are for validation: what the recipe says, or a tenth, from
    1 to `MOST_HELD_OUT`.
    """
    return data.validation_examples or max(1, min(rows // 10, MOST_HELD_OUT))


def example_id(
    prompt: str, cot: str, answer: str, history: Turns = (), after: Turns = (), tools: str = ""
) -> str:
    """16 hexadecimal digits that depend on the text of an example and on nothing else."""
    content = [prompt, cot, answer, history]
    if after or tools:  # others keep the ids under which caches know them
        content += [after, tools]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def make_example(
    prompt: str,
    cot: str,
    answer: str,
    history: Turns = (),
    after: Turns = (),
    tools: str = "",
    solved: bool = True,
    said: str = "",
) -> Example:
    """An `Example` with its white space trimmed and its id made; raises `Skip` where a part is
    empty that it must have. With `solved=False` that is the prompt alone: a model is to answer it.
    """
    cot, answer = cot.strip(), answer.strip()
    parts = {"prompt": prompt.strip()} | ({"reasoning": cot, "answer": answer} if solved else {})
    for name, text in parts.items():
        if not text:
            raise Skip(f"no {name}")
    content = prompt, cot, answer, history, after, tools
    if not is_text((content, said)):
        raise Skip("half of a character (a lone surrogate) in its text")
    return Example(example_id(*content), *content, said)


def shuffled(examples: Iterable[Example], seed: int) -> list[Example]:
    """The examples in an order that depends on the seed and on how many there are."""
    pool = list(examples)
    order = np.random.default_rng([seed, 0x5B117]).permutation(len(pool))
    return [pool[index] for index in order]
