"""The recipe's optimizer: torch's or transformers', with its state made before the first step.

Decided here: which optimizer follows the same rule as MLX's, and what its moments are called in a
checkpoint, where they have MLX's names.
"""

from typing import Any

import numpy as np
import schedulefree
import torch
import transformers
from torch import Tensor

from mlx_distill.backends.torch.adapters import is_transposed
from mlx_distill.errors import ModelError
from mlx_distill.recipe.recipe import Recipe


def make_optimizer(
    recipe: Recipe, parameters: list[Tensor], ranked: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimizer with its state made: torch's AdamW, schedulefree's, or transformers'
    Adafactor, whose rule is MLX's (torch's own is not).
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
    elif table.schedule_free:
        betas = table.beta1, table.beta2
        made = ScheduleFreeAdamW(
            groups, table.learning_rate, betas, table.eps, table.weight_decay, foreach=False
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
    look_at_mean(made, False)
    return made


class ScheduleFreeAdamW(schedulefree.AdamWScheduleFree):
    """Defazio et al. 2024 (arXiv 2405.15682): the weights that train are y, and `eval` puts their
    mean x, the student, in their place.

    What was y is kept meanwhile, so that going back changes no bit; numbers that a checkpoint holds
    in float32 are held so here, so that a continued run repeats them.
    """

    kept: dict[Tensor, Tensor] | None = None

    @torch.no_grad()
    def eval(self) -> None:
        if self.kept is not None:
            return
        self.kept = {}
        for group in self.param_groups:
            away, group["train_mode"] = 1 - 1 / group["betas"][0], False
            for y in group["params"]:
                self.kept[y] = y.detach().clone()
                y.add_((self.state[y]["z"] - y).mul_(away))  # rounded as on MLX

    @torch.no_grad()
    def train(self) -> None:
        if self.kept is not None:
            for parameter, y in self.kept.items():
                parameter.copy_(y)
            self.kept = None
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the weights as they are now, of which the mean is then made."""
        self.kept = None
        self.train()
        for parameter, state in self.state.items():
            state["z"].copy_(parameter)

    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            group.update({key: float(np.float32(group[key])) for key in ("weight_sum", "lr_max")})


def look_at_mean(optimizer: torch.optim.Optimizer, mean: bool) -> None:
    """Have the weights be the student, or what trains; of schedule-free AdamW these are not the same."""
    if isinstance(optimizer, ScheduleFreeAdamW):
        optimizer.eval() if mean else optimizer.train()


def _by_decay(parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Matrices, and norms, biases and other vectors, which do not decay."""
    matrices = {"params": [one for one in parameters if one.ndim > 1]}
    vectors = {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0}
    return [group for group in (matrices, vectors) if group["params"]]


def _moments(parameter: Tensor, optimizer: str) -> dict[str, Tensor | int]:
    """The state before the first step, zero: what the optimizer itself would make in it."""
    if optimizer == "schedule_free_adamw":
        return {"z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}
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
    if "z" in state:
        return {"z": "z", "exp_avg_sq": "v"}
    if "exp_avg_sq" in state:
        return {"exp_avg_sq": "exp_avg_sq"}
    rows, columns = "exp_avg_sq_row", "exp_avg_sq_col"
    return {rows: columns, columns: rows} if is_transposed(name) else {rows: rows, columns: columns}


SCHEDULE_FREE_NAMES = {"weight_sum": "weight_sum", "lr_max": "largest_rate"}


def counters(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """What an optimizer knows of all parameters together, by MLX's names."""
    group = optimizer.param_groups[0]
    found = {"learning_rate": np.array(group["lr"], np.float32)}
    if isinstance(optimizer, ScheduleFreeAdamW):
        step = group["k"]
        for ours, theirs in SCHEDULE_FREE_NAMES.items():
            found[theirs] = np.array(max(0.0, group[ours]), np.float32)
    else:
        step = max(int(state["step"]) for state in optimizer.state.values())
    return found | {"step": np.array(step, np.uint64)}


def restore_counters(optimizer: torch.optim.Optimizer, kept: dict[str, np.ndarray]) -> None:
    """Take what `counters` told."""
    step = int(kept["step"])
    if isinstance(optimizer, ScheduleFreeAdamW):
        told = {ours: float(kept[theirs]) for ours, theirs in SCHEDULE_FREE_NAMES.items()}
        for group in optimizer.param_groups:
            group.update(told, k=step)
        return
    for state in optimizer.state.values():
        old = state["step"]
        state["step"] = torch.full_like(old, step) if isinstance(old, Tensor) else step
