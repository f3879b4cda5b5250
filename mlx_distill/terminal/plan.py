"""A plan as a person sees it, before a run begins and after its memory was not enough.

In: a recipe and a machine. Out: lines and tables of at most 80 columns. Imports no framework unless
a time is asked for; what is to be measured is measured in another process. Decided here: when a run
is worth a probe, and what is said when memory is not enough.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_distill.backends import choose_backend
from mlx_distill.backends.matching import chosen_layers
from mlx_distill.backends.pair import Pair
from mlx_distill.cost.known_machines import KnownMachine, known_machine
from mlx_distill.cost.memory import PARTS
from mlx_distill.cost.plan import MEASURED, SECONDS_FACTOR, Measured, Plan, make_plan
from mlx_distill.cost.probe import ProbeFailed, Question, kept_answer, probe
from mlx_distill.data.account import unused_lines
from mlx_distill.data.day import choose_day
from mlx_distill.data.prepare import Prepared
from mlx_distill.errors import ModelError, OutOfMemory
from mlx_distill.machine import Machine, this_machine
from mlx_distill.models.config import Meaning
from mlx_distill.models.folder import read_config
from mlx_distill.models.prune import Sizes, pruned_config
from mlx_distill.pruning.choice import refuse_larger
from mlx_distill.pruning.of_recipe import PrunedBase
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.terminal.show import account, count_table
from mlx_distill.verify.tasks import tasks_of
from mlx_distill.words import amount, duration
from mlx_distill.writing.of_recipe import known_sequences

# A probe loads the models and computes about three micro-batches: a run of fewer than these is its
# own probe.
LONG_RUN = 100
MEANING = {
    "teacher": "teacher's weights and kept answers",
    "student": "student's weights",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "activations": "activations",
    "loss": "loss workspace",
    "allocator": "code and freed blocks",
}


def plan_of(
    recipe: Recipe, machine: Machine, advised: bool = True, weights: bool = False
) -> tuple[Prepared, Plan, Question]:
    """A recipe's data and its plan, from the models' configs alone, and what a probe of it asks,
    for which the weights have to be there.

    Raises `DistillError` as `prepare` and `make_plan` do.
    """

    pair = Pair.of(recipe, weights)
    pair.refuse_formats(machine.backend)
    day = choose_day(recipe.data, pair.tokenizer, [RunFolder.of(recipe).kept_day()])
    prepared = known_sequences(pair, day)
    student = pair.student
    if recipe.prune.cuts and weights:
        student = PrunedBase(pair, prepared.measured).existing()
    return prepared, *_planned(recipe, prepared, student, pair.teacher, machine, advised)


def student_config(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The config.json of the student, or of the base in `folder` with the sizes that it will have.
    Raises `ModelError` where the recipe asks for more of it than there is.
    """
    config, cut, name = read_config(folder), recipe.prune.before, recipe.student.model
    if cut.cuts or recipe.prune.thins:
        refuse_larger(recipe.prune, Sizes.of_meaning(Meaning(folder, name)), name)
    if cut.cuts:
        config = pruned_config(config, name, cut.layers, cut.channels, cut.kv_heads)
    if recipe.objective.hidden_weight and (depth := config.get("num_hidden_layers")):
        chosen_layers(recipe, depth, name)
    return config


def _planned(
    recipe: Recipe,
    prepared: Prepared,
    student: Path,
    teacher: Path | None,
    machine: Machine,
    advised: bool = True,
) -> tuple[Plan, Question]:
    """With the peak that an earlier probe measured, if one did."""
    configs = read_config(teacher) if teacher else None, student_config(recipe, student)
    made = make_plan(recipe, prepared, *configs, machine, advised)
    question = Question(recipe, student, teacher, made.costliest, machine)
    return made.with_measured(kept_answer(question)), question


def plan(
    recipe: Recipe,
    console: Console,
    backend_name: str = "auto",
    timed: bool = False,
    probed: bool = False,
) -> Plan:
    """Print what a recipe will cost; `timed` measures this machine's rate first, for which the
    backend is loaded; `probed` measures the memory of one step.

    Raises `OutOfMemory` and `ProbeFailed` after the plan is printed as far as it is known.
    """
    backend = choose_backend(backend_name) if timed else None
    machine = Machine.of(backend.device()) if backend else this_machine(backend_name)
    if recipe.eval.task:
        # a run reads it first, and refuses what it can't use
        tasks_of(recipe.eval)
    prepared, made, question = plan_of(recipe, machine, weights=probed)
    trouble: OutOfMemory | ProbeFailed | None = None
    if probed and not made.measured:
        try:
            made = made.with_measured(probe(question))
        except OutOfMemory as error:
            trouble = OutOfMemory(f"{error}; {_shortage(question, prepared)}")
        except ProbeFailed as error:
            trouble = error
    _print(prepared, made, machine, recipe, console)
    if backend:
        console.print(_time_text(made, backend.self_test().matmul_rate(), machine))
    if trouble:
        raise trouble
    return made


def plan_elsewhere(recipe: Recipe, console: Console, name: str) -> Plan:
    """Print what a recipe will cost on the machine of this name, by what its maker states.

    Raises `DistillError` for a name that is not known.
    """
    known = known_machine(name)
    prepared, made, _ = plan_of(recipe, known.machine)
    _print(prepared, made, known.machine, recipe, console)
    console.print(Text(_time_at_least(made, known)))
    return made


def _print(
    prepared: Prepared, made: Plan, machine: Machine, recipe: Recipe, console: Console
) -> None:
    console.print(count_table(prepared, recipe))
    console.print(account(prepared, recipe))
    for note in prepared.notes:
        console.print(Text(note))
    for renderable in render(made, machine, recipe):
        console.print(renderable)


def announce(
    recipe: Recipe,
    prepared: Prepared,
    student: Path,
    teacher: Path | None,
    machine: Machine,
    say: Callable[[str], None],
    force: bool = False,
    ranks: int = 1,
) -> None:
    """Say a run's plan in two lines before it begins; raises `OutOfMemory` where it cannot fit,
    unless `force`. Before a first long run on a GPU one step is measured.

    A model whose cost cannot be planned is said and no reason to refuse. Several ranks share what a
    plan counts for one.
    """
    try:
        made, question = _planned(recipe, prepared, student, teacher, machine)
    except ModelError as error:
        say(f"plan: {error}")
        return
    alone = ranks == 1 and not force
    if alone and not made.measured and machine.device != "cpu" and made.micro_batches >= LONG_RUN:
        made = made.with_measured(_probed(question, prepared, say))
    for line in made.lines():
        say(line)
    if prepared.unused:
        say(f"not used: {', '.join(unused_lines(prepared.unused))}")
    if ranks > 1:
        say(
            f"plan: its memory is that of one process; {ranks} ranks share weights, gradients and "
            "optimizer state"
        )
    elif not force:
        made.check()


def _probed(question: Question, prepared: Prepared, say: Callable[[str], None]) -> Measured | None:
    """What a probe measures before a run, None where it fails for another reason than memory."""
    say("plan: the memory of one step is measured first, once for these shapes")
    try:
        return probe(question)
    except ProbeFailed as error:
        say(f"plan: {error}")
        return None
    except OutOfMemory as error:
        advice = _shortage(question, prepared)
        raise OutOfMemory(f"{error}; {advice}; --force runs all the same") from None


def _shortage(question: Question, prepared: Prepared) -> str:
    folders = question.student, question.teacher
    return shortage(question.recipe, prepared, *folders, question.machine)


def shortage(
    recipe: Recipe, prepared: Prepared, student: Path, teacher: Path | None, machine: Machine
) -> str:
    """What the plan expected of a run that has just run out of memory, and what to lower: what
    saves most first.
    """
    try:
        expected, _ = _planned(recipe, prepared, student, teacher, machine)
        peak = expected.peak.total
        less = int(0.8 * min(peak, machine.memory_bytes or peak))
        configs = read_config(teacher) if teacher else None, student_config(recipe, student)
        tight = make_plan(recipe, prepared, *configs, replace(machine, memory_bytes=less))
    except ModelError:
        return (
            "lower batch.micro_batch_size or truncation.max_tokens, or set "
            "student.gradient_checkpointing=true"
        )
    saves = (
        f"{change.what} (saves {amount(peak - change.peak_bytes, 'B')})"
        for change in (tight.advice.changes[:3] if tight.advice else ())
    )
    return f"planned was {expected.verdict()}; set {', or '.join(saves)}"


def render(plan: Plan, machine: Machine, recipe: Recipe) -> Iterator[Table | Text]:
    """The plan at most 80 columns wide."""
    yield Text(
        f"{plan.work.steps:,} steps of {plan.global_batch_size} examples in micro-batches of "
        f"{plan.micro_batch_size} × up to {plan.work.longest:,} tokens:\n"
        f"{plan.work.tokens_read:,} tokens are read, {plan.work.loss_tokens:,} carry loss"
    )
    if endings := int(plan.work.endings.sum()):
        yield Text(f"{endings:,} of them follow a cut, and learn from the text alone")
    yield _flops_table(plan)
    yield _memory_table(plan)
    yield Text(
        f"disk: {plan.checkpoints} checkpoints of {amount(plan.checkpoint_bytes, 'B')} and a "
        f"student of {amount(plan.student_bytes, 'B')}, "
        + (f"a teacher cache of {amount(plan.cache_bytes, 'B')}, " if plan.cache_bytes else "")
        + f"{amount(plan.disk_bytes, 'B')} at most"
    )
    yield Text(
        f"{machine.backend} on {machine.device}, "
        f"{recipe.student.compute_dtype.replace('auto', machine.dtype)}; {machine.limit}"
    )
    yield Text(plan.verdict(), "bold" if plan.fits else "bold red")
    if advice := plan.advice_lines():
        yield Text("\n".join(f"- {line}" for line in advice))


def _flops_table(plan: Plan) -> Table:
    table = Table()
    table.add_column("arithmetic")
    for column in ("FLOP", "%"):
        table.add_column(column, justify="right")
    for part, value in plan.flops.items():
        table.add_row(part, amount(value), f"{100 * value / plan.total_flops:.1f}")
    table.add_section()
    table.add_row("all", amount(plan.total_flops), "", style="bold")
    return table


def _memory_table(plan: Plan) -> Table:
    """The parts at the peak, and the largest each of them is at any moment."""
    peak, table = plan.peak, Table()
    table.add_column("memory, estimated")
    for column in (f"at the peak ({peak.name})", "at most"):
        table.add_column(column, justify="right")
    for part in PARTS:
        most = max(getattr(moment, part) for moment in plan.moments)
        if most or part != "allocator":
            table.add_row(MEANING[part], amount(getattr(peak, part), "B"), amount(most, "B"))
    table.add_section()
    table.add_row("all", amount(peak.total, "B"), "", style="bold")
    if plan.measured:
        table.add_row(MEASURED, amount(plan.peak_bytes, "B"), "", style="bold")
    return table


def _time_at_least(plan: Plan, known: KnownMachine) -> str:
    """By the rate that a maker states of products that do nothing else."""
    stated = f"{known.name}: {known.stated()} ({known.source})"
    if not known.rate:
        return f"{stated}; how long a run takes there is not known: `plan --time` on it says so"
    seconds = plan.total_flops / known.rate
    least = duration(seconds) if seconds >= 1 else "a moment"
    slower = ", ".join(f"{factor:g} on {name}" for name, factor in SECONDS_FACTOR.items())
    return (
        f"{stated}\nat least {least} of training, if it did nothing but products at that rate; on "
        f"CPUs a step takes so many times as long: {slower}. Nobody timed one there"
    )


def _time_text(plan: Plan, rate: float, machine: Machine) -> Text:
    return Text(
        f"about {duration(plan.seconds(rate, machine.backend))} of training: an estimate from "
        f"{rate / 1e9:,.0f} GFLOP/s measured in {machine.dtype}, of which a step reaches "
        f"1/{SECONDS_FACTOR[machine.backend]:g}"
        + ("" if machine.device == "cpu" else " on a CPU; not measured on this device")
    )
