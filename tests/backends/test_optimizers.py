"""The optimizers that a recipe gets in each framework, against rules written once in float64, over
steps with changing rates.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS, Framework
from tiny import recipe_of

from mlx_distill.backends.mlx import optimizer as mlx_optimizer
from mlx_distill.backends.mlx import student as mlx_student
from mlx_distill.backends.torch import optimizer as torch_optimizer
from mlx_distill.errors import ModelError
from mlx_distill.recipe.recipe import Recipe

RATES = [1e-2, 3e-2, 5e-2, 2e-2, 1e-3]
SHAPES = {"matrix": (6, 5), "vector": (7,), "wide": (2, 9)}

Tree = dict[str, np.ndarray]
Rule = Callable[[np.ndarray, list[np.ndarray], dict], np.ndarray]


def adamw(weight: np.ndarray, gradients: list[np.ndarray], table: dict) -> np.ndarray:
    """Loshchilov & Hutter 2019, algorithm 2, with the decay multiplied by the learning rate as
    torch does.
    """
    m = v = np.zeros_like(weight)
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        m = table["beta1"] * m + (1 - table["beta1"]) * g
        v = table["beta2"] * v + (1 - table["beta2"]) * g**2
        m_hat, v_hat = m / (1 - table["beta1"] ** t), v / (1 - table["beta2"] ** t)
        weight = (
            weight
            - rate * table["weight_decay"] * weight
            - rate * m_hat / (np.sqrt(v_hat) + table["eps"])
        )
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
    """Shazeer & Stern 2018, algorithms 4 and 5: no momentum, updates clipped at RMS 1, the rate
    scaled by the weight's RMS.
    """
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


def schedule_free_adamw(weight: np.ndarray, gradients: list[np.ndarray], table: dict) -> np.ndarray:
    """Defazio et al. 2024 (arXiv 2405.15682), algorithm 1, with its mean made by averaging; what
    trains.
    """
    x, z = schedule_free_means(weight, gradients, table)
    return (1 - table["beta1"]) * z + table["beta1"] * x


def schedule_free_means(
    weight: np.ndarray, gradients: list[np.ndarray], table: dict
) -> tuple[np.ndarray, np.ndarray]:
    """(x, z): the student, and the iterate that it is the mean of."""
    x = z = weight
    v, total, largest = np.zeros_like(weight), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        y = (1 - table["beta1"]) * z + table["beta1"] * x
        v = table["beta2"] * v + (1 - table["beta2"]) * g**2
        step = g / (np.sqrt(v / (1 - table["beta2"] ** t)) + table["eps"])
        z = z - rate * (step + table["weight_decay"] * y)
        largest = max(largest, rate)
        total += largest**2
        x = x + largest**2 / total * (z - x)
    return x, z


RULES: dict[str, tuple[Rule, dict]] = {
    "adamw": (adamw, {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}),
    "lion": (lion, {"beta1": 0.8, "beta2": 0.95}),
    "adafactor": (adafactor, {}),
    "schedule_free_adamw": (schedule_free_adamw, {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3}),
}


def drawn(seed: int) -> tuple[Tree, list[Tree]]:
    """Weights, and a gradient of changing size for each step."""
    random = np.random.default_rng(seed)
    sizes = [1.0, 0.1, 3.0, 0.01, 1.0]
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return weights, [
        {
            name: (size * random.normal(size=shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        for size in sizes
    ]


def recipe(**optim) -> Recipe:
    return recipe_of(optim=optim)


def largest_error(
    framework: Framework,
    optimizer: str,
    weight_decay: float,
    seed: int,
    decayed: str = "matrices",
) -> float:
    rule, fields = RULES[optimizer]
    fields = fields | {"weight_decay": weight_decay}
    asked = fields | ({"decayed": decayed} if weight_decay else {})
    weights, gradients = drawn(seed)
    found = framework.optimize(
        recipe(optimizer=optimizer, learning_rate=0.5, **asked), weights, gradients, RATES
    )
    errors = []
    for name, weight in weights.items():
        spared = decayed == "matrices" and weight.ndim == 1  # a norm or a bias
        expected = rule(
            weight.astype(np.float64),
            [g[name].astype(np.float64) for g in gradients],
            fields | ({"weight_decay": 0.0} if spared else {}),
        )
        assert np.abs(expected - weight).max() > 1e-2  # there was something to see
        errors.append(np.abs(found[name] - expected).max())
    return max(errors)


HAS = [("mlx", optimizer) for optimizer in RULES]
HAS += [("torch", optimizer) for optimizer in RULES if optimizer != "lion"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight_decay, decayed", [(0.0, "all"), (0.3, "all"), (0.3, "matrices")])
@pytest.mark.parametrize("name, optimizer", HAS)
def test_optimizers_follow_their_rules(
    name: str, optimizer: str, weight_decay: float, decayed: str, seed: int
):
    assert largest_error(FRAMEWORKS[name], optimizer, weight_decay, seed, decayed) < 2e-6


@pytest.mark.parametrize("name, optimizer", HAS)
def test_a_decayed_norm_or_a_spared_one_is_seen(name: str, optimizer: str, monkeypatch):
    """Either rule against the other's numbers."""
    monkeypatch.setattr(
        mlx_optimizer, "_decay_matrices", lambda made, *rest: type(made).apply_single(made, *rest)
    )
    monkeypatch.setattr(torch_optimizer, "_by_decay", lambda parameters: parameters)
    assert largest_error(FRAMEWORKS[name], optimizer, 0.3, 0) > 1e-3


def test_the_default_table_is_adamw_with_torchs_defaults():
    made = mlx_optimizer.make_optimizer(recipe())
    assert type(made) is mlx_optimizer.AdamW
    assert (made.betas, made.eps, made.weight_decay) == ([0.9, 0.999], 1e-8, 0.0)
    made = torch_optimizer.make_optimizer(recipe(), [torch.zeros(2)])
    assert type(made) is torch.optim.AdamW
    assert [made.defaults[name] for name in ("betas", "eps", "weight_decay")] == [
        (0.9, 0.999),
        1e-8,
        0.0,
    ]
    assert not made.defaults["amsgrad"] and not made.defaults["maximize"]


def test_torch_has_no_lion():
    with pytest.raises(
        ModelError,
        match=r'^optim.optimizer = "lion" asked, but torch has none: choose "adamw", or --backend mlx$',
    ):
        torch_optimizer.make_optimizer(recipe(optimizer="lion"), [torch.zeros(2)])


# swapped betas twice, a rate that is ignored; decay in the gradient, a rate that no
# weight scales
MUTANTS = {
    ("mlx", "adamw"): (
        mlx_optimizer,
        "AdamW",
        lambda real, *args, **fields: real(*args, **fields | {"betas": fields["betas"][::-1]}),
    ),
    ("mlx", "lion"): (
        mlx.optimizers,
        "Lion",
        lambda real, *args, **fields: real(*args, **fields | {"betas": fields["betas"][::-1]}),
    ),
    ("mlx", "adafactor"): (
        mlx.optimizers,
        "Adafactor",
        lambda real, *args, **fields: real(*args, **fields | {"relative_step": True}),
    ),
    ("mlx", "schedule_free_adamw"): (
        mlx_optimizer,
        "ScheduleFreeAdamW",
        lambda real, rate, betas, *rest: real(rate, [0.3, 0.3], *rest),
    ),
    ("torch", "schedule_free_adamw"): (
        torch_optimizer,
        "ScheduleFreeAdamW",
        lambda real, *args, **fields: real(*args, **fields, weight_lr_power=0.0),
    ),
    ("torch", "adamw"): (
        torch.optim,
        "AdamW",
        lambda real, *args, **fields: torch.optim.Adam(*args, **fields),
    ),
    ("torch", "adafactor"): (
        torch_optimizer.transformers,
        "Adafactor",
        lambda real, *args, **fields: real(*args, **fields, scale_parameter=False),
    ),
}


@pytest.mark.parametrize("name, optimizer", HAS)
def test_a_mutant_is_seen(name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch):
    module, kind, mutant = MUTANTS[name, optimizer]
    real = getattr(module, kind)
    if optimizer == "schedule_free_adamw":  # a class that is asked for by its name, too
        monkeypatch.setattr(torch_optimizer, "look_at_mean", lambda made, mean: made.train())
    monkeypatch.setattr(module, kind, lambda *args, **fields: mutant(real, *args, **fields))
    assert largest_error(FRAMEWORKS[name], optimizer, 0.3, 0) > 1e-2


def test_adamw_is_mlxs_own_to_the_last_bit_and_writes_over_what_it_reads():
    """Over three steps, with clipping; nothing lies beside the weights and their moments, whoever
    holds the weights.
    """
    random = np.random.default_rng(0)
    shapes = {f"{i}": (256, 256) for i in range(8)} | {"norm": (7,)}
    made = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    fields = {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}
    ours = mlx_optimizer.AdamW(1e-2, **fields)
    theirs = mlx.optimizers.AdamW(1e-2, **fields, bias_correction=True)
    found, expected = ({name: mx.array(a) for name, a in made.items()} for _ in range(2))
    ours.clipped, size = 0.3, 4 * 256 * 256
    for step in range(3):
        gradients = {name: mx.array(array) * (step + 1) for name, array in made.items()}
        clipped = {name: array * 0.3 for name, array in gradients.items()}
        expected = theirs.apply_gradients(clipped, expected)
        mx.eval(gradients, expected, theirs.state, found, ours.state)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        model = dict(found)
        found = ours.apply_gradients(gradients, found)
        assert step == 0 or mx.get_peak_memory() - before < 0.5 * size
        assert all(model[name] is found[name] for name in shapes)
        for name in shapes:
            assert np.array_equal(np.array(found[name]), np.array(expected[name])), name


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_an_update_on_mlx_frees_the_gradients_that_it_has_clipped(optimizer: str):
    """Beside what was held there is never a second whole set of them."""
    student = object.__new__(mlx_student.MlxStudent)
    student.optimizer, student.max_grad_norm = (
        mlx_optimizer.make_optimizer(recipe(optimizer=optimizer)),
        1e-3,
    )
    student._settle = lambda weights: None
    student.weights = {f"{number}": mx.ones((256, 256)) for number in range(40)}
    student.optimizer.init(student.weights)
    student.gradients = {name: mx.ones((256, 256)) for name in student.weights}
    mx.eval(student.weights, student.optimizer.state, student.gradients)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    student.apply(1e-3)
    assert mx.get_peak_memory() - before < 1.9 * 40 * 4 * 256 * 256
