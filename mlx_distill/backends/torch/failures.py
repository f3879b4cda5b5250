"""What torch raises where there is no memory or another rank is gone, as errors of one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mlx_distill.backends.torch import ranks as together
from mlx_distill.errors import OutOfMemory, says_out_of_memory
from mlx_distill.files import one_line


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a failed allocation into `OutOfMemory`, and a lost rank into `RankLost`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).partition(" Including")[0].rstrip(".")
        raise OutOfMemory(f"{what} does not fit the GPU's memory ({reason[:200]})") from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or says_out_of_memory(str(error)):
            raise OutOfMemory(f"{what} does not fit the memory ({one_line(error)})") from None
        if together.size() > 1 and together.is_loss_of_a_rank(error):
            raise together.lost(what, error) from None
        raise
