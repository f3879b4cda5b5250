"""Whether the disk has room for what a run is going to keep."""

import shutil

from mlx_distill.backends.protocol import Student
from mlx_distill.cost.plan import kept_checkpoints
from mlx_distill.errors import RunError
from mlx_distill.recipe.training_tables import RunTable
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.words import amount


def refuse_full_disk(folder: RunFolder, table: RunTable, student: Student, steps: int) -> None:
    """Raises `RunError` where checkpoints and student need more than is free."""
    needed = kept_checkpoints(table, steps) * student.state_bytes() + student.export_bytes()
    there = (file for file in folder.checkpoints.rglob("*") if file.is_file())
    needed -= sum(file.stat().st_size for file in there)
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise RunError(
            f"{folder.path}: checkpoints and student need {amount(needed, 'B')} more, "
            f"{amount(free, 'B')} are free: free some, "
            'set run.folder to another disk, or run.keep_checkpoints = "last" with run.export '
            '= "last"'
        )
