"""The recipe's optimizer: torch's or transformers', with its state made before the first step.

Decided here: which optimizer follows the same rule as MLX's, and what its moments are called in a
checkpoint, where they have MLX's names.
"""

from typing import Any

import torch
import transformers
from torch import Tensor

from mlx_distill.backends.torch.adapters import is_transposed
from mlx_distill.errors import ModelError
from mlx_distill.recipe.recipe import Recipe


def make_optimizer(
    recipe: Recipe, parameters: list[Tensor], ranked: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimizer with its state made: torch's AdamW, or transformers' Adafactor, whose
    rule is MLX's (torch's own is not).
    """
    table = recipe.optim
    groups = _by_decay(parameters) if table.decayed == "matrices" else parameters
    if table.optimizer == "adamw":
        made = torch.optim.AdamW(
            groups,
            table.learning_rate,
            (table.beta1, table.beta2),
            table.eps,
            table.weight_decay,
            fused=True,
        )
    elif table.optimizer == "adafactor" and not ranked:
        made = transformers.Adafactor(
            groups, table.learning_rate, weight_decay=table.weight_decay, relative_step=False
        )
    else:
        where = "torch on several ranks" if table.optimizer == "adafactor" else "torch"
        raise ModelError(
            f'optim.optimizer = "{table.optimizer}" asked, but {where} has none: choose "adamw", '
            "or --backend mlx"
        )
    for parameter in parameters:
        made.state[parameter] = _moments(parameter, table.optimizer)
    return made


def _by_decay(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Matrices, and norms, biases and other vectors, which do not decay."""
    matrices = {"params": [one for one in parameters if one.ndim > 1]}
    vectors = {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0}
    return [group for group in (matrices, vectors) if group["params"]]


def _moments(parameter: Tensor, optimizer: str) -> dict[str, Tensor | int]:
    """The state before the first step, zero: what the optimizer itself would make in it."""
    if optimizer == "adamw":
        step = torch.zeros((), device=parameter.device)
        return {
            "step": step,
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if parameter.ndim < 2:
        return {"step": 0, "exp_avg_sq": torch.zeros_like(parameter), "RMS": 0}
    rows, columns = (
        parameter.new_zeros(parameter.shape[:-1]),
        parameter.new_zeros(parameter.shape[:-2] + parameter.shape[-1:]),
    )
    return {"step": 0, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns, "RMS": 0}


ADAMW_NAMES = {"exp_avg": "m", "exp_avg_sq": "v"}


def state_names(name: str, state: dict) -> dict[str, str]:
    """torch's names of the moments → MLX's; a transposed parameter's row sums are columns there."""
    if "exp_avg" in state:
        return ADAMW_NAMES
    if "exp_avg_sq" in state:
        return {"exp_avg_sq": "exp_avg_sq"}
    rows, columns = "exp_avg_sq_row", "exp_avg_sq_col"
    return {rows: columns, columns: rows} if is_transposed(name) else {rows: rows, columns: columns}
