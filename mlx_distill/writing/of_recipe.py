"""The texts that a recipe asks a model for: who writes, where they are kept, what is learned.

In: a recipe's models and its chosen examples. Out: what a run learns from. Decided here: texts that
are written once lie in `rollouts.folder` and serve every run that asks the same; those that the
student writes again as it learns lie in its run folder. Held-out examples without a solution are
validated on one text, written once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, Model
from mlx_distill.backends.stops import stops_of
from mlx_distill.cost.flops import Shape
from mlx_distill.cost.writing import WritingCost, writing_cost, writing_flops
from mlx_distill.data.batches import Order
from mlx_distill.data.examples import Example
from mlx_distill.data.prepare import Chosen, Prepared, choose, cut_sequence, learnable
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DataError, ModelError, RunError
from mlx_distill.models.folder import read_config
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.manifest import Manifest, Written
from mlx_distill.runs.provenance import data_account, identity
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.runs.sample import make_sample
from mlx_distill.view import View
from mlx_distill.words import amount, counted
from mlx_distill.writing.folder import TEXTS, held_texts, text_folder
from mlx_distill.writing.rewritten import RewrittenSteps
from mlx_distill.writing.texts import Asked, Say, Text, TextFile, account, describe
from mlx_distill.writing.write import Writing, chosen_examples

FILE = "rollouts.jsonl"  # in a run folder
Sequences = dict[str, list[TokenSequence]]


class Rollouts:
    """What a recipe learns whose texts a model writes."""

    def __init__(self, pair: Pair, chosen: Chosen, day: str):
        self.pair, self.recipe, self.chosen = pair, pair.recipe, chosen
        self.table, seed = self.recipe.rollouts, self.recipe.run.seed
        examples = [example for example, _ in chosen.train]
        train = chosen_examples(examples, self.table.share, seed)
        self._refuse_unjudged(train)
        held_out = [example for example, _ in chosen.validation if not example.solved]
        self._train, self._held_out = {one.id for one in train}, {one.id for one in held_out}
        folder, tokenizers = pair.student, [pair.tokenizer]
        if self.table.by == "teacher":
            folder, tokenizer = pair.named_teacher()
            tokenizers.append(tokenizer)
        stops = stops_of(pair.student, pair.tokenizer) | stops_of(folder, *tokenizers)
        self.writing = Writing([*train, *held_out], pair.tokenizer, self.table, seed, stops, day)
        self._writer = folder
        self._root = Path(self.table.folder).expanduser()
        self._once: list[Text] = []  # what was written once

    @cached_property
    def _fields(self) -> dict[str, Any]:
        """All that the texts depend on; the format that a device computes in by itself does not
        count, as the backend does not.
        """
        writer = self.recipe.teacher if self.table.by == "teacher" else self.recipe.student
        bits = writer.quantize_bits
        model = identity(self._writer) | {"quantize_bits": bits}
        return self.writing.fields(model | self.pair.asked_dtype(self.table.by))

    @property
    def folder(self) -> Path:
        """Where the texts that are written once are kept."""
        return text_folder(self._root, self._fields)

    def planned(self) -> Prepared:
        """What may be learned, before anything is written: texts as long as they can be."""
        longest = self._longest(self._train | self._held_out)
        return replace(
            learnable(self.chosen, self.recipe, longest),
            to_write=tuple(map(self._prompt, self.writing.asked())),
            own=self._own,
        )

    def known(self) -> Prepared:
        """What is learned as far as it is known without writing anything; its notes say which of
        the two it is, and what writing would cost.
        """
        asked, texts, by = self._asked_once(), self._lying_there(), self.table.by
        if texts and texts.keys() >= set(asked) and not self.table.refresh_every:
            found = self._learned([texts[one] for one in asked])
            return replace(found, notes=(*found.notes, f"texts of the {by}, from {self.folder}"))
        notes = [
            f"texts of the {by} are not written yet: all are taken as "
            f"{self.table.max_new_tokens:,} tokens long, which they are at most"
        ]
        if cost := self.cost():
            notes.append(describe_cost(cost))
        planned = self.planned()
        return replace(planned, notes=(*planned.notes, *notes))

    def held_out(self) -> tuple[TokenSequence, ...]:
        """The texts that runs of the recipe are validated on. Raises `DataError` where a model wrote
        some of them and they do not lie there.
        """
        texts = {one.example: text for one, text in self._lying_there().items() if one.sample == 0}
        if missing := len(self._held_out - texts.keys()):
            raise DataError(
                f"{counted(missing, 'text')} that the {self.table.by} wrote for held-out prompts "
                f"cannot be found in {self._root.absolute()}"
            )
        return tuple(
            self.writing.sequence(texts[one.id]) if one.id in self._held_out else said
            for one, said in self.chosen.validation
        )

    def _lying_there(self) -> dict[Asked, Text]:
        """What was written once, as it lies there; nothing where the writer's weights do not."""
        try:
            file = TextFile(self.folder / TEXTS, _unsaid)
        except ModelError:
            return {}
        return {text.asked: text for text in file.everything()}

    def written(self, load: Callable[[], Model], backend: Backend, view: View) -> Prepared:
        """What is learned, after what was missing of the texts that are written once was written.

        `load` gives the writer where some are missing. Raises `RunError` where several ranks would
        have to write.
        """
        texts: list[Text] = []
        if asked := self._asked_once():
            with held_texts(self._root, self._fields, view.say) as file:

                def writer() -> Model:
                    refuse_ranks(self.recipe, backend.ranks.size)
                    return load()

                texts = self.writing.texts(file, asked, writer, view.count)
            backend.release()
            view.say(f"texts in {self.folder}: {describe(account(texts, self.table.by))}")
        self._once = texts
        return self._learned(texts)

    def _learned(self, texts: list[Text]) -> Prepared:
        train = [text for text in texts if text.example in self._train]
        held_out = [text for text in texts if text.example in self._held_out]
        learned: Sequences = {text.example: [self.writing.sequence(text)] for text in held_out}
        to_write: list[int] = []
        if self.table.refresh_every:
            learned |= self._longest(self._train)
            to_write = [self._prompt(unit) for unit in self._units() if isinstance(unit, Asked)]
        elif train:
            learned |= self.writing.sequences(train)
            self._refuse_too_few(learned, train)
        found = learnable(self.chosen, self.recipe, learned)
        return replace(found, to_write=tuple(to_write), own=self._own)

    @property
    def _own(self) -> tuple[TokenSequence, ...]:
        """What the data says, which is all that can be read before the student writes."""
        return tuple(said for _, said in self.chosen.train) if self.table.refresh_every else ()

    def rewritten(self, folder: Path, say: Say) -> Prepared:
        """What the run in `folder` has learned so far, of texts that the student wrote as it learned."""
        learned: Sequences = {name: [] for name in self._train}
        for text in TextFile(folder / FILE, say).everything():
            learned[text.example].append(self.writing.sequence(text))
        held_out = [text for text in self._once if text.example in self._held_out]
        learned |= {text.example: [self.writing.sequence(text)] for text in held_out}
        return learnable(self.chosen, self.recipe, learned)

    def leave_account(self, folder: RunFolder, say: Say) -> None:
        """Leave in a trained run what was written for it and, where it began with stand-ins, what it
        learned.
        """
        folder.update(Manifest, written=self.account(folder.path, say))
        if self.table.refresh_every:
            learned = self.rewritten(folder.path, say)
            folder.update(Manifest, data=data_account(learned, self.recipe))
            folder.write(make_sample(learned, self.recipe, self.pair.tokenizer))

    def account(self, folder: Path, say: Say) -> Written:
        """What was written for the run in `folder`, so far."""
        texts = [*self._once, *TextFile(folder / FILE, say).everything()]
        found, shape = account(texts, self.table.by), self._shape()
        if shape is None:
            return found
        prompts = [self._prompt(text.asked) for text in texts]
        flops = writing_flops(prompts, [len(text.tokens) for text in texts], shape)
        return found.model_copy(update={"flops": flops})

    def _refuse_unjudged(self, train: Sequence[Example]) -> None:
        """Raise `DataError`, before anything is written, where texts are to be judged by answers that
        no row has.
        """
        table = self.table
        judges = table.keep == "right" or table.weigh == "pass_rate"
        if judges and train and not any(example.answer for example in train):
            field = 'keep = "right"' if table.keep == "right" else 'weigh = "pass_rate"'
            raise DataError(
                f"{self.recipe.data.source}: [rollouts] {field} judges texts by the rows' answers, "
                f"and none of {counted(len(train), 'example')} has one: name the column of answers, "
                'or set keep = "all" and weigh = "none"'
            )

    def _refuse_too_few(self, learned: Sequences, texts: list[Text]) -> None:
        """Raise `DataError` where so many texts were left out that they do not fill one step."""
        size = self.recipe.batch.global_batch_size
        left = sum(len(learned.get(one.id, [said])) for one, said in self.chosen.train)
        dropped = len(texts) - sum(len(learned.get(name, [])) for name in self._train)
        if dropped and left < size:
            raise DataError(
                f"{self.folder}: {left:,} of {left + dropped:,} texts are learned, "
                f"{describe(account(texts, self.table.by))}, and a step takes {size:,}: raise "
                'rollouts.max_new_tokens or rollouts.samples, set rollouts.keep = "all", or lower '
                "batch.global_batch_size"
            )

    def cost(self) -> WritingCost | None:
        """What writing costs at most, keys and values kept in float32; None where the writer's
        config does not say its sizes.
        """
        shape = self._shape()
        if shape is None:
            return None
        prompts = [self._prompt(one) for one in self._asked_once()]
        if self.table.refresh_every:
            units = [unit for unit in self._units() if isinstance(unit, Asked)]
            passes = len(self._order()) * self.recipe.batch.global_batch_size / len(self._units())
            again = [self._prompt(unit) for unit in units] * math.ceil(passes)
            prompts += again[: round(passes * len(units))]
        longest, at_once = self.table.max_new_tokens, self.table.batch_size
        return writing_cost(prompts, longest, at_once, shape, number_bytes=4)

    def _prompt(self, asked: Asked) -> int:
        """The length of its prompt."""
        return len(self.writing.prompts[asked.example].tokens)

    def _shape(self) -> Shape | None:
        return Shape.of(read_config(self._writer))

    def _order(self) -> Order:
        size, optim = self.recipe.batch.global_batch_size, self.recipe.optim
        seed = self.recipe.run.seed
        return Order(len(self._units()), size, seed, optim.epochs, optim.steps)

    def source(self, student: Callable[[], Model], folder: Path, say: Say) -> RewrittenSteps:
        """Steps over what `student()` writes as it learns, kept in the run's `folder`."""
        recipe, file = self.recipe, TextFile(folder / FILE, say)

        def ask(asked: list[Asked], step: int) -> dict[Asked, TokenSequence]:
            texts = self.writing.texts(file, asked, student, _quiet, step)
            return {text.asked: cut_sequence(self.writing.sequence(text), recipe) for text in texts}

        units, order = self._units(), self._order()
        segments = recipe.objective.segments
        endings = recipe.truncation.ending == "answer"
        every, selection, seed = self.table.refresh_every, recipe.selection, recipe.run.seed
        return RewrittenSteps(
            order, units, every, ask, segments, recipe.batch, endings, selection, seed
        )

    def _asked_once(self) -> list[Asked]:
        """All texts of the training side, unless the student writes them as it learns, and one of
        each held-out example that has no solution.
        """
        train = [] if self.table.refresh_every else self._train
        return [
            one
            for one in self.writing.asked()
            if one.example in train or (one.example in self._held_out and one.sample == 0)
        ]

    def _units(self) -> list[Asked | TokenSequence]:
        """What the order of a run counts: answers to be written, or sequences of the data's."""
        units: list[Asked | TokenSequence] = []
        for example, said in self.chosen.train:
            if example.id in self._train:
                units += [Asked(example.id, n) for n in range(self.table.samples)]
            elif (
                (cut := cut_sequence(said, self.recipe))
                .supervised(self.recipe.objective.segments)
                .any()
            ):
                units.append(cut)
        return units

    def _longest(self, names: set[str]) -> Sequences:
        """Stand-ins for what is not written yet, all of which may be learned: reasoning, or the answer
        where that alone is. They are cut as the texts that are written once will be.
        """
        thinks = "cot" in self.recipe.objective.segments
        found: Sequences = {}
        (unknown, *_) = self.pair.tokenizer(".", add_special_tokens=False)["input_ids"]
        for name in names:
            prompt = self.writing.prompts[name]
            tokens = np.array([*prompt.tokens, *[unknown] * self.table.max_new_tokens], np.int32)
            allowed = np.ones(len(tokens), bool)
            ends = prompt.end, len(tokens) if thinks else prompt.end
            found[name] = [
                TokenSequence(self._stand_in(Asked(name, sample)), tokens, *ends, allowed)
                for sample in range(self.table.samples)
            ]
        return found

    def _stand_in(self, asked: Asked) -> str:
        """The id of a text that is not written yet; of one that is written again, no step's."""
        return "-".join(map(str, asked)) if self.table.refresh_every else self.writing.name(asked)


def describe_cost(cost: WritingCost) -> str:
    """One line for the plan."""
    return (
        f"writing: {counted(cost.texts, 'text')}, at most {amount(cost.tokens)} tokens and "
        f"{amount(cost.flops)}FLOP; keys and values at most {amount(cost.kv_bytes, 'B')}"
    )


def known_sequences(pair: Pair, day: str) -> Prepared:
    """What a run of the recipe learns from, as far as it is known before it runs."""
    chosen = choose(pair.recipe, pair.tokenizer, day)
    if pair.recipe.rollouts.by == "data":
        return learnable(chosen, pair.recipe)
    return Rollouts(pair, chosen, day).known()


def held_out_texts(pair: Pair, day: str) -> tuple[TokenSequence, ...]:
    """What a run of the recipe was validated on; raises as `Rollouts.held_out` does."""
    chosen = choose(pair.recipe, pair.tokenizer, day)
    if pair.recipe.rollouts.by == "data":
        return learnable(chosen, pair.recipe).validation
    return Rollouts(pair, chosen, day).held_out()


def refuse_ranks(recipe: Recipe, ranks: int) -> None:
    """Raise `RunError` where several ranks would write together."""
    if ranks > 1:
        first = "run `mlx-distill write` on the recipe first, without a launcher"
        instead = "start the run without a launcher, or set rollouts.refresh_every=0"
        raise RunError(
            f"{recipe.run.name}: texts are written by one process, here are {ranks}: "
            + (instead if recipe.rollouts.refresh_every else first)
        )


def _unsaid(line: str) -> None:
    """Nothing is told of a file that is only looked at."""


def _quiet(what: str, total: int) -> Callable[[int], None]:
    """The student writes under the bar of the training, which goes on."""
    return lambda done: None
