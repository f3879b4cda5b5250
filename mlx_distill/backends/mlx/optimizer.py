"""The recipe's optimizer: one of mlx's own, or schedule-free AdamW, with the numbers of the `[optim]`
table.
"""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.training_tables import OptimTable


def make_optimizer(recipe: Recipe) -> optimizers.Optimizer:
    """The recipe's optimizer, which decays matrices alone or all weights, as `decayed` says."""
    made = _optimizer(recipe.optim)
    if recipe.optim.decayed == "matrices":
        made.apply_single = partial(_decay_matrices, made)
    return made


class AdamW(optimizers.AdamW):
    """MLX's AdamW with bias correction, the same numbers to the last bit, in three passes over each
    array, each of which writes over what it read: uncompiled it is a dozen passes, each with an
    array of its own, and compiled as one pass MLX gives all three results memory of their own.
    Gradients are multiplied by `clipped` on the way.
    """

    clipped = 1.0

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate, step, (beta1, beta2) = self.learning_rate, self.step, self.betas
        clipped = mx.array(self.clipped)
        kept = 1 - rate * self.weight_decay
        of_mean, of_square = rate / (1 - beta1**step), mx.rsqrt(1 - beta2**step)
        # no name may hold what is read, or it is not written over
        state["m"] = _mean(state["m"], gradient, clipped, beta1)
        state["v"] = _square(state["v"], gradient, clipped, beta2)
        mx.eval(state)
        # in place: the weights' holders must not keep the old ones
        parameter[...] = _moved(
            parameter, state["m"], state["v"], kept, of_mean, of_square, self.eps
        )
        # one array after the other: MLX would first make what all of them need
        mx.eval(parameter)
        return parameter


@mx.compile
def _mean(mean: mx.array, gradient: mx.array, clipped: mx.array, beta: float) -> mx.array:
    return beta * mean + (1 - beta) * (gradient * clipped)


@mx.compile
def _square(square: mx.array, gradient: mx.array, clipped: mx.array, beta: float) -> mx.array:
    return beta * square + (1 - beta) * mx.square(gradient * clipped)


@mx.compile
def _moved(
    parameter: mx.array,
    mean: mx.array,
    square: mx.array,
    kept: mx.array,
    of_mean: mx.array,
    of_square: mx.array,
    eps: float,
) -> mx.array:
    """The next parameter: `kept` is what decay leaves, `of_mean` and `of_square` correct the moments'
    bias, the first times the rate.
    """
    return parameter * kept - of_mean * mean / (mx.sqrt(square) * of_square + eps)


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
    """AdamW with bias correction (MLX's default has none), the same without a schedule, Lion, or
    Adafactor (its rate is `learning_rate` times each weight's RMS, 1e-3 at least: MLX's and
    transformers' default).
    """
    betas = [table.beta1, table.beta2]
    if table.optimizer == "adamw":
        return AdamW(
            table.learning_rate,
            betas=betas,
            eps=table.eps,
            weight_decay=table.weight_decay,
        )
    if table.schedule_free:
        return ScheduleFreeAdamW(table.learning_rate, betas, table.eps, table.weight_decay)
    if table.optimizer == "lion":
        return optimizers.Lion(table.learning_rate, betas=betas, weight_decay=table.weight_decay)
    return optimizers.Adafactor(
        table.learning_rate, weight_decay=table.weight_decay, relative_step=False
    )


class ScheduleFreeAdamW(optimizers.Optimizer):
    """Defazio et al. 2024 (arXiv 2405.15682, algorithm 1), as the library `schedulefree` has it.

    The weights that train are y = (1 - β₁) z + β₁ x: z is AdamW's iterate without momentum, and x
    the mean of all z, each weighed by the square of the highest rate so far. x is the student.
    """

    def __init__(self, learning_rate: float, betas: list[float], eps: float, weight_decay: float):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.state["weight_sum"] = self.state["largest_rate"] = mx.array(0.0)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        state["z"], state["v"] = parameter, mx.zeros_like(parameter)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        self.state["largest_rate"] = mx.maximum(self.state["largest_rate"], self.learning_rate)
        weight = self.state["largest_rate"] ** 2
        self.state["weight_sum"] = self.state["weight_sum"] + weight
        self.share = weight / mx.maximum(self.state["weight_sum"], 1e-38)  # of z in the mean
        return super().apply_gradients(gradients, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        beta1, beta2 = self.betas
        rate, share, z = self.learning_rate, self.share, state["z"]
        state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        correction = 1 - mx.power(beta2, self.step.astype(mx.float32))
        update = gradient / (mx.sqrt(state["v"] / correction) + self.eps)
        update = update + self.weight_decay * parameter
        state["z"] = z - rate * update
        return parameter + share * (z - parameter) + rate * (beta1 * (1 - share) - 1) * update

    def restart(self, weights: dict[str, Any]) -> None:
        """Begin anew at these weights, of which the mean is then made."""
        tree_map(lambda weight, state: state.update(z=weight), weights, self.state)

    def mean(self, weights: dict[str, Any]) -> dict[str, Any]:
        """x, of the weights y."""
        away = 1 - 1 / self.betas[0]
        return tree_map(lambda y, state: y + away * (state["z"] - y), weights, self.state)
