"""Memory of this process as the operating system counts it: torch's CPU allocator has no counter.

Decided here: what is counted, and that freed memory may be asked back.
"""

import ctypes
import os
import resource
import sys
from pathlib import Path

from mlx_distill.backends.protocol import Memory

MMAP_THRESHOLD, INITIAL = (
    -3,
    2**17,
)  # of glibc's mallopt: a parameter's number, and the bytes that it starts with
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory() -> Memory:
    """Resident bytes now and at their peak since `reset_peak`; off Linux the peak is that of the
    whole process.
    """
    if not STATUS.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        return Memory(peak, 0, peak)
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    active, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return Memory(active, 0, peak)


def reset_peak() -> None:
    """The peak is that of now."""
    if os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")


def return_freed_blocks() -> bool:
    """Let the allocator give a freed tensor's memory back at once; whether it can.

    glibc gives back only blocks above a threshold that rises to 32 MiB with the blocks it frees.
    Below that, the temporaries of one block of layers leave holes that the next one does not fill:
    checkpointing then saves next to nothing (a LoRA step of 16 blocks held 555 MB instead of 255).
    Fresh pages cost time, so only a student that computes again to save memory asks for it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(MMAP_THRESHOLD, INITIAL))
