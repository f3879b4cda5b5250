"""Which of a teacher's answers a run keeps in memory, and how much that takes.

In: a recipe, its sequences, the teacher's config. Out: the sequences, and bytes. Decided here: kept
is what is asked about more than once, hidden states of all its tokens, where these take no more
than a twentieth of the machine's memory. That is memory of the host, which does not change between
a run and its continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.cost.dense import DTYPE_BYTES, FLOAT, Dense
from mlx_distill.data.prepare import Prepared
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.machine import Machine, total_memory_bytes
from mlx_distill.recipe.recipe import Recipe

SHARE = 1 / 20


@dataclass(frozen=True)
class Kept:
    """Sequences whose answers are kept; `training`: those that are trained on are among them."""

    sequences: tuple[TokenSequence, ...] = ()
    training: bool = False
    bytes: int = 0


NOTHING = Kept()


def kept_answers(
    recipe: Recipe, prepared: Prepared, teacher: Dense | None, machine: Machine, ranks: int = 1
) -> Kept:
    """What a run keeps of a live teacher. Several ranks keep nothing: they ask together."""
    table, objective = recipe.teacher, recipe.objective
    if teacher is None or ranks > 1 or table.cache != "off" or table.keep_answers == "off":
        return NOTHING
    if objective.hidden_weight or recipe.rollouts.refresh_every:
        return NOTHING
    sequences: Sequence[TokenSequence] = prepared.validation  # before training and after it
    training = objective.kd_weight > 0 and _reads_again(recipe, len(prepared.train))
    if training:
        sequences = (*prepared.train, *sequences)
    stored = DTYPE_BYTES.get(teacher.stored, FLOAT)
    number = FLOAT if machine.dtype == "float32" else stored
    size = sum(map(len, sequences)) * teacher.shape.width * number
    if not 0 < size <= SHARE * total_memory_bytes():
        return NOTHING
    return Kept(tuple(sequences), training, size)


def _reads_again(recipe: Recipe, examples: int) -> bool:
    """Whether training reads each example twice at least."""
    read = recipe.optim.steps * recipe.batch.global_batch_size or recipe.optim.epochs * examples
    return read >= 2 * examples
