"""What can go wrong by a user's hand.

Every `DistillError` carries one line that says where, what was asked, what was found and what to
do; the command line prints that line and exits with code 2. Each child is also the standard-library
error it resembles, so callers of the Python API can catch the usual names. Anything else that
escapes is a bug of ours and keeps its traceback.
"""


class DistillError(Exception):
    """A user's mistake or a limit of their machine: one clear line, exit code 2."""


class RecipeError(DistillError, ValueError):
    """A recipe (or a `--set`) that cannot be run as written."""


class DataError(DistillError, ValueError):
    """A row, column or file of data that cannot be used."""


class NotFound(DistillError, FileNotFoundError):
    """A file, folder, dataset, task or model that is not where it was said to be."""

    __str__ = Exception.__str__  # OSError would print an errno


class ModelError(DistillError, ValueError):
    """A model or tokenizer that cannot play the part it was given."""


class RunError(DistillError, RuntimeError):
    """A run folder that cannot be started, resumed or written."""


class CacheError(DistillError, ValueError):
    """A teacher cache that cannot be read or written, or does not hold what a run asks for."""


class DivergedError(DistillError, ArithmeticError):
    """A loss or gradient that is not finite; the weights were not touched by it."""


class OutOfMemory(DistillError, MemoryError):
    """A step, a model or a generation that does not fit the device's memory."""


class DeviceStopped(DistillError, TimeoutError):
    """Work on a GPU that the system ended: it took too long at a time, or held up the screen."""

    __str__ = Exception.__str__


class RankLost(DistillError, ConnectionError):
    """Another of the processes that train together is gone."""

    __str__ = Exception.__str__


# how MLX, torch and the C++ library say it
NO_MEMORY = (
    "out of memory",
    "insufficient memory",
    "attempting to allocate",
    "resource limit",  # Metal's, of buffers
    "unable to allocate",
    "can't allocate memory",
    "bad_alloc",
)


def says_out_of_memory(text: str) -> bool:
    """Whether a library's error is about memory, by its words."""
    return any(words in text.lower() for words in NO_MEMORY)
