"""`framework`: MLX and torch in turn, for tests whose body is the same on both."""

import pytest
import torch
from frameworks import FRAMEWORKS, Framework

torch.set_num_threads(1)  # of matrices this small, threads cost more than they save


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Framework:
    return FRAMEWORKS[request.param]
