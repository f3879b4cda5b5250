"""What a run holds from its start to its end: the weights of both models and the optimizer's state.

In: a recipe, the two models as their config.json describes them, a machine. Out: bytes, and how
many numbers train. Decided here: nothing; these are the sizes of what the backends make, exactly.
"""

from dataclasses import dataclass

from mlx_distill.cost.dense import DTYPE_BYTES, FLOAT, Dense, frozen_bytes, teacher_bytes
from mlx_distill.cost.flops import Adapters
from mlx_distill.machine import Machine
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import StudentTable


@dataclass(frozen=True)
class Weights:
    """Two models, a recipe and a machine. `teacher` is None where none is loaded."""

    recipe: Recipe
    teacher: Dense | None
    student: Dense
    machine: Machine
    kept_bytes: int = 0  # of a live teacher's answers

    @property
    def table(self) -> StudentTable:
        return self.recipe.student

    @property
    def full(self) -> bool:
        return self.table.tuning == "full"

    @property
    def dtype(self) -> str:
        asked = self.table.compute_dtype
        return self.machine.dtype if asked == "auto" else asked

    @property
    def number(self) -> int:
        """Bytes of a computed number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def asked(self) -> Dense | None:
        """The teacher that a training step asks; validation asks it even at `kd_weight = 0`."""
        return self.teacher if self.recipe.objective.kd_weight > 0 else None

    @property
    def blocks(self) -> int:
        """Blocks that gradients reach."""
        layers, adapters = self.student.shape.layers, self.adapters
        return min(adapters.blocks, layers) if adapters else layers

    @property
    def adapters(self) -> Adapters | None:
        return Adapters.of(self.table, self.student.shape)

    def trainable(self) -> int:
        """Numbers that train."""
        if self.adapters is None:
            return self.student.parameters + self.projections()
        magnitudes = self.blocks * sum(self.adapted_outputs()) if self.is_dora else 0
        return self.adapters.weights + magnitudes + self.projections()

    def projections(self) -> int:
        """Numbers of the matrices that bring hidden states to the teacher's width."""
        widths = self.student.shape.width, self.teacher.shape.width if self.teacher else 0
        if not widths[1] or widths[0] == widths[1]:
            return 0
        return (
            len(set(self.recipe.objective.hidden_layers) or {0})
            * widths[0]
            * widths[1]
            * (self.recipe.objective.matched_layers > 0)
        )

    def optimizer_numbers(self) -> int:
        """Numbers of state: Adafactor has a row and a column of each matrix."""
        kind = self.recipe.optim.optimizer
        if kind != "adafactor":
            return self.trainable() * {"lion": 1}.get(kind, 2)
        shape = self.student.shape
        if self.full:
            ends = sum(map(sum, shape.matrices().values()))
            vocabulary = (1 if self.student.tied else 2) * (shape.vocabulary + shape.width)
            return vocabulary + shape.layers * ends + self.student.vectors
        ends = sum(sum(shape.matrices()[name]) + 2 * self.table.rank for name in self.targets())
        return self.blocks * (ends + (sum(self.adapted_outputs()) if self.is_dora else 0))

    def checkpoint_numbers(self) -> int:
        """Numbers of a checkpoint: what trains, where it is not the student, beside the student."""
        copies = 2 if self.recipe.optim.schedule_free else 1
        return copies * self.trainable() + self.optimizer_numbers()

    def student_bytes(self) -> float:
        """float32 weights, the copy that is rounded and the one that is computed in; frozen ones in
        the computed format, or packed, beside float32 adapters.
        """
        weights = self.student.parameters
        if self.full:
            rounded = FLOAT if self.table.quantize_aware_bits else 0
            return weights * (FLOAT + rounded + (self.number if self.dtype != "float32" else 0))
        frozen = frozen_bytes(self.student, self.table.quantize_bits, self.number)
        return frozen + FLOAT * self.trainable()

    def teacher_bytes(self) -> float:
        if not self.teacher:
            return 0.0
        asked = self.recipe.teacher
        weights = teacher_bytes(
            self.teacher, asked.quantize_bits, self.machine.dtype, asked.compute_dtype
        )
        return weights + self.kept_bytes

    def unpacked_bytes(self) -> float:
        """The largest matrix of a teacher that torch keeps packed: it is made for each product, of
        MLX's format its integers (a byte each) beside its numbers.
        """
        if self.teacher is None or self.machine.backend != "torch":
            return 0.0
        number = DTYPE_BYTES.get(self.teacher.stored, 2) if self.machine.dtype != "float32" else 4
        packed = self.recipe.teacher.quantize_bits or self.teacher.bits
        return _largest_matrix(self.teacher, packed, number)

    def student_unpacked_bytes(self) -> float:
        """The same of a student's packed base."""
        if self.machine.backend != "torch":
            return 0.0
        return _largest_matrix(self.student, self.packed_base, self.number)

    def unpacked_for_backward(self) -> float:
        """Matrices of a block that MLX's DoRA unpacks and keeps for its backward pass."""
        if not self.packed_base or not self.is_dora or self.machine.backend != "mlx":
            return 0.0
        sizes = self.student.shape.matrices()
        return float(self.number * sum(sizes[name][0] * sizes[name][1] for name in self.targets()))

    def head_unpacked_bytes(self) -> float:
        """A packed head, which the loss multiplies with as a matrix; NF4 leaves the head as it is."""
        if self.packed_base in (0, "nf4"):
            return 0.0
        shape = self.student.shape
        return float(self.number * shape.vocabulary * shape.width)

    @property
    def packed_base(self) -> int | str:
        """How the base of adapters is packed: in so many bits or in "nf4"; 0 = it is not."""
        return 0 if self.full else self.table.quantize_bits or self.student.bits

    @property
    def is_dora(self) -> bool:
        return self.table.tuning == "dora"

    def targets(self) -> list[str]:
        matrices = self.student.shape.matrices()
        return [name for name in self.table.lora_targets if name in matrices]

    def adapted_outputs(self) -> list[int]:
        return [self.student.shape.matrices()[name][1] for name in self.targets()]


def _largest_matrix(model: Dense, packed: int | str, number: int) -> float:
    """Its bytes once it is unpacked, of so many a number."""
    blocks = max(inputs * outputs for inputs, outputs in model.shape.matrices().values())
    if isinstance(packed, str):
        return float(number * blocks)  # NF4 is not of embedding and head
    numbers = max(model.shape.vocabulary * model.shape.width, blocks)
    return float((1 + number) * numbers) if packed else 0.0
