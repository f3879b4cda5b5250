"""Whether two models can be teacher and student, as far as their files say it without their
weights.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.backends import refusals
from mlx_distill.models.folder import read_config
from mlx_distill.models.hub import load_tokenizer
from mlx_distill.models.ranges import refuse_impossible
from mlx_distill.models.vocabulary import common_rows, head_rows
from mlx_distill.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def refuse_pair(
    recipe: Recipe, teacher: Path | None, student: Path, tokenizer: "PreTrainedTokenizerFast"
) -> "PreTrainedTokenizerFast | None":
    """Raise `ModelError` for models that cannot be teacher and student, as their configs and
    tokenizers say; no weights are read. Returns the teacher's tokenizer.
    """
    for folder, name in ((student, recipe.student.model), (teacher, recipe.teacher.model)):
        if folder:
            refuse_impossible(read_config(folder, name), f"{name}: {folder / 'config.json'}")
    if any(
        key in read_config(student, recipe.student.model)
        for key in ("quantization", "quantization_config")
    ):
        raise refusals.quantised_student(recipe.student.model)
    if teacher is None:
        return None
    config = read_config(teacher, recipe.teacher.model)
    stored = config.get("quantization") or config.get("quantization_config")
    if stored and recipe.teacher.quantize_bits:
        bits = stored.get("bits", "fewer") if isinstance(stored, dict) else "fewer"
        raise refusals.quantised_already(recipe.teacher.model, recipe.teacher.quantize_bits, bits)
    theirs = tokenizer if teacher == student else load_tokenizer(teacher)
    rows = [head_rows(folder) or sys.maxsize for folder in (teacher, student)]
    common_rows(theirs.get_vocab(), tokenizer.get_vocab(), *rows)
    return theirs
