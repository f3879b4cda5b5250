"""A recipe and a tokenizer → the sequences a run trains on and is validated on, with an account of
every row.

The one path from data to sequences, shared by training, `plan` and `show`: shuffle, render, take,
cut. Decided here: which examples are held out, that validation sequences are whole, that rows are
chosen before they are cut (so the same ones at every fraction), and what counts as dropped.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from mlx_distill.data.account import listed, remedy
from mlx_distill.data.compat import dropped, mean_of_means, validated, whole_conversation
from mlx_distill.data.detection import about_format, all_written, detected
from mlx_distill.data.examples import Example, Skip, Turns, held_out_of, shuffled
from mlx_distill.data.kept_renderings import Rendered
from mlx_distill.data.named import resolved
from mlx_distill.data.reading import read_examples
from mlx_distill.data.renderer import rendered_all
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.data.template import refuse_unusable
from mlx_distill.data.truncate import drawn, stays_whole, thin, truncate
from mlx_distill.errors import DataError
from mlx_distill.recipe.recipe import Recipe, with_values
from mlx_distill.recipe.tables import DataTable, TruncationTable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Usable = tuple[Example, TokenSequence]


@dataclass(frozen=True)
class Prepared:
    """What a run learns from.

    `train` are cut and thinned, each with at least one supervised token. `train_whole` are the
    chosen training examples uncut, those that the cut left without a supervised token included, in
    the same order. `validation` are whole. `examples` has the text of all of them by id. `skipped`
    has the rows not used by reason; rows that were not needed are in none of these. `unused` has
    what used and skipped rows carry besides, by kind and name ("column source"), with how often.
    `day` is what prompts say, "" where their template reads no clock. `stay_whole` counts the
    training examples that `whole_share` leaves uncut. `to_write` has the lengths of the prompts
    that a model has still to answer, once for each text. `own` has what the data says of the
    training examples, where `train` and `train_whole` are stand-ins for what a student writes as it
    learns.
    """

    train: tuple[TokenSequence, ...]
    train_whole: tuple[TokenSequence, ...]
    validation: tuple[TokenSequence, ...]
    examples: dict[str, Example]
    skipped: dict[str, int]
    unused: dict[str, int] = field(default_factory=dict)
    day: str = ""
    notes: tuple[str, ...] = ()
    stay_whole: int = 0
    to_write: tuple[int, ...] = ()
    own: tuple[TokenSequence, ...] = ()

    @property
    def measured(self) -> tuple[TokenSequence, ...]:
        """The texts on which activations are measured: real ones, whole."""
        return self.own or self.train_whole

    def about_endings(self) -> list[str]:
        """For a person: how many examples are not cut, and how many end in an answer after it."""
        lines, count = [], len(self.train_whole)
        if self.stay_whole:
            lines.append(f"{self.stay_whole:,} of {count:,} examples stay whole")
        if ended := [sequence.ending for sequence in self.train if sequence.ending]:
            lines.append(
                f"{len(ended):,} of {count:,} examples end in </think> and the answer after the "
                f"cut: {sum(ended):,} tokens, learned from the text alone"
            )
        return lines


@dataclass(frozen=True)
class Chosen:
    """The examples of a run, whole and rendered, before anything is written or cut. `skipped`,
    `unused` and `day` as in `Prepared`.
    """

    train: tuple[Usable, ...]
    validation: tuple[Usable, ...]
    skipped: dict[str, int]
    unused: dict[str, int]
    day: str
    notes: tuple[str, ...] = ()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which would look through all rows again and again (of 100,000
    it took a sixth of a start): what is made here lives as long as the run.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def prepare(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", day: str = "") -> Prepared:
    """Choose and cut the examples of a recipe, with what the data says of each; see `choose` and
    `learnable` for what is raised.
    """
    return learnable(choose(recipe, tokenizer, day), recipe)


@_uncollected()
def choose(recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", day: str = "") -> Chosen:
    """Read, render and take the examples of a recipe with the student's tokenizer.

    `day` ("2026-11-26") is what prompts say where their template reads the clock, "" the machine's
    own. Raises `NotFound` or `DataError` where there is no data or not enough of it, `ModelError`
    for a chat template that cannot be used.
    """
    refuse_unusable(tokenizer)
    skipped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    seed = recipe.run.seed
    asked = resolved(recipe.data)
    data = detected(asked, all_written(recipe))
    examples = shuffled(read_examples(data, seed, skipped, unused), seed)
    rendered = _rendered(examples, tokenizer, recipe, day, skipped, unused)
    train, validation = take(rendered, recipe.data, skipped, len(examples))
    notes = tuple(filter(None, [about_format(asked, data)]))
    return Chosen(tuple(train), tuple(validation), dict(skipped), dict(unused), day, notes)


@_uncollected()
def learnable(
    chosen: Chosen, recipe: Recipe, written: Mapping[str, Sequence[TokenSequence]] | None = None
) -> Prepared:
    """What a run learns from: the chosen examples' sequences, cut and thinned.

    `written` has texts by example id that stand in for the data's, none where it lists none. Raises
    `DataError` where nothing supervised is left after the cut, or nothing of it is held out.
    """
    texts = written or {}
    whole = tuple(text for one, said in chosen.train for text in texts.get(one.id, [said]))
    cut = tuple(cut_sequence(sequence, recipe) for sequence in whole)
    learning = tuple(
        sequence for sequence in cut if sequence.supervised(recipe.objective.segments).any()
    )
    causes = Counter(
        _why_nothing_is_left(sequence, recipe)
        for sequence, left in zip(whole, cut, strict=True)
        if not left.supervised(recipe.objective.segments).any()
    )
    if not learning:
        raise DataError(_nothing_is_left(causes, recipe))
    validation = tuple(texts.get(one.id, [said])[0] for one, said in chosen.validation)
    if recipe.data.compat == "paper":
        learning = tuple(mean_of_means(one, recipe.objective.segments) for one in learning)
        validation = tuple(validated(one, recipe) for one in validation)
    _refuse_unmeasured(validation, recipe)
    return Prepared(
        train=learning,
        train_whole=whole,
        validation=validation,
        examples={example.id: example for example, _ in (*chosen.train, *chosen.validation)},
        skipped=dict(Counter(chosen.skipped) + causes),
        unused=chosen.unused,
        day=chosen.day,
        notes=chosen.notes,
        stay_whole=sum(_stays_whole(sequence, recipe) for sequence in whole),
    )


def _refuse_unmeasured(validation: Sequence[TokenSequence], recipe: Recipe) -> None:
    """Raise `DataError` where held-out texts have nothing of what is learned: there is no loss of no
    tokens.
    """
    segments = recipe.objective.segments
    if not validation or any(one.supervised(segments).any() for one in validation):
        return
    longer = "" if recipe.rollouts.by == "data" else "rollouts.max_new_tokens or "
    raise DataError(
        f"{recipe.data.source}: none of {len(validation)} held-out texts has a token of "
        f"{' + '.join(segments)}, by which the best student is chosen: raise {longer}"
        "data.validation_examples, or supervise other segments"
    )


def _rendered(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerFast",
    recipe: Recipe,
    day: str,
    skipped: Counter[str],
    unused: Counter[str],
) -> Iterator[Usable]:
    """Each example that can be rendered in at most `longest_tokens`, with its sequence; others are
    counted by their reason.
    """
    longest = recipe.data.longest_tokens
    found: Iterator[tuple[Example, Rendered]]
    if recipe.data.compat == "paper":
        found = ((one, _as_the_paper(one, tokenizer, recipe)) for one in examples)
    else:
        found = rendered_all(examples, tokenizer, day)
    for example, (sequence, unread) in found:
        unused.update(unread)
        if isinstance(sequence, Skip):
            skipped[str(sequence)] += 1
        elif len(sequence) > longest:
            skipped[f"longer than data.longest_tokens = {longest}"] += 1
        else:
            yield example, sequence


def _as_the_paper(
    example: Example, tokenizer: "PreTrainedTokenizerFast", recipe: Recipe
) -> Rendered:
    segments, keep = recipe.objective.segments, recipe.truncation.keep
    try:
        return Rendered(whole_conversation(example, tokenizer, segments, keep), dropped(example))
    except Skip as skip:
        return Rendered(skip, Counter())


def take(
    usable: Iterable[Usable],
    data: DataTable,
    skipped: Counter[str],
    rows: int,
) -> tuple[list[Usable], list[Usable]]:
    """(training, validation) examples, each with its sequence: the validation side takes
    the first ones, the training side the next ones whose prompt (with its history) it does not ask;
    those that it asks are counted in `skipped`. No more are drawn than are needed.

    Raises `DataError` where there are too few among the `rows` that there were.
    """
    drawn = iter(usable)
    asked = held_out_of(rows, data)
    validation = list(islice(drawn, asked))
    held_out = {_asked(example) for example, _ in validation}
    train = list(islice(_not_asked_in(held_out, drawn, skipped), data.train_examples or None))
    _refuse_too_few(data, asked, rows, len(train), len(validation), skipped)
    return train, validation


def _asked(example: Example) -> tuple[Turns, str]:
    return example.history, example.prompt.strip()


def _not_asked_in(
    held_out: set[tuple[Turns, str]],
    usable: Iterator[Usable],
    skipped: Counter[str],
) -> Iterator[Usable]:
    for example, sequence in usable:
        if _asked(example) in held_out:
            skipped["its prompt is in the validation set"] += 1
        else:
            yield example, sequence


def _refuse_too_few(
    data: DataTable, asked: int, rows: int, train: int, validation: int, skipped: Counter[str]
) -> None:
    if validation == asked and train >= max(1, data.train_examples):
        return
    reasons = f", {listed(skipped)}" if skipped else ""
    fewer = "lower data.validation_examples or data.train_examples, or name a source with more rows"
    raise DataError(
        f"{data.source}: asked for {asked} validation and "
        f"{data.train_examples or 'at least 1'} training examples, found {validation} and {train} "
        f"usable ones in {rows} examples{reasons}; {remedy(skipped, fewer)}"
    )


PROMPT_OUTLASTS = "its prompt alone outlasts the cut"
SHARE_IS_NONE = "its share of tokens rounds to none"
CUT_AWAY = "no supervised token left after the cut"


def _why_nothing_is_left(whole: TokenSequence, recipe: Recipe) -> str:
    """Why the cut and the share leave a sequence nothing to learn."""
    cut = cut_sequence(whole, with_values(recipe, truncation={"token_share": 1.0}))
    if cut.supervised(recipe.objective.segments).any():
        return SHARE_IS_NONE
    ends_in_prompt = recipe.truncation.keep in ("prefix", "cot") and len(cut) <= whole.prompt_end
    return PROMPT_OUTLASTS if ends_in_prompt else CUT_AWAY


def _nothing_is_left(causes: Counter[str], recipe: Recipe) -> str:
    cut, segments = recipe.truncation, " + ".join(recipe.objective.segments)
    remedies = {
        PROMPT_OUTLASTS: f'{_longer(cut)}, or set truncation.span = "cot", which keeps prompts '
        "whole",
        SHARE_IS_NONE: "raise truncation.token_share",
        CUT_AWAY: f"{_longer(cut)}, or supervise other segments",
    }
    return (
        f"{recipe.data.source}: none of {causes.total()} training examples has a token of "
        f"{segments} left after the cut ({listed(causes)}); "
        f"{remedies[causes.most_common(1)[0][0]]}"
    )


def _longer(cut: TruncationTable) -> str:
    fields = ["truncation.max_tokens"] * bool(cut.max_tokens) + ["truncation.fraction"] * (
        cut.fraction < 1
    )
    return (
        f"raise {' and '.join(fields)}"
        if fields
        else f'choose another truncation.keep than "{cut.keep}"'
    )


def cut_sequence(sequence: TokenSequence, recipe: Recipe) -> TokenSequence:
    """One whole sequence as the recipe trains on it: truncated, unless it is among those that stay
    whole, then thinned to its share of supervised tokens.
    """
    whole = _stays_whole(sequence, recipe)
    table = drawn(recipe.truncation, sequence.id, recipe.run.seed)
    cut = sequence if whole else truncate(sequence, table)
    return thin(cut, recipe.truncation.token_share, recipe.objective.segments, recipe.run.seed)


def _stays_whole(sequence: TokenSequence, recipe: Recipe) -> bool:
    return stays_whole(sequence, recipe.truncation.whole_share, recipe.run.seed)
