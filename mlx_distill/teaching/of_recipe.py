"""The teacher cache that a recipe names: where it lies, and how it comes to hold what a run asks.

In: a recipe's models, and the day that its prompts say. Out: a `TeacherCache`, empty or not.
Decided here: which fields a recipe asks for.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, LiveTeacher
from mlx_distill.cost.dense import Dense
from mlx_distill.cost.kept_answers import NOTHING, Kept, kept_answers
from mlx_distill.data.prepare import Prepared
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import ModelError
from mlx_distill.machine import Machine
from mlx_distill.models.folder import read_config
from mlx_distill.models.hub import model_fingerprint
from mlx_distill.models.reading import reading_of
from mlx_distill.models.vocabulary import head_rows
from mlx_distill.teaching.fields import CacheFields
from mlx_distill.teaching.fill import fill
from mlx_distill.teaching.folder import TeacherCache, dates_of
from mlx_distill.view import View


def cache_of(pair: Pair, day: str) -> TeacherCache:
    """The cache as it is."""
    return TeacherCache(_root(pair), _fields(pair, day))


def days_of(pair: Pair) -> Iterable[str]:
    """The days of the caches that differ from the recipe's in nothing else."""
    return [] if pair.recipe.teacher.cache == "off" else dates_of(_root(pair), _fields(pair))


def asked_of_teacher(prepared: Prepared) -> tuple[TokenSequence, ...]:
    """All that a run may ask the teacher about."""
    return (*prepared.train_whole, *prepared.validation)


def kept_in_memory(pair: Pair, prepared: Prepared, backend: Backend) -> Kept:
    """Which of a live teacher's answers a run keeps; none where its sizes are not known."""
    if not pair.teacher:
        return NOTHING
    try:
        teacher = Dense.of(read_config(pair.teacher), pair.recipe.teacher.model)
    except ModelError:
        return NOTHING
    machine, ranks = Machine.of(backend.device()), backend.ranks.size
    return kept_answers(pair.recipe, prepared, teacher, machine, ranks)


def filled(
    pair: Pair,
    day: str,
    sequences: Sequence[TokenSequence],
    load: Callable[[], LiveTeacher],
    backend: Backend,
    made: dict,
    view: View,
) -> TeacherCache:
    """The cache, after the teacher was asked for what it lacked; arguments as for `fill`."""
    cache, made = cache_of(pair, day), {"teacher": pair.recipe.teacher.model, **made}
    fill(cache, sequences, load, backend, pair.recipe.batch, made, view.say, view.count)
    backend.release()
    examples, tokens, size = cache.size()
    view.say(
        f"teacher cache {cache.path}: {examples:,} sequences, {tokens:,} tokens, "
        f"{size / 1e6:,.1f} MB"
    )
    return cache


def _root(pair: Pair) -> Path:
    return Path(pair.recipe.teacher.cache_folder).expanduser()


def _fields(pair: Pair, day: str = "") -> CacheFields:
    teacher, tokenizer = pair.named_teacher()
    table, teacher_rows = pair.recipe.teacher, _head_rows(teacher)
    rows = pair.common_rows(teacher_rows, _head_rows(pair.student))
    return CacheFields.of(
        table,
        model_fingerprint(teacher),
        tokenizer.get_vocab(),
        teacher_rows if table.cache == "hidden" else rows,
        day,
        reading_of(teacher),
        **pair.asked_dtype("teacher"),
    )


def _head_rows(folder: Path) -> int:
    if rows := head_rows(folder):
        return rows
    raise ModelError(
        f"{folder / 'config.json'} has no vocab_size, which a teacher cache needs: set "
        'teacher.cache = "off"'
    )
