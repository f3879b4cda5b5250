"""A command that ends while a thread of torch's group waits for the interpreter, to let go of a
tensor. Alone in its group, whatever the environment says.
"""

import sys
import time

import torch
import torch.distributed as dist

from mlx_distill import cli

kept = torch.ones(4)


def command(standalone_mode: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sys.setswitchinterval(100)  # seconds: the thread gets the interpreter only when this one ends
    dist.all_reduce(kept, async_op=True)
    ready = time.monotonic() + 1
    while time.monotonic() < ready:
        pass
    sys.exit(0)


cli.app = command
cli.main()
