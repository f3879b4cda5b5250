"""The recipe's optimizer: one of mlx's own, with the numbers of the `[optim]` table."""

import mlx.optimizers as optimizers

from mlx_distill.recipe.recipe import Recipe


def make_optimizer(recipe: Recipe) -> optimizers.Optimizer:
    """The recipe's optimizer: AdamW with bias correction (MLX's default has none), Lion, Adafactor
    (its rate is `learning_rate` times each weight's RMS, 1e-3 at least: MLX's and transformers'
    default).
    """
    table = recipe.optim
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
