"""Teacher and student of a recipe, as far as their files say it without their weights.

In: a recipe. Out: a `Pair` of folders and tokenizers. Decided here: which models cannot be teacher
and student, which is refused before any weight is read.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.backends import refusals
from mlx_distill.backends.packed import packed_by_bitsandbytes, refuse_packed, stored_bits
from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config
from mlx_distill.models.hub import load_tokenizer, model_folder
from mlx_distill.models.ranges import refuse_impossible
from mlx_distill.models.vocabulary import common_rows, head_rows
from mlx_distill.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Pair:
    """The two models' folders and tokenizers; the teacher's are None for a recipe without one."""

    recipe: Recipe
    student: Path
    teacher: Path | None
    tokenizer: "PreTrainedTokenizerFast"
    teacher_tokenizer: "PreTrainedTokenizerFast | None"

    @classmethod
    def of(cls, recipe: Recipe, weights: bool = True) -> "Pair":
        """The models of a recipe, their weights too where they have to be fetched. Raises
        `ModelError` for two that cannot be teacher and student.
        """
        named = recipe.teacher
        student = model_folder(recipe.student.model, recipe.student.revision, weights=weights)
        teacher = (
            model_folder(named.model, named.revision, weights=weights) if named.model else None
        )
        tokenizer = load_tokenizer(student)
        _refuse_configs(recipe, student, teacher)
        theirs = tokenizer if teacher == student else teacher and load_tokenizer(teacher)
        pair = cls(recipe, student, teacher, tokenizer, theirs)
        if teacher:
            pair.common_rows(*(head_rows(path) or sys.maxsize for path in (teacher, student)))
        return pair

    def refuse_formats(self, backend: str) -> None:
        """Raise `ModelError`, before anything is prepared, for bitsandbytes' format on MLX."""
        if backend != "mlx":
            return
        for role, name, folder in self.models():
            if getattr(self.recipe, role).quantize_bits == "nf4":
                raise refusals.nf4_on_mlx(name, f"{role}.quantize_bits")
            if packed_by_bitsandbytes(read_config(folder, name)):
                raise refusals.nf4_on_mlx(name)

    def models(self) -> Iterator[tuple[str, str, Path]]:
        """(role, name in the recipe, folder) of each."""
        yield "student", self.recipe.student.model, self.student
        if self.teacher:
            yield "teacher", self.recipe.teacher.model, self.teacher

    def common_rows(self, teacher_rows: int, student_rows: int) -> int:
        """Rows of both heads that the loss compares; raises `ModelError`, naming both models, as
        `models.vocabulary.common_rows` does.
        """
        _, tokenizer = self.named_teacher()
        theirs, ours = tokenizer.get_vocab(), self.tokenizer.get_vocab()
        try:
            return common_rows(theirs, ours, teacher_rows, student_rows)
        except ModelError as error:
            names = f"{self.recipe.teacher.model} cannot teach {self.recipe.student.model}"
            raise ModelError(f"{names}: {error}") from None

    def asked_dtype(self, model: str) -> dict[str, str]:
        """The number format that the recipe asks of the "teacher", or else of the student and its
        base, as a field of what is kept of them. It is missing where the device chooses, for that
        keeps the names of what was made before formats could be asked for.
        """
        table = self.recipe.teacher if model == "teacher" else self.recipe.student
        return {} if table.compute_dtype == "auto" else {"compute_dtype": table.compute_dtype}

    def named_teacher(self) -> "tuple[Path, PreTrainedTokenizerFast]":
        """Folder and tokenizer of the teacher, where the recipe names one."""
        assert self.teacher is not None and self.teacher_tokenizer is not None
        return self.teacher, self.teacher_tokenizer


def _refuse_configs(recipe: Recipe, student: Path, teacher: Path | None) -> None:
    name = recipe.student.model
    config = read_config(student, name)
    refuse_impossible(config, f"{name}: {student / 'config.json'}")
    theirs = read_config(teacher, recipe.teacher.model) if teacher else {}
    if teacher:
        refuse_impossible(theirs, f"{recipe.teacher.model}: {teacher / 'config.json'}")
    refuse_packed(config, recipe.student, name)
    if recipe.teacher.quantize_bits and (bits := stored_bits(theirs)):
        raise refusals.quantised_already(recipe.teacher.model, recipe.teacher.quantize_bits, bits)
