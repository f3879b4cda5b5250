"""What MLX raises where there is no memory, as an error of one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_distill.errors import OutOfMemory, says_out_of_memory
from mlx_distill.files import one_line


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a failed allocation, which MLX tells in words alone, into `OutOfMemory`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or says_out_of_memory(str(error)):
            raise OutOfMemory(f"{what} does not fit the memory ({one_line(error)})") from None
        raise
