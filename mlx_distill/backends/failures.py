"""What a GPU could not do, as errors of one line.

In: the errors that frameworks raise, of which words alone tell the cause. Out: `OutOfMemory`, and
`DeviceStopped` for work that the system ended. Decided here: by which words they are known, and
what a person is told to lower. (MLX's words: `metal/device.cpp` and `metal/allocator.cpp`.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_distill.errors import DeviceStopped, OutOfMemory, says_out_of_memory
from mlx_distill.files import one_line

# Metal: "Caused GPU Timeout Error", "Impacting Interactivity" and their kin; CUDA: its watchdog
STOPPED = ("command buffer execution failed", "launch timed out")
OF_A_STEP = "batch.micro_batch_size, truncation.max_tokens or objective.chunk_tokens"
OF_VALIDATION = "batch.micro_batch_size or data.longest_tokens"
OF_TEXTS_READ = "data.longest_tokens"
OF_TEXTS = "eval.batch_size (rollouts.batch_size where a recipe's texts are written)"


@contextmanager
def explained(what: str, lower: str = OF_A_STEP) -> Iterator[None]:
    """Turn a failure of the device into `OutOfMemory` or `DeviceStopped`; `lower` names the fields
    that make `what` smaller.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        refuse_of_device(what, error, lower)
        raise


def refuse_of_device(what: str, error: BaseException, lower: str = OF_A_STEP) -> None:
    """Raise `OutOfMemory` or `DeviceStopped` where an error is one of these; else do nothing."""
    if isinstance(error, OutOfMemory | DeviceStopped):
        raise error
    said = one_line(error)
    if isinstance(error, MemoryError) or says_out_of_memory(str(error)):
        # what a step needs is planned, and whoever catches this says what to lower
        remedy = f": lower {lower}" if lower == OF_TEXTS else ""
        raise OutOfMemory(f"{what} does not fit the memory ({said}){remedy}") from None
    if any(words in str(error).lower() for words in STOPPED):
        raise DeviceStopped(
            f"the system ended {what} on the GPU ({said}), as it does with work that takes seconds "
            f"at a time or holds up the screen: lower {lower}"
        ) from None
