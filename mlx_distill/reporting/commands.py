"""What to type next: the command that asks a run's student, and the one that scores it.

In: a run's folder and recipe. Out: command lines.
"""

import shlex
from pathlib import Path

from mlx_distill.recipe.recipe import Recipe

STUDENT = Path("student") / "config.json"


def ask_command(folder: Path, prompt: str = "") -> str:
    """Asks the student a prompt, or begins a conversation."""
    words = ["mlx-distill", "chat", str(folder)]
    return shlex.join([*words, "--prompt", prompt] if prompt else words)


def score_command(folder: Path, recipe: Recipe | None) -> str:
    """Scores a student that was not; where its recipe names no task, one is filled in: that of the
    embedded data, else a file to be named. Of a run without a student, what trains it to its end;
    "" where its recipe is not known.
    """
    if not (folder / STUDENT).is_file():
        again = ["mlx-distill", "run", str(folder / "recipe.toml")]
        return shlex.join(again) if recipe else ""
    command = shlex.join(["mlx-distill", "eval", str(folder)])
    if recipe and recipe.eval.task:
        return command
    source = recipe.data.source if recipe else ""
    task = source if source.startswith("embedded:") else "jsonl:FILE"
    return f"{command} --set {shlex.quote(f'task={task}')}"
