"""Channels and heads that go while a student trains, a few at a time.

In: `[prune]` with rounds, the student's base, the run's sequences, its number of steps. Out: cuts at
some steps, and the exported folder without what went. Decided here: when how much goes. After round
r of R final + (all - final) (1 - r/R)^3 stay (Zhu and Gupta 2017, arXiv 1710.01878), those that are
the most active on some training examples at that time.

Until the export a part that went is zeros, in the weights and in what the optimizer remembers of
them. It gives nothing, so no gradient reaches it, and it stays zeros: a checkpoint holds all that a
run has to know, and a cut is a function of the weights before it. What it costs is time: a step
computes the zeros.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mlx_distill.backends.pair import Pair
from mlx_distill.backends.protocol import Backend, Student
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import RecipeError
from mlx_distill.models.config import Meaning
from mlx_distill.models.prune import Kept, Sizes, prune, refuse_unknown
from mlx_distill.pruning.choice import chosen, refuse_larger
from mlx_distill.recipe.tables import PruneTable


class Thinning:
    """The cuts of one run; `last` is the step before which the last one is made, counted from 0."""

    def __init__(
        self, pair: Pair, sequences: Sequence[TokenSequence], steps: int, backend: Backend
    ):
        """Raises `RecipeError`, and `ModelError` for a base that cannot be narrowed."""
        self.table, self.name = pair.recipe.prune, pair.recipe.student.model
        if backend.ranks.size > 1:
            raise RecipeError(
                f"[prune] rounds = {self.table.rounds} on {backend.ranks.size} ranks: one process "
                "cuts while it trains; use one, or set rounds = 0"
            )
        self.sizes = Sizes.of_meaning(Meaning(pair.student, self.name))
        refuse_larger(self.table, self.sizes, self.name)
        blocks = tuple(range(self.sizes.layers))
        channels, kv_heads = np.arange(self.table.channels), np.arange(self.table.kv_heads)
        some = Kept(
            blocks,
            dict.fromkeys(blocks, channels) if len(channels) else {},
            dict.fromkeys(blocks, kv_heads) if len(kv_heads) else {},
        )
        refuse_unknown(pair.student, some, self.name)
        self.texts = [one.tokens for one in sequences[: self.table.examples]]
        rounds, end = self.table.rounds, self.table.until * steps
        self._rounds = {
            min(round(end * number / rounds), steps - 1): number for number in range(1, rounds + 1)
        }  # the step before which it is made → round
        self.last = max(self._rounds)

    @property
    def words(self) -> str:
        """For a person: what goes, and when."""
        parts = [
            f"{there} to {stay} {what}"
            for there, stay, what in (
                (self.sizes.channels, self.table.channels, "MLP channels"),
                (self.sizes.kv_heads, self.table.kv_heads, "key-value heads"),
            )
            if stay
        ]
        count = len(self._rounds)
        return (
            f"pruning while it trains: from {' and from '.join(parts)} of each block, in {count} "
            f"{'cut' if count == 1 else 'cuts'}, the last one after step {self.last}"
        )

    def cut(self, student: Student, step: int, say: Callable[[str], None]) -> None:
        """What is due before step `step`, counted from 0."""
        if number := self._rounds.get(step):
            kept = self._chosen(student, self._after(number))
            student.keep(kept, self.sizes)
            parts = [
                f"{len(places[0])} {what}"
                for places, what in ((kept.channels, "channels"), (kept.kv_heads, "heads"))
                if places
            ]
            say(f"after step {step} {' and '.join(parts)} of each block stay")

    def _after(self, number: int) -> PruneTable:
        """What is to stay after a round."""
        left = (1 - number / self.table.rounds) ** 3

        def stay(final: int, there: int) -> int:
            return final and final + round((there - final) * left)

        channels = stay(self.table.channels, self.sizes.channels)
        kv_heads = stay(self.table.kv_heads, self.sizes.kv_heads)
        return PruneTable(channels=channels, kv_heads=kv_heads)

    def _chosen(self, student: Student, table: PruneTable) -> Kept:
        """The most active parts; what went before does nothing, so that it is not among them."""
        return chosen(table, self.sizes, student.activations(self.texts, self.sizes.head_dim))

    def export(self, student: Student, stop_ids: list[int], folder: Path | None) -> None:
        """The student without what went, in an existing folder."""
        assert folder is not None  # of one process
        whole, cut = folder / "whole", folder / "cut"
        whole.mkdir()
        student.export(whole, stop_ids)
        prune(whole, cut, self._chosen(student, self._after(self.table.rounds)), self.name)
        for file in sorted(cut.iterdir()):
            file.rename(folder / file.name)
        shutil.rmtree(whole)
        cut.rmdir()
