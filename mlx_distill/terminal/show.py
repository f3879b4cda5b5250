"""What a recipe trains on, for human eyes: one example coloured by segment, and the token counts
before and after the cut.

In: a recipe and a Rich console. Out: text on that console. Decided here: the look, and that
everything can be read without colour: each run of tokens has a heading that says what it is, and
learned tokens among others stand in ⟦ ⟧. Needs the student's tokenizer and no weights; what it
shows comes from `prepare`, the same function that training uses.
"""

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from mlx_distill.backends.pair import Pair
from mlx_distill.data.account import unused_lines
from mlx_distill.data.counts import TokenCounts, TokenRun, count_tokens, token_runs
from mlx_distill.data.day import about_day, choose_day
from mlx_distill.data.prepare import Prepared, prepare
from mlx_distill.data.selection import describe
from mlx_distill.data.sequences import Segment
from mlx_distill.errors import DataError
from mlx_distill.models.hub import load_tokenizer, model_folder
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.writing.of_recipe import known_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLOURS = {Segment.PROMPT: "cyan", Segment.COT: "yellow", Segment.ANSWER: "green"}
CUT = "dim strike"
LEARNED = "bold underline"


def show(recipe: Recipe, console: Console, example: int = 1) -> None:
    """Print training example number `example` (from 1, in the run's own shuffled order) and the
    token counts of all.

    Raises `DataError` for a number that there is not, and whatever `prepare` and the tokenizer
    raise.
    """
    kept_day = [RunFolder.of(recipe).kept_day()]
    if recipe.rollouts.by == "data":
        revision = recipe.student.revision
        tokenizer = load_tokenizer(model_folder(recipe.student.model, revision, weights=False))
        prepared = prepare(recipe, tokenizer, choose_day(recipe.data, tokenizer, kept_day))
    else:
        pair = Pair.of(recipe, weights=False)
        tokenizer = pair.tokenizer
        prepared = known_sequences(pair, choose_day(recipe.data, tokenizer, kept_day))
    for note in prepared.notes:
        console.print(Text(note))
    print_example(prepared, recipe, tokenizer, console, example)
    console.print(Text(f"\n{_title(recipe)}", "bold"))
    console.print(count_table(prepared, recipe))
    console.print(account(prepared, recipe))


def print_example(
    prepared: Prepared,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerFast",
    console: Console,
    example: int,
) -> None:
    """One example as the recipe trains on it, run by run, under a legend."""
    count = len(prepared.train_whole)
    if not 1 <= example <= count:
        raise DataError(
            f"{recipe.data.source}: no training example {example}; there are 1 to {count}"
        )
    whole = prepared.train_whole[example - 1]
    console.print(Rule(f"example {example} of {count}  ·  {whole.id}", align="left"))
    console.print(_legend(console))
    runs = list(token_runs(whole, recipe))
    if not any(run.learned.any() for run in runs):
        console.print(
            Text(
                "the cut leaves this example no supervised token: it is not trained on", "bold red"
            )
        )
    for run in runs:
        console.print(_heading(run))
        console.print(_body(run, tokenizer, console), soft_wrap=True)


def count_table(prepared: Prepared, recipe: Recipe) -> Table:
    """Tokens by segment of the training examples: whole, after the cut, and those that carry loss."""
    segments = recipe.objective.segments
    before, after = (
        count_tokens(prepared.train_whole, segments),
        count_tokens(prepared.train, segments),
    )
    table = Table()
    table.add_column("segment", overflow="fold")
    for column in ("whole", "mean", "kept", "mean", "kept %", "learned", "mean", "learned %"):
        table.add_column(column, justify="right", overflow="fold")
    for segment in Segment:
        name = segment.name.lower() + (" *" if segment.name.lower() in segments else "")
        table.add_row(Text(name, COLOURS[segment]), *_cells(before, after, [segment]))
    table.add_section()
    table.add_row("all", *_cells(before, after, list(Segment)), style="bold")
    table.add_row("examples", str(before.examples), "", str(after.examples), *[""] * 5)
    table.caption = "* supervised · learned % is of the whole sequences' tokens"
    table.caption_justify = "left"
    return table


def account(prepared: Prepared, recipe: Recipe) -> Text:
    """The validation side, the rows that were not used, with reasons, and what rows carry that
    nothing reads.
    """
    lengths = [len(sequence) for sequence in prepared.validation]
    mean = f", {np.mean(lengths):,.0f} tokens each on average" if lengths else ""
    chosen = "" if recipe.data.validation_examples else " (data.validation_examples sets how many)"
    text = Text(f"validation: {len(lengths)} whole examples{mean}{chosen}\n")
    for line in prepared.about_endings():
        text.append(f"{line}\n")
    for reason, count in sorted(prepared.skipped.items(), key=lambda item: (-item[1], item[0])):
        text.append(f"not used: {count:,} × {reason}\n", "magenta")
    for line in unused_lines(prepared.unused):
        text.append(f"not used: {line}\n", "magenta")
    if not prepared.skipped and not prepared.unused:
        text.append("not used: none\n")
    if prepared.day:
        text.append(f"{about_day(prepared.day)}\n")
    return text


def _title(recipe: Recipe) -> str:
    cut, segments = recipe.truncation, " + ".join(recipe.objective.segments)
    parts = [f"learns {segments}", f"keeps {cut.keep} {cut.fraction:g} of the {cut.span}"]
    if cut.spread:
        parts[-1] += f", {cut.fraction * (1 - cut.spread):g} to {cut.fraction * (1 + cut.spread):g}"
    if cut.max_tokens:
        parts.append(f"at most {cut.max_tokens:,} tokens")
    if cut.context == "keep":
        parts.append("reads what lies before")
    if cut.token_share < 1:
        parts.append(f"a random {cut.token_share:.0%} of tokens")
    if chosen := describe(recipe.selection):
        parts.append(f"learns {chosen}")
    if cut.ending == "answer":
        parts.append("then </think> and the answer")
    if cut.whole_share:
        parts.append(f"{cut.whole_share:.0%} of examples whole")
    return ", ".join(parts)


def _cells(before: TokenCounts, after: TokenCounts, segments: list[Segment]) -> list[str]:
    whole, kept, learned = (
        int(count[segments].sum()) for count in (before.tokens, after.tokens, after.supervised)
    )
    return [
        f"{whole:,}",
        _mean(whole, before.examples),
        f"{kept:,}",
        _mean(kept, after.examples),
        _percent(kept, whole),
        f"{learned:,}",
        _mean(learned, after.examples),
        _percent(learned, whole),
    ]


def _mean(total: int, examples: int) -> str:
    return f"{total / examples:,.1f}" if examples else "–"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"


def _legend(console: Console) -> Text:
    text = Text("legend: ")
    for segment, colour in COLOURS.items():
        text.append(segment.name.lower(), colour).append("  ")
    text.append("learned", LEARNED).append("  ")
    text.append("cut", CUT)
    return (
        text if console.color_system else text.append("  (without colour: ⟦learned⟧ among others)")
    )


def _heading(run: TokenRun) -> Text:
    learned = int(run.learned.sum())
    state = (
        "CUT"
        if not run.kept
        else "kept, learned"
        if learned == len(run.tokens)
        else "kept, not learned"
    )
    if 0 < learned < len(run.tokens):
        state = f"kept, {learned:,} learned"
    if run.ending:
        state = "after the cut, learned from the text alone"
    text = f"▌{run.segment.name.lower()} · {len(run.tokens):,} tokens · {state}"
    return Text(text, f"{COLOURS[run.segment]} {'reverse' if run.kept else 'dim'}")


def _body(run: TokenRun, tokenizer: "PreTrainedTokenizerFast", console: Console) -> Text:
    colour = COLOURS[run.segment]
    text = Text()
    pieces = np.split(np.arange(len(run.tokens)), np.flatnonzero(np.diff(run.learned)) + 1)
    for piece in pieces:
        learned = bool(run.learned[piece[0]])
        mark = learned and len(pieces) > 1 and not console.color_system
        string = tokenizer.decode(
            run.tokens[piece].tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        style = CUT if not run.kept else f"{colour} {LEARNED}" if learned else colour
        text.append(f"⟦{string}⟧" if mark else string, style)
    return text[:-1] if len(text) > 1 and text.plain.endswith("\n") else text
