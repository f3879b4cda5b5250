"""`Example`: one worked problem as plain text, and examples → a training and a validation side.

Decided here: what an example's id depends on, what makes a row nothing to learn from (`Skip`), and
which examples are held out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mlx_distill.data.account import listed, remedy
from mlx_distill.errors import DataError
from mlx_distill.readers import is_text
from mlx_distill.recipe.tables import DataTable

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
    order of the file: two rows that say the same are one example.
    """

    id: str
    prompt: str
    cot: str
    answer: str
    history: Turns = ()
    after: Turns = ()
    tools: str = ""

    @property
    def turns(self) -> Turns:
        """All that stands before the answer, in order."""
        return (*self.history, ("user", self.prompt), *self.after)


class Skip(Exception):
    """A row with nothing to learn from; its only argument is the reason under which it is counted.
    Never leaves data/.
    """


def example_id(
    prompt: str, cot: str, answer: str, history: Turns = (), after: Turns = (), tools: str = ""
) -> str:
    """16 hexadecimal digits that depend on the text of an example and on nothing else."""
    content = [prompt, cot, answer, history]
    if after or tools:  # others keep the ids under which caches know them
        content += [after, tools]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def make_example(
    prompt: str, cot: str, answer: str, history: Turns = (), after: Turns = (), tools: str = ""
) -> Example:
    """An `Example` with its white space trimmed and its id made; raises `Skip` where a part is
    empty.
    """
    cot, answer = cot.strip(), answer.strip()
    for name, text in (("prompt", prompt.strip()), ("reasoning", cot), ("answer", answer)):
        if not text:
            raise Skip(f"no {name}")
    content = prompt, cot, answer, history, after, tools
    if not is_text(content):
        raise Skip("half of a character (a lone surrogate) in its text")
    return Example(example_id(*content), *content)


def split_examples(
    examples: Iterable[Example],
    data: DataTable,
    seed: int,
    usable: Callable[[Example], bool] = lambda example: True,
    skipped: Counter[str] | None = None,
) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples: a seeded shuffle, the validation side filled first.

    No prompt (with its history) is on both sides: training rows that ask a held-out question are
    counted in `skipped`. `usable` is asked once for each example that is about to be taken (it
    renders and checks lengths), so that the numbers asked for are the numbers got. Raises
    `DataError` where there are too few.
    """
    skipped = Counter() if skipped is None else skipped
    pool = list(examples)
    order = np.random.default_rng([seed, 0x5B117]).permutation(len(pool))
    shuffled = (pool[index] for index in order)
    validation: list[Example] = []
    while len(validation) < data.validation_examples and (example := next(shuffled, None)):
        if usable(example):
            validation.append(example)
    held_out = {(example.history, example.prompt.strip()) for example in validation}
    train: list[Example] = []
    while (not data.train_examples or len(train) < data.train_examples) and (
        example := next(shuffled, None)
    ):
        if (example.history, example.prompt.strip()) in held_out:
            skipped["its prompt is in the validation set"] += 1
        elif usable(example):
            train.append(example)
    _refuse_too_few(data, len(pool), len(train), len(validation), skipped)
    return train, validation


def _refuse_too_few(
    data: DataTable, rows: int, train: int, validation: int, skipped: Counter[str]
) -> None:
    if validation == data.validation_examples and train >= max(1, data.train_examples):
        return
    reasons = f", {listed(skipped)}" if skipped else ""
    fewer = "lower data.validation_examples or data.train_examples, or name a source with more rows"
    raise DataError(
        f"{data.source}: asked for {data.validation_examples} validation and "
        f"{data.train_examples or 'at least 1'} training examples, found {validation} and {train} "
        f"usable ones in {rows} examples{reasons}; {remedy(skipped, fewer)}"
    )
