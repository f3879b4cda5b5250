"""Memory of this process as the operating system counts it: torch's CPU allocator has no counter."""

import os
import resource
import sys
from pathlib import Path

from mlx_distill.backends.protocol import Memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory() -> Memory:
    """Resident bytes now and at their peak since `reset_peak`; off Linux the peak is that of the whole process."""
    if not STATUS.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Memory(peak, 0, peak)
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    active, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return Memory(active, 0, peak)


def reset_peak() -> None:
    """The peak is that of now."""
    if os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")
