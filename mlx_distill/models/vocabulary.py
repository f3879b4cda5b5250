"""Whether a teacher and a student speak of the same ids: known from their tokenizers and configs,
before any weight is read.
"""

from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config


def head_rows(folder: Path) -> int:
    """Rows of a model's head, by its config.json; 0 where that does not say."""
    config = read_config(folder)
    inner = config.get("text_config")
    rows = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else 0)
    return rows if isinstance(rows, int) else 0


def common_rows(
    teacher: dict[str, int], student: dict[str, int], teacher_rows: int, student_rows: int
) -> int:
    """Rows of both heads that the loss compares; raises `ModelError` unless both tokenizers map the
    same text to the same ids.
    """
    for token, _ in sorted(teacher.items() | student.items(), key=lambda item: item[1]):
        if teacher.get(token) != student.get(token):
            raise ModelError(
                f"teacher and student do not share a vocabulary: token {token!r} is "
                f"{teacher.get(token, 'absent')} in the teacher's and "
                f"{student.get(token, 'absent')} in the student's; choose two models of one family"
            )
    rows, ids = min(teacher_rows, student_rows), max(student.values()) + 1
    if rows < ids:
        raise ModelError(
            f"a head has {rows} rows for a vocabulary of {ids} ids: the tokenizer does not belong "
            "to the model"
        )
    return rows
