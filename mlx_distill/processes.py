"""This program once more, in a process of its own.

Decided here: which code such a process runs: this very package, installed or not, and nothing else
from where it lies or from the working folder.
"""

import sys
from pathlib import Path

import mlx_distill

HERE = str(Path(mlx_distill.__file__).parent.parent)


def program(module: str = "mlx_distill.__main__") -> tuple[str, ...]:
    """The command that calls `main()` of a module of this package; arguments may follow."""
    start = (
        f"import sys; sys.path.insert(0, {HERE!r}); import mlx_distill; del sys.path[0]; "
        f"from {module} import main; main()"
    )
    return (sys.executable, "-P", "-c", start)
