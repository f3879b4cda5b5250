"""The recipe's optimizer: one of mlx's own, with the numbers of the `[optim]` table."""

from functools import partial

import mlx.core as mx
import mlx.optimizers as optimizers

from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import OptimTable


def make_optimizer(recipe: Recipe) -> optimizers.Optimizer:
    """The recipe's optimizer, which decays matrices alone or all weights, as `decayed` says."""
    made = _optimizer(recipe.optim)
    if recipe.optim.decayed == "matrices":
        made.apply_single = partial(_decay_matrices, made)
    return made


def _decay_matrices(
    optimizer: optimizers.Optimizer, gradient: mx.array, parameter: mx.array, state: dict
) -> mx.array:
    """One parameter's update, without decay where it is a norm, a bias or another vector."""
    decay = optimizer.weight_decay
    optimizer.weight_decay = decay if parameter.ndim > 1 else 0.0
    try:
        return type(optimizer).apply_single(optimizer, gradient, parameter, state)
    finally:
        optimizer.weight_decay = decay


def _optimizer(table: OptimTable) -> optimizers.Optimizer:
    """AdamW with bias correction (MLX's default has none), Lion, or Adafactor (its rate is
    `learning_rate` times each weight's RMS, 1e-3 at least: MLX's and transformers' default).
    """
    if table.optimizer == "adamw":
        return optimizers.AdamW(
            table.learning_rate,
            betas=[table.beta1, table.beta2],
            eps=table.eps,
            weight_decay=table.weight_decay,
            bias_correction=True,
        )
    if table.optimizer == "lion":
        return optimizers.Lion(
            table.learning_rate, betas=[table.beta1, table.beta2], weight_decay=table.weight_decay
        )
    return optimizers.Adafactor(
        table.learning_rate, weight_decay=table.weight_decay, relative_step=False
    )
