"""The torch backend: NVIDIA GPUs, and a CPU for the tests that compare it with MLX.

Importing it asks torch's allocator for segments that grow, unless the environment says otherwise:
batches of many lengths leave holes between those that do not.
"""

import os

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
