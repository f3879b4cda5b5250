"""Which settings of a recipe make no sense together.

In: a recipe whose fields are each well formed. Out: for every contradiction one line that names the
fields, what was found and what to change. Only what the recipe itself says is judged; no file is
looked for.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_distill import readers
from mlx_distill.errors import RecipeError

if TYPE_CHECKING:
    from mlx_distill.recipe.recipe import Recipe

LONGEST_NAME = 200  # bytes of a run's name; the files beside its folder have longer ones


def contradictions(recipe: "Recipe") -> Iterator[str]:
    """The lines of all contradictions, the ones to mend first in front."""
    teacher, objective, truncation = recipe.teacher, recipe.objective, recipe.truncation
    batch, run, scoring = recipe.batch, recipe.run, recipe.eval
    student = recipe.student
    yield from _prune_contradictions(recipe)
    if not student.from_teacher and not student.model:
        yield (
            f"[student] model is empty: {_lines('student', 'model')}, a hub id, a folder, a "
            ".gguf, or recipes/cot50.toml's toy embedded:student"
        )
    yield from _wrong_paths(recipe)
    if not recipe.data.source:
        yield (
            f"[data] source is empty: {_lines('data', 'source')}, a file, a hub dataset, or "
            "recipes/cot50.toml's toy embedded:dial"
        )
    if not teacher.model and objective.kd_weight > 0:
        yield (
            f"[teacher] model is empty but [objective] kd_weight is {objective.kd_weight}: "
            f"{_lines('teacher', 'model')}, a hub id, a folder, a .gguf, or recipes/cot50.toml's "
            "toy embedded:teacher; or set kd_weight = 0"
        )
    yield from cache_contradictions(recipe, teacher.cache)
    if objective.divergence == "dkd" and not (objective.dkd_target or objective.dkd_rest):
        yield (
            '[objective] divergence = "dkd" with dkd_target = 0 and dkd_rest = 0 teaches nothing: '
            "raise one"
        )
    if objective.hidden_weight and objective.kd_weight == 0:
        yield (
            f"[objective] hidden_weight = {objective.hidden_weight} asks the teacher, but kd_weight "
            "= 0 asks none: raise it, or set hidden_weight = 0"
        )
    if objective.hidden_weight and teacher.cache != "off":
        yield (
            f"[objective] hidden_weight = {objective.hidden_weight} compares states of layers, of "
            f'which no cache holds any: set [teacher] cache = "off" (found "{teacher.cache}"), or '
            "hidden_weight = 0"
        )
    if student.quantize_aware_bits and student.gradient_checkpointing:
        yield (
            f"[student] quantize_aware_bits = {student.quantize_aware_bits} rounds weights for one "
            "pass, which gradient_checkpointing would compute again without: set one of them off"
        )
    yield from _schedule_free_contradictions(recipe)
    yield from _rollouts_contradictions(recipe)
    yield from _selection_contradictions(recipe)
    if truncation.keep == "cot" and truncation.fraction != 1:
        yield (
            '[truncation] keep = "cot" cuts after </think> and takes no fraction, found '
            f"{truncation.fraction}: set fraction = 1.0"
        )
    if truncation.fraction * (1 + truncation.spread) > 1:
        yield (
            f"[truncation] fraction = {truncation.fraction:g} and spread = {truncation.spread:g} draw "
            f"fractions up to {truncation.fraction * (1 + truncation.spread):g}, more than all: "
            "lower one of them"
        )
    if batch.micro_batch_size > batch.global_batch_size:
        yield (
            f"[batch] micro_batch_size {batch.micro_batch_size} exceeds global_batch_size "
            f"{batch.global_batch_size}: lower the first or raise the second"
        )
    if run.export == "best" and run.keep_checkpoints == "last":
        yield (
            '[run] export = "best" needs the best checkpoint, but keep_checkpoints = "last" drops '
            'it: set export = "last" or keep_checkpoints = "last_and_best"'
        )
    if recipe.data.compat == "paper" and recipe.rollouts.by != "data":
        yield (
            '[data] compat = "paper" renders what the data says, but [rollouts] by = '
            f'"{recipe.rollouts.by}" lets a model write: set compat = "none"'
        )
    if scoring.prompt and "{problem}" not in scoring.prompt:
        yield (
            f"[eval] prompt has no place for the problem, found {scoring.prompt[:60]!r}: write "
            "{problem} where it belongs"
        )
    if scoring.also and not scoring.task:
        yield "[eval] also names more tasks, but task is empty: name the first one there"
    if scoring.task in scoring.also:
        yield (
            f"[eval] task and also name {scoring.task!r} twice, which would be scored twice: drop one"
        )
    if scoring.samples > 1 and scoring.temperature == 0:
        yield (
            f"[eval] samples = {scoring.samples} at temperature 0 would repeat one greedy answer: "
            "raise temperature"
        )


def _lines(table: str, field: str) -> str:
    return f'add the two lines [{table}] and {field} = "NAME"'


def _prune_contradictions(recipe: "Recipe") -> Iterator[str]:
    """What cannot be cut, or would cut nothing."""
    student, teacher, cut = recipe.student, recipe.teacher, recipe.prune
    named = "model" in student.model_fields_set
    if student.from_teacher and named and student.model != teacher.model:
        yield (
            f'[student] from_teacher = true begins as the teacher, but model = "{student.model}": '
            "remove one of the two"
        )
    if student.from_teacher and not teacher.model:
        yield "[student] from_teacher = true, but [teacher] model is empty: name a teacher"
    if student.from_teacher and not (cut.cuts or cut.thins):
        yield (
            "[student] from_teacher = true and nothing to prune would distil a model into itself: "
            "set [prune] layers, channels or kv_heads"
        )
    if cut.rounds and not cut.thins:
        yield (
            f"[prune] rounds = {cut.rounds} cuts channels and heads while the student trains, but "
            "neither is set: set channels or kv_heads, or rounds = 0"
        )
    if cut.thins and (student.tuning != "full" or student.quantize_aware_bits):
        found = (
            f'tuning = "{student.tuning}"'
            if student.tuning != "full"
            else f"quantize_aware_bits = {student.quantize_aware_bits}"
        )
        yield (
            f"[prune] rounds = {cut.rounds} cuts weights that train as they are, but [student] "
            f"{found}: set rounds = 0, which cuts before training"
        )
    if cut.cuts and not cut.folder:
        yield "[prune] needs a place for the pruned model, but folder is empty: name one"
    if cut.cuts and recipe.rollouts.by == "student" and not recipe.rollouts.refresh_every:
        yield (
            '[rollouts] by = "student" lets the base write once, but [prune] cuts it first: name '
            "the folder that `mlx-distill prune` made as [student] model, or set refresh_every"
        )


def _schedule_free_contradictions(recipe: "Recipe") -> Iterator[str]:
    """What averages take the place of, and what there would be no average with."""
    optim = recipe.optim
    if not optim.schedule_free:
        return
    asked = f'[optim] optimizer = "{optim.optimizer}"'
    if optim.schedule != "constant" and "schedule" in optim.model_fields_set:
        yield (
            f"{asked} averages instead of letting the rate fall, but schedule = "
            f'"{optim.schedule}": set "constant", whose warmup it keeps'
        )
    if optim.beta1 == 0:
        yield f"{asked} trains at a mean that beta1 weighs, but beta1 is 0: set it near 0.9"


def _rollouts_contradictions(recipe: "Recipe") -> Iterator[str]:
    """What cannot be written, or would not be learned."""
    rollouts, asked = recipe.rollouts, f'[rollouts] by = "{recipe.rollouts.by}"'
    if recipe.data.format == "prompts" and (rollouts.by == "data" or rollouts.share < 1):
        yield (
            '[data] format = "prompts" has nothing to learn from until a model answers all of its '
            'prompts: set [rollouts] by = "teacher" or "student", and share = 1.0'
        )
    if rollouts.by == "data":
        return
    if not rollouts.folder:
        yield f"{asked} needs a place for its texts, but folder is empty: name one"
    if rollouts.by == "teacher" and not recipe.teacher.model:
        yield f"{asked}, but [teacher] model is empty: name a teacher"
    if rollouts.samples > 1 and rollouts.temperature == 0:
        yield (
            f"[rollouts] samples = {rollouts.samples} at temperature 0 would repeat one greedy "
            "text: raise temperature"
        )
    if rollouts.weigh == "pass_rate" and rollouts.samples == 1:
        yield (
            '[rollouts] weigh = "pass_rate" compares several texts a prompt, samples is 1: '
            'raise it, or set weigh = "none"'
        )
    if rollouts.weigh == "pass_rate" and rollouts.share < 1:
        yield (
            '[rollouts] weigh = "pass_rate" weighs written texts, which the data\'s own have no '
            "rate for: set share = 1.0"
        )
    for field, value in (("keep", "all"), ("weigh", "none")):
        if rollouts.refresh_every and getattr(rollouts, field) != value:
            yield (
                f'[rollouts] {field} = "{getattr(rollouts, field)}" chooses among texts before '
                f"training, but with refresh_every = {rollouts.refresh_every} the steps are "
                f'counted before their texts are written: set {field} = "{value}", or '
                "refresh_every = 0"
            )
    if rollouts.refresh_every and recipe.teacher.cache != "off":
        yield (
            f"[rollouts] refresh_every = {rollouts.refresh_every} writes texts that no teacher "
            'cache holds: set [teacher] cache = "off", or refresh_every = 0'
        )


def _selection_contradictions(recipe: "Recipe") -> Iterator[str]:
    """What no token can be chosen by."""
    selection = recipe.selection
    if selection.share == 1:
        return
    asked = f'[selection] by = "{selection.by}"'
    if selection.by in ("teacher_entropy", "divergence") and recipe.objective.kd_weight == 0:
        yield (
            f"{asked} asks the teacher, but [objective] kd_weight = 0 asks none: raise it, or set "
            'by = "student_entropy" or "random"'
        )
    if selection.by == "position" and selection.position_weight == "flat":
        yield (
            f'{asked} takes the tokens that weigh most, but position_weight = "flat" weighs all '
            'the same: set "rising" for the last ones or "falling" for the first'
        )


def cache_contradictions(recipe: "Recipe", kind: str) -> Iterator[str]:
    """What a cache of this kind cannot serve: it holds answers for whole sequences, at temperature
    1.
    """
    objective, truncation = recipe.objective, recipe.truncation
    if kind == "off":
        return
    asked = f'[teacher] cache = "{kind}"'
    if not recipe.teacher.cache_folder:
        yield f"{asked} needs a place, but cache_folder is empty: name a folder"
    if objective.kd_weight == 0:
        yield (
            f"{asked} keeps a teacher's answers, but [objective] kd_weight = 0 uses none: set "
            'cache = "off"'
        )
    if truncation.cuts and truncation.keep in ("suffix", "middle") and truncation.context == "drop":
        yield (
            f"{asked} holds answers to whole sequences, but [truncation] keep = "
            f'"{truncation.keep}" drops the context and asks others: '
            'set context = "keep", keep = "prefix", or cache = "off"'
        )
    if kind in ("top_k", "sampled") and objective.temperature != 1:
        yield (
            f"{asked} holds answers at temperature 1, but [objective] temperature is "
            f'{objective.temperature}: set 1.0, or cache = "hidden"'
        )
    if kind == "top_k" and objective.divergence == "tvd" and objective.tvd_scale == "log":
        yield (
            f'{asked} knows some ids a token, but [objective] tvd_scale = "log" counts every id '
            'of the vocabulary the same: set tvd_scale = "linear", or cache = "hidden"'
        )
    if kind == "sampled" and objective.divergence != "forward_kl":
        yield (
            f"{asked} is unbiased for forward_kl alone, but [objective] divergence is "
            f'"{objective.divergence}": set forward_kl, or cache = "top_k"'
        )


def cache_serves(recipe: "Recipe", kind: str) -> bool:
    """Whether a teacher's kept answers of this kind can train a recipe that now asks the teacher
    itself.
    """
    return not any(cache_contradictions(recipe, kind))


def _wrong_paths(recipe: "Recipe") -> Iterator[str]:
    """What no file can be called, before anything is looked for."""
    paths = {
        "[teacher] model": recipe.teacher.model,
        "[teacher] cache_folder": recipe.teacher.cache_folder,
        "[student] model": recipe.student.model,
        "[data] source": recipe.data.source,
        "[rollouts] folder": recipe.rollouts.folder,
        "[run] folder": recipe.run.folder,
        "[eval] task": recipe.eval.task.partition(":")[2],
    }
    named = [*paths.items(), *(("[eval] compare", name) for name in recipe.eval.compare)]
    for field, text in named:
        try:
            readers.path_of(text, field)
        except RecipeError as error:
            yield str(error)
    if wrong := wrong_name(recipe.run.name):
        yield wrong


def wrong_name(name: str) -> str:
    """Why a run cannot be called so; "" where it can."""
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return (
            f"[run] name {name[:60]!r} is not the plain name of a folder; run.folder says "
            "where it lies"
        )
    size = len(name.encode())
    if size > LONGEST_NAME:
        return f"[run] name has {size} bytes ({name[:20]}…), a run's can have {LONGEST_NAME}"
    return ""
