"""Steps over texts that the student itself writes again as it learns.

In: an order, what it counts (an answer to be written, or a sequence of the data's), and a way to
ask the student. Out: a source of steps. Decided here: every `every` steps the student, as it then
is, writes what these steps will take and no more. The texts of a step are kept where they were
written, so a run that is continued repeats the one that was stopped.
"""

from collections.abc import Callable, Iterable, Sequence

from mlx_distill.data.batches import EVERY_TOKEN, Order, Step, make_step
from mlx_distill.data.selection import select_known
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DataError
from mlx_distill.recipe.training_tables import BatchTable, SelectionTable
from mlx_distill.writing.texts import Asked

Ask = Callable[[list[Asked], int], dict[Asked, TokenSequence]]


class RewrittenSteps:
    """`ask(asked, step)` gives the sequences of texts, cut, as the student writes them after so many
    steps.
    """

    def __init__(
        self,
        order: Order,
        units: Sequence[Asked | TokenSequence],
        every: int,
        ask: Ask,
        segments: tuple[str, ...],
        batch: BatchTable,
        endings: bool,
        selection: SelectionTable = EVERY_TOKEN,
        seed: int = 0,
    ):
        self._order, self._units, self._every, self._ask = order, units, every, ask
        self._segments, self._batch, self._endings = segments, batch, endings
        self._selection, self._seed = selection, seed
        self._begun, self._texts = -1, dict[Asked, TokenSequence]()

    def __len__(self) -> int:
        return len(self._order)

    def step(self, index: int) -> Step:
        """Step `index`; the first one of a window asks the student. Raises `DataError` where nothing
        that was written has a token to learn.
        """
        begin = index - index % self._every
        if begin != self._begun:
            self._texts = self._ask(self._asked(begin), begin)
            self._begun = begin
        taken = list(self._sequences(index))
        segments, selection = self._segments, self._selection
        step = make_step(index, taken, segments, self._batch, self._endings, selection)
        if not step.loss_tokens:
            raise DataError(
                f"step {index + 1}: none of the texts that the student wrote has a token of "
                f"{' + '.join(self._segments)} left after the cut: raise rollouts.max_new_tokens, "
                "or supervise the chain of thought"
            )
        return step

    def _asked(self, begin: int) -> list[Asked]:
        """What the steps from `begin` to the next writing take, each once."""
        steps = range(begin, min(begin + self._every, len(self)))
        units = (self._units[row] for step in steps for row in self._order.of_step(step))
        return list(dict.fromkeys(unit for unit in units if isinstance(unit, Asked)))

    def _sequences(self, index: int) -> Iterable[TokenSequence]:
        """What a step learns of each unit that it takes."""
        rows, epochs = self._order.of_step(index), self._order.epochs_of_step(index)
        for row, epoch in zip(rows, epochs, strict=True):
            unit = self._units[row]
            sequence = self._texts[unit] if isinstance(unit, Asked) else unit
            yield select_known(sequence, self._segments, self._selection, self._seed, epoch)
