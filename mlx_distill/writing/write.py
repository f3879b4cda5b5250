"""A model answers the prompts of training examples, and goes on where it was stopped.

In: examples, a tokenizer, the `[rollouts]` table and a model. Out: texts, the sequences to learn
from them, and an account. Decided here: which examples are written for, in which batches, which
texts are learned and how much each weighs. Batches and random numbers are a function of the
arguments, so a writing that was stopped ends as if it had not been.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mlx_distill import verify
from mlx_distill.backends.protocol import Model, Sampling
from mlx_distill.data.examples import Example
from mlx_distill.data.sequences import THINK_TAGS, TokenSequence, generation_prompt
from mlx_distill.data.truncate import random_of
from mlx_distill.recipe.tables import RolloutsTable
from mlx_distill.writing.sequences import written_sequence
from mlx_distill.writing.texts import Asked, Text, TextFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WRITTEN_FOR = 0x3217  # the purpose of the random numbers that choose examples
SEEDS = (
    2**63
)  # how many a recipe may have: no two share the numbers that a step of theirs draws with
Progress = Callable[[str, int], Callable[[int], None]]


class Writing:
    """What one model is asked to write, and what is learned from it."""

    def __init__(
        self,
        examples: Iterable[Example],
        tokenizer: "PreTrainedTokenizerFast",
        table: RolloutsTable,
        seed: int,
        stop_ids: frozenset[int],
        day: str = "",
    ):
        self.table, self.tokenizer, self.seed, self.stop_ids = table, tokenizer, seed, stop_ids
        self.examples = {example.id: example for example in examples}
        self.prompts = {
            name: generation_prompt(example.turns, tokenizer, example.tools, day)
            for name, example in self.examples.items()
        }

    def asked(self) -> list[Asked]:
        """All texts: `samples` for each example."""
        return [Asked(name, n) for name in self.examples for n in range(self.table.samples)]

    def fields(self, model: dict[str, Any]) -> dict[str, Any]:
        """All that the texts depend on; `model` says who writes."""
        prompts = [[name, prompt.tokens] for name, prompt in self.prompts.items()]
        table = self.table.model_dump(
            include={"by", "samples", "temperature", "top_p", "max_new_tokens", "batch_size"}
        )
        return {
            **table,
            **model,
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
            "stop_ids": sorted(self.stop_ids),
            "seed": self.seed,
            "verifier": verify.VERSION,
        }

    def texts(
        self,
        file: TextFile,
        asked: Sequence[Asked],
        model: Callable[[], Model],
        progress: Progress,
        step: int = 0,
    ) -> list[Text]:
        """The texts asked for, from the file or else written now and kept in it; `model` is called
        where some are missing. `step`: how many training steps the model has done.
        """
        batches = self._batches(asked)
        texts = file.read(batches, step)
        done = {text.asked for text in texts}
        missing = [batch for batch in batches if batch[0] not in done]
        if missing:
            if texts:
                file.say(f"writing goes on: {len(texts):,} of {len(asked):,} texts are kept")
            writer, advance = model(), progress(f"{self.table.by} writes", len(asked))
            advance(len(texts))
            for batch in missing:
                written = self._written(writer, batch, step, advance)
                file.add(written)
                texts += written
        order = {one: place for place, one in enumerate(asked)}
        return sorted(texts, key=lambda text: order[text.asked])

    def sequences(self, texts: Iterable[Text]) -> dict[str, list[TokenSequence]]:
        """What is learned for each example: its texts, or those that are right, in order."""
        found: dict[str, list[TokenSequence]] = {text.example: [] for text in texts}
        weights = pass_rate_weights(texts) if self.table.weigh == "pass_rate" else {}
        for text in texts:
            weight = weights.get(text.example, 1.0)
            if weight and (text.right or self.table.keep == "all"):
                sequence = self.sequence(text)
                found[text.example].append(replace(sequence, weight=weight))
        return found

    def sequence(self, text: Text) -> TokenSequence:
        """One text after its prompt."""
        prompt, name = self.prompts[text.example], self.name(text.asked, text.step)
        return written_sequence(name, prompt.tokens, prompt.end, text.tokens, self.tokenizer)

    def name(self, asked: Asked, step: int = 0) -> str:
        """The id of a text's sequence, by which its cut is drawn."""
        return "-".join((asked.example, self.table.by, str(step), str(asked.sample)))

    def _batches(self, asked: Sequence[Asked]) -> list[list[Asked]]:
        """The longest prompts first: they need the most memory."""
        order = sorted(asked, key=lambda one: -len(self.prompts[one.example].tokens))
        size = self.table.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _written(
        self, model: Model, batch: Sequence[Asked], step: int, advance: Callable[[int], None]
    ) -> list[Text]:
        sampling = Sampling(
            max_new_tokens=self.table.max_new_tokens,
            temperature=self.table.temperature,
            top_p=self.table.top_p,
            seed=self.seed + step * SEEDS,
            batch_size=len(batch),
            stop_ids=self.stop_ids,
            samples=tuple(asked.sample for asked in batch),
        )
        prompts = [self.prompts[asked.example].tokens for asked in batch]
        started, found = time.perf_counter(), {}
        for place, tokens in model.generate(prompts, sampling):
            found[place] = tokens
            advance(1)
        seconds = (time.perf_counter() - started) / len(batch)
        return [self._text(asked, found[n], step, seconds) for n, asked in enumerate(batch)]

    def _text(self, asked: Asked, tokens: list[int], step: int, seconds: float) -> Text:
        return Text(
            example=asked.example,
            sample=asked.sample,
            step=step,
            tokens=tokens,
            finished=self._finished(tokens),
            right=self.is_right(asked, tokens),
            seconds=seconds,
        )

    def _finished(self, tokens: list[int]) -> bool:
        return bool(tokens) and tokens[-1] in self.stop_ids

    def is_right(self, asked: Asked, tokens: list[int]) -> bool | None:
        """Whether a text is finished and states the example's answer after its reasoning; None for
        an example without an answer.
        """
        gold = self.examples[asked.example].answer
        if not gold:
            return None
        if not self._finished(tokens):
            return False
        text = self.tokenizer.decode(tokens[:-1], skip_special_tokens=False)
        _, tag, answer = text.partition(THINK_TAGS[1])
        return bool(tag) and verify.states(gold, answer)


def chosen_examples(examples: Iterable[Example], share: float, seed: int) -> list[Example]:
    """The examples that are written for: about `share` of them, each by seed and id alone."""
    return [one for one in examples if random_of(seed, one.id, WRITTEN_FOR).random() < share]


def pass_rate_weights(texts: Iterable[Text]) -> dict[str, float]:
    """p(1 − p) for each example, p its share of right texts, scaled to a mean of 1 over the texts.

    A problem that is always or never right has nothing to teach about itself (arXiv 2603.11178).
    Where that holds for all of them, each weighs 1. A problem without an answer has no rate.
    """
    right = defaultdict(list)
    for text in texts:
        if text.right is not None:
            right[text.example].append(text.right)
    raw = {name: fmean(said) * (1 - fmean(said)) for name, said in right.items()}
    judged = sum(map(len, right.values()))
    mean = judged and sum(raw[name] * len(said) for name, said in right.items()) / judged
    return {name: weight / mean if mean else 1.0 for name, weight in raw.items()}
