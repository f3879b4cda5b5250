"""The optimizers that a recipe gets, each against its rule written once in float64, over steps with changing learning rates."""

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mlx_distill.backends.mlx import backend as module
from mlx_distill.backends.mlx.backend import make_optimizer
from mlx_distill.recipe import Recipe

RATES = [1e-2, 3e-2, 5e-2, 2e-2, 1e-3]
SHAPES = {"matrix": (6, 5), "vector": (7,), "wide": (2, 9)}

Tree = dict[str, np.ndarray]
Rule = Callable[[np.ndarray, list[np.ndarray], dict], np.ndarray]


def adamw(weight: np.ndarray, gradients: list[np.ndarray], table: dict) -> np.ndarray:
    """Loshchilov & Hutter 2019, algorithm 2, with the decay multiplied by the learning rate as torch does."""
    m = v = np.zeros_like(weight)
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        m = table["beta1"] * m + (1 - table["beta1"]) * g
        v = table["beta2"] * v + (1 - table["beta2"]) * g**2
        m_hat, v_hat = m / (1 - table["beta1"] ** t), v / (1 - table["beta2"] ** t)
        weight = weight - rate * table["weight_decay"] * weight - rate * m_hat / (np.sqrt(v_hat) + table["eps"])
    return weight


def lion(weight: np.ndarray, gradients: list[np.ndarray], table: dict) -> np.ndarray:
    """Chen et al. 2023, algorithm 2."""
    m = np.zeros_like(weight)
    for g, rate in zip(gradients, RATES, strict=True):
        direction = np.sign(table["beta1"] * m + (1 - table["beta1"]) * g)
        weight = weight - rate * (direction + table["weight_decay"] * weight)
        m = table["beta2"] * m + (1 - table["beta2"]) * g
    return weight


def adafactor(weight: np.ndarray, gradients: list[np.ndarray], table: dict) -> np.ndarray:
    """Shazeer & Stern 2018, algorithms 4 and 5: no momentum, updates clipped at RMS 1, the rate scaled by the weight's RMS."""
    row = column = full = 0.0
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        beta, square = 1 - t**-0.8, g**2 + 1e-30
        if g.ndim == 2:
            row = beta * row + (1 - beta) * square.mean(1)
            column = beta * column + (1 - beta) * square.mean(0)
            second_moment = np.outer(row, column) / row.mean()
        else:
            second_moment = full = beta * full + (1 - beta) * square
        update = g / np.sqrt(second_moment)
        update = update / max(1.0, np.sqrt((update**2).mean()))
        rate = rate * max(1e-3, np.sqrt((weight**2).mean()))
        weight = weight - rate * table["weight_decay"] * weight - rate * update
    return weight


RULES: dict[str, tuple[Rule, dict]] = {
    "adamw": (adamw, {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}),
    "lion": (lion, {"beta1": 0.8, "beta2": 0.95}),
    "adafactor": (adafactor, {}),
}


def drawn(seed: int) -> tuple[Tree, list[Tree]]:
    """Weights, and a gradient of changing size for each step."""
    random = np.random.default_rng(seed)
    sizes = [1.0, 0.1, 3.0, 0.01, 1.0]
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return weights, [{name: (size * random.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()} for size in sizes]


def trained(optimizer: str, fields: dict, weights: Tree, gradients: list[Tree]) -> Tree:
    """By the recipe's optimizer, driven as `MlxStudent.apply` drives it."""
    table = {"optimizer": optimizer, "learning_rate": 0.5, **fields}
    made = make_optimizer(Recipe.model_validate({"data": {"source": "rows.jsonl"}, "optim": table}))
    current = {name: mx.array(weight) for name, weight in weights.items()}
    made.init(current)
    for gradient, rate in zip(gradients, RATES, strict=True):
        made.learning_rate = rate
        current = made.apply_gradients({name: mx.array(g) for name, g in gradient.items()}, current)
        mx.eval(current, made.state)
    return {name: np.array(weight) for name, weight in current.items()}


def largest_error(optimizer: str, weight_decay: float, seed: int) -> float:
    rule, fields = RULES[optimizer]
    fields = fields | {"weight_decay": weight_decay}
    weights, gradients = drawn(seed)
    found = trained(optimizer, fields, weights, gradients)
    errors = []
    for name, weight in weights.items():
        expected = rule(weight.astype(np.float64), [g[name].astype(np.float64) for g in gradients], fields)
        assert np.abs(expected - weight).max() > 1e-2  # there was something to see
        errors.append(np.abs(found[name] - expected).max())
    return max(errors)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", RULES)
def test_optimizers_follow_their_rules(optimizer: str, weight_decay: float, seed: int):
    assert largest_error(optimizer, weight_decay, seed) < 2e-6


def test_the_default_table_is_adamw_with_torchs_defaults():
    made = make_optimizer(Recipe.model_validate({"data": {"source": "rows.jsonl"}}))
    assert type(made) is optimizers.AdamW and made.bias_correction
    assert (made.betas, made.eps, made.weight_decay) == ([0.9, 0.999], 1e-8, 0.0)


MUTANTS = {
    "adamw": lambda *args, **fields: optimizers.AdamW(*args, **fields | {"bias_correction": False}),
    "lion": lambda *args, **fields: optimizers.Lion(*args, **fields | {"betas": fields["betas"][::-1]}),
    "adafactor": lambda *args, **fields: optimizers.Adafactor(*args, **fields | {"relative_step": True}),
}


@pytest.mark.parametrize("optimizer", RULES)
def test_a_mutant_is_seen(optimizer: str, monkeypatch: pytest.MonkeyPatch):
    """MLX's defaults (no bias correction, a rate that is ignored) and swapped betas are far off the rules."""
    names = {"adamw": "AdamW", "lion": "Lion", "adafactor": "Adafactor"}

    class Mutant:
        pass

    setattr(Mutant, names[optimizer], staticmethod(MUTANTS[optimizer]))
    monkeypatch.setattr(module, "optimizers", Mutant)
    assert largest_error(optimizer, 0.3, 0) > 1e-2
