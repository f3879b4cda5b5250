"""A function that torch's compiler fuses, where the installed torch can.

In: a function of tensors whose first axis is one of rows. Out: the same function, compiled when it
is first called. Decided here: rows may be of any number without another compilation, and a compiler
that fails is told once; what runs eagerly then is the same, more slowly. torch's settings stay as
they are for everybody else.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from mlx_distill.files import one_line

RECOMPILATIONS = 64  # of one function: an objective, a number format, gradients or none each


class Compiled:
    """`function`, fused as far as that can be done on this machine."""

    def __init__(self, function: Callable):
        self.function = function
        self._fused: Callable | None = torch.compile(function)

    def __call__(self, *arguments: Any) -> Any:
        if self._fused is None:
            return self.function(*arguments)
        for argument in arguments:
            if isinstance(argument, Tensor):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, suppress_errors=False):
                return self._fused(*arguments)
        except TorchDynamoException as error:  # compiling comes first: nothing was computed yet
            self._fused = None
            warnings.warn(
                f"torch cannot compile the loss here, which runs eagerly and more slowly: "
                f"{one_line(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.function(*arguments)
