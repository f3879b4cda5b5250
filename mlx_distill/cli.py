"""The command line: all commands, and the process that ends with one."""

from mlx_distill.commands import distil, models, others, stages  # noqa: F401  they name themselves
from mlx_distill.commands.base import app
from mlx_distill.terminal.ending import run_to_its_end


def main() -> None:
    """The `mlx-distill` command, in a process that ends with it."""
    run_to_its_end(lambda: app(standalone_mode=False))
