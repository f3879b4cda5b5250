"""MLX and torch behind one face, so that a test's body is written once: numpy goes in, numpy comes
out.

Each class holds what the two frameworks call differently, and no expectation: what must be true
stands in the tests.
"""

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from tiny import recipe_of

from mlx_distill.backends import choose_backend
from mlx_distill.backends.mlx import heads as mlx_heads
from mlx_distill.backends.mlx import loading as mlx_loading
from mlx_distill.backends.mlx import loss as mlx_loss
from mlx_distill.backends.mlx import model as mlx_models
from mlx_distill.backends.mlx import optimizer as mlx_optimizer
from mlx_distill.backends.mlx import weights as mlx_weights
from mlx_distill.backends.protocol import Student
from mlx_distill.backends.torch import adapters as torch_adapters
from mlx_distill.backends.torch import heads as torch_heads
from mlx_distill.backends.torch import loading as torch_loading
from mlx_distill.backends.torch import loss as torch_loss
from mlx_distill.backends.torch import model as torch_models
from mlx_distill.backends.torch import optimizer as torch_optimizer
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import StudentTable

Arrays = dict[str, np.ndarray]
Split = mlx_models.SplitModel | torch_models.SplitModel
CPU = torch.device("cpu")
TOKENS = np.array([[3, 14, 15, 92, 65, 35, 89, 79], [1, 2, 4, 8, 16, 32, 64, 5]], np.int32)


class Mlx:
    name, library = "mlx", "mlx-lm"
    xp, models = mx, mlx_models
    loss, heads = mlx_loss, mlx_heads

    def array(self, x: np.ndarray, dtype: str = "") -> mx.array:
        return mx.array(x).astype(getattr(mx, dtype)) if dtype else mx.array(x)

    def numpy(self, x: mx.array) -> np.ndarray:
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def differentiate(self, function: Callable, *arrays: mx.array) -> tuple[tuple, list]:
        """(outputs, gradients of the first one in each array) of a function of two arrays."""
        outputs, gradients = mx.value_and_grad(function, argnums=(0, 1))(*arrays)
        return outputs, list(gradients)

    def seed(self, number: int) -> None:
        mx.random.seed(number)

    # models

    def load_teacher(self, folder: Path, bits: int = 0) -> mlx_models.SplitModel:
        return mlx_loading.load_teacher(folder, "m", bits)

    def load_student(
        self, folder: Path, table: StudentTable | None = None, seed: int = 0
    ) -> mlx_models.SplitModel:
        return mlx_loading.load_student(folder, "m", table or StudentTable(), seed)

    def logits(self, split: Split, tokens: np.ndarray = TOKENS) -> np.ndarray:
        """By the plain model."""
        return self.numpy(split.model(mx.array(tokens)))

    def hidden(self, split: Split, tokens: np.ndarray = TOKENS) -> mx.array:
        return split.hidden(mx.array(tokens))

    def loss_logits(self, head: mlx_heads.Head, hidden: mx.array, rows: int) -> mx.array:
        """All logits of a head, as the loss asks for them: block by block."""
        return mx.concatenate(
            [head.logits(hidden, start, stop) for start, stop in pairwise([0, 1, rows // 2, rows])],
            axis=1,
        )

    def parameters(self, split: Split, trained: bool = False) -> dict[str, mx.array]:
        return dict(
            tree_flatten(
                split.model.trainable_parameters() if trained else split.model.parameters()
            )
        )

    def set_dtype(self, split: Split, dtype: str) -> None:
        split.model.update(mlx_weights.cast(split.model.parameters(), getattr(mx, dtype)))

    # optimizers

    def optimize(
        self, recipe: Recipe, weights: Arrays, gradients: Sequence[Arrays], rates: Sequence[float]
    ) -> Arrays:
        """The weights after a step per gradient, driven as `apply` drives the recipe's optimizer."""
        made = mlx_optimizer.make_optimizer(recipe)
        current = {name: mx.array(weight) for name, weight in weights.items()}
        made.init(current)
        for gradient, rate in zip(gradients, rates, strict=True):
            made.learning_rate = rate
            current = made.apply_gradients(
                {name: mx.array(g) for name, g in gradient.items()}, current
            )
            mx.eval(current, made.state)
        return {name: np.array(weight) for name, weight in current.items()}


class Torch:
    name, library = "torch", "transformers"
    xp, models = torch, torch_models
    loss, heads = torch_loss, torch_heads

    def array(self, x: np.ndarray, dtype: str = "") -> torch.Tensor:
        return torch.tensor(x, dtype=getattr(torch, dtype) if dtype else None)

    def numpy(self, x: torch.Tensor) -> np.ndarray:
        return (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()

    def differentiate(self, function: Callable, *arrays: torch.Tensor) -> tuple[tuple, list]:
        """(outputs, gradients of the first one in each array): zeros where there is none."""
        leaves = [array.clone().requires_grad_() for array in arrays]
        outputs = function(*leaves)
        outputs[0].backward()
        return outputs, [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves
        ]

    def seed(self, number: int) -> None:
        torch.manual_seed(number)

    # models

    def load_teacher(self, folder: Path, bits: int = 0) -> torch_models.SplitModel:
        return torch_loading.load_teacher(folder, "m", bits, CPU, None)

    def load_student(
        self, folder: Path, table: StudentTable | None = None, seed: int = 0
    ) -> torch_models.SplitModel:
        return torch_loading.load_student(
            folder, "m", table or StudentTable(), seed, CPU, torch.float32
        )

    def logits(self, split: Split, tokens: np.ndarray = TOKENS) -> np.ndarray:
        """By the plain model."""
        return self.numpy(split.model(torch.from_numpy(tokens).long()).logits)

    def hidden(self, split: Split, tokens: np.ndarray = TOKENS) -> torch.Tensor:
        return split.hidden(torch.from_numpy(tokens).long())

    def loss_logits(self, head: torch_heads.Head, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        """All logits of a head, as the loss asks for them: in a buffer of its own."""
        with torch.no_grad():
            return head.logits(hidden, rows, torch.empty(len(hidden), rows))

    def parameters(self, split: Split, trained: bool = False) -> dict[str, torch.Tensor]:
        """By the names that a checkpoint gives them."""
        kept = {}
        for name, parameter in split.model.named_parameters():
            if parameter.requires_grad or not trained:
                kept[torch_adapters.canonical(name)] = (
                    parameter.T
                    if parameter.ndim == 2 and torch_adapters.is_transposed(name)
                    else parameter
                )
        return kept

    def set_dtype(self, split: Split, dtype: str) -> None:
        split.model.to(getattr(torch, dtype))

    # optimizers

    def optimize(
        self, recipe: Recipe, weights: Arrays, gradients: Sequence[Arrays], rates: Sequence[float]
    ) -> Arrays:
        """The weights after a step per gradient, driven as `apply` drives the recipe's optimizer."""
        current = {
            name: torch.tensor(weight, requires_grad=True) for name, weight in weights.items()
        }
        made = torch_optimizer.make_optimizer(recipe, list(current.values()))
        for gradient, rate in zip(gradients, rates, strict=True):
            for group in made.param_groups:
                group["lr"] = rate
            for name, weight in current.items():
                weight.grad = torch.tensor(gradient[name])
            made.step()
        return {name: self.numpy(weight) for name, weight in current.items()}


Framework = Mlx | Torch
FRAMEWORKS: dict[str, Framework] = {"mlx": Mlx(), "torch": Torch()}


def dtype_name(array: mx.array | torch.Tensor | np.ndarray) -> str:
    return str(array.dtype).rpartition(".")[2]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected number."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def student_of(framework: Framework, folder: Path, **student) -> Student:
    """A student of the backend, by a recipe whose `[student]` table is given."""
    recipe = recipe_of(student=student)
    return choose_backend(framework.name).load_student(folder, "m", recipe)


@contextlib.contextmanager
def state_of(student: Student):
    """A folder with the student's checkpoint."""
    with TemporaryDirectory() as folder:
        student.save_state(Path(folder))
        yield Path(folder)


def perturb(student: Student, seed: int = 3) -> None:
    """As if it had trained: every trained array moves."""
    random = np.random.default_rng(seed)
    with state_of(student) as folder:
        arrays = load_file(folder / "weights.safetensors")
        moved = {
            key: array + 0.05 * random.normal(size=array.shape).astype(np.float32)
            for key, array in sorted(arrays.items())
        }
        save_file(moved, folder / "weights.safetensors")
        student.restore_state(folder, optimizer=False)
