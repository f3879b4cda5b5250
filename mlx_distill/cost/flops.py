"""What a training step costs, counted from two configs before any weight is loaded.

A multiply-add is two operations. Forward: 2 per weight of every matrix a token passes, plus
attention's 2 · 2 · T²/2 · heads · head_dim a layer (causal: a kernel that computes the masked half
as well does more). Backward: twice the forward; once for frozen matrices (LoRA), where only the
gradient that passes through is computed; nothing below the first adapted block. Attention has no
weights: both of its factors pass gradients on, frozen or not. Gradient checkpointing computes a
block's forward once more, without its last matrix, whose output no gradient needs; with adapters
torch computes that one too, so it is counted (MLX does not: at most 6 % of a step). The head is
counted at the loss positions only, and the loss as the elementwise passes of its walk over each
logit. Norms, activations, DoRA's column norms and the optimizer are left out (below 1 %).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_distill.data.batches import EVERY_TOKEN, Step
from mlx_distill.data.selection import is_scored
from mlx_distill.models.folder import read_config
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import StudentTable
from mlx_distill.recipe.training_tables import SelectionTable

# Elementwise operations a logit in the walk of backends/*/dense.py, an exponential counted as one:
# floor, maximum, shift, exponential and sum of both models (10), the divergence (3), the slope (3);
# without a teacher floor to sum (5) and slope (2).
LOSS_OPERATIONS, LOSS_OPERATIONS_ALONE = 16, 7


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder that decide its cost."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict) -> "Shape | None":
        """From a Hugging Face config of the Llama or Qwen kind; None where it is not a dense
        decoder described that way.
        """
        needed = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
        if (
            any(key not in config for key in needed)
            or config.get("num_experts")
            or config.get("num_local_experts")
        ):
            return None
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            width,
            config["num_hidden_layers"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or width // heads,
            config["intermediate_size"],
            config["vocab_size"],
        )

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each matrix of a block, by the name that `student.lora_targets`
        uses.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.width, queries),
            "k_proj": (self.width, keys),
            "v_proj": (self.width, keys),
            "o_proj": (queries, self.width),
            "gate_proj": (self.width, self.ffn),
            "up_proj": (self.width, self.ffn),
            "down_proj": (self.ffn, self.width),
        }

    def block_weights(self) -> int:
        """Numbers in the matrices of one block."""
        return sum(inputs * outputs for inputs, outputs in self.matrices().values())

    def trunk(
        self, lengths: Sequence[int], matrix_passes: int = 1, attention_passes: int = 1
    ) -> float:
        """Operations of the trunk over sequences of these lengths; a pass is worth one forward (the
        default).
        """
        matrices = self.layers * self.block_weights()
        attention = self.layers * 2 * self.heads * self.head_dim
        return sum(
            matrix_passes * 2 * matrices * t + attention_passes * attention * t * t for t in lengths
        )

    def head(self, positions: float) -> float:
        """Forward operations of the head at so many positions."""
        return 2.0 * self.width * self.vocabulary * positions


@dataclass(frozen=True)
class Adapters:
    """LoRA or DoRA on the last `blocks` blocks, with `weights` numbers of low rank in all of them
    together.
    """

    blocks: int
    weights: int

    @classmethod
    def of(cls, table: StudentTable, shape: Shape) -> "Adapters | None":
        """What a student table asks for; None for full tuning. Targets that a Llama block does not
        have are not counted.
        """
        if table.tuning == "full":
            return None
        blocks, matrices = table.lora_layers or shape.layers, shape.matrices()
        ends = [sum(matrices[name]) for name in table.lora_targets if name in matrices]
        return cls(blocks, blocks * table.rank * sum(ends))


def step_flops(
    step: Step,
    teacher: Shape | None,
    student: Shape,
    full: bool,
    checkpointing: bool = False,
    adapters: Adapters | None = None,
    selection: SelectionTable = EVERY_TOKEN,
    matched: int = 0,
) -> dict[str, float]:
    """Operations of one optimizer step by part (teacher's trunk, student's trunk, both heads, the
    loss, what chooses tokens, and so many layers that are matched); padding is not counted.
    """
    lengths = [int(t) for batch in step.batches for t in batch.lengths]
    asked = float(sum(np.count_nonzero(batch.weight[: batch.taught]) for batch in step.batches))
    alone = float(sum(np.count_nonzero(batch.weight[batch.taught :]) for batch in step.batches))
    positions = float(step.positions)
    parts = training_flops(
        lengths, positions, teacher, student, full, checkpointing, adapters, alone
    )
    parts |= matching_flops(positions - alone, matched, teacher, student)
    return parts | selection_flops(lengths, asked, selection, teacher, student)


def matching_flops(
    positions: float, layers: int, teacher: Shape | None, student: Shape
) -> dict[str, float]:
    """Operations of bringing the states of so many layers to the teacher's width, with both
    gradients: "hidden", or nothing where the widths are one (distances are left out).
    """
    if not (layers and teacher and teacher.width != student.width):
        return {}
    return {"hidden": 6.0 * positions * layers * student.width * teacher.width}


def selection_flops(
    lengths: Sequence[int],
    asked: float,
    selection: SelectionTable,
    teacher: Shape | None,
    student: Shape,
) -> dict[str, float]:
    """Operations of asking the models which of so many tokens are chosen: "selection", or nothing."""
    if not is_scored(selection):
        return {}
    operations = 0.0
    if selection.by in ("student_entropy", "divergence"):
        operations += student.trunk(lengths) + student.head(asked)
    if selection.by in ("teacher_entropy", "divergence") and teacher:
        operations += teacher.head(asked)
    return {"selection": operations}


def training_flops(
    lengths: Sequence[int],
    positions: float,
    teacher: Shape | None,
    student: Shape,
    full: bool,
    checkpointing: bool = False,
    adapters: Adapters | None = None,
    alone: float = 0.0,
) -> dict[str, float]:
    """Operations by part of training on sequences of these lengths, with so many loss positions in
    all of them, `alone` of which learn from the text alone.

    `full` trains every matrix; otherwise they are frozen and `adapters` train (None: all blocks,
    their own cost left out).
    """
    passes = 3 if full else 2  # the gradient of frozen matrices is not computed
    trunk = _trained_trunk(lengths, student, passes, checkpointing, adapters)
    heads, loss = passes * student.head(positions), LOSS_OPERATIONS_ALONE * positions
    parts = {}
    if teacher:
        parts["teacher"] = teacher.trunk(lengths)
        heads += teacher.head(positions - alone)
        loss = LOSS_OPERATIONS * (positions - alone) + LOSS_OPERATIONS_ALONE * alone
    return parts | {"student": trunk, "head": heads, "loss": float(loss * student.vocabulary)}


def _trained_trunk(
    lengths: Sequence[int],
    shape: Shape,
    passes: int,
    checkpointing: bool,
    adapters: Adapters | None,
) -> float:
    # of the blocks; what lies below sees no gradient
    share = adapters.blocks / shape.layers if adapters else 1.0
    forward, tokens = shape.trunk(lengths), float(sum(lengths))
    low_rank = 2.0 * adapters.weights * tokens if adapters else 0.0
    spared = 0.0 if adapters else 2.0 * shape.layers * shape.width * shape.ffn * tokens
    again = share * (forward - spared) + low_rank if checkpointing else 0.0
    return share * shape.trunk(lengths, passes, 3) + (1 - share) * forward + 3 * low_rank + again


def flops_counter(
    recipe: Recipe, teacher: Path | None, student: Path, once: bool = False
) -> Callable[[Step], dict[str, float]]:
    """What a step of a recipe costs by part; {} where a model is not a dense decoder of a known
    kind. Hidden states that are kept cost no pass through the teacher's trunk: those on disk none
    at all, those in memory (`once`) none after the first.
    """
    table, kind = recipe.student, recipe.teacher.cache
    ours = Shape.of(read_config(student))
    teaches = recipe.objective.kd_weight > 0 and kind in ("off", "hidden")
    theirs = Shape.of(read_config(teacher)) if teaches and teacher else None
    if ours is None or (teaches and theirs is None):
        return lambda step: {}
    adapters = Adapters.of(table, ours)

    def counted(step: Step) -> dict[str, float]:
        full = table.tuning == "full"
        checkpointing, selection = table.gradient_checkpointing, recipe.selection
        matched = recipe.objective.matched_layers
        parts = step_flops(step, theirs, ours, full, checkpointing, adapters, selection, matched)
        if kind == "hidden":
            parts.pop("teacher", None)
        elif once and theirs:
            parts["teacher"] = theirs.trunk(_first_read(step))
        return parts

    return counted


def _first_read(step: Step) -> list[int]:
    """The lengths of what no earlier epoch read, each once."""
    lengths = {
        name: int(length)
        for batch in step.batches
        for name, length in zip(batch.ids, batch.lengths, strict=True)
    }
    return [lengths[name] for name in sorted(step.new)]


def total_flops(steps: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sums over steps by part, and `total`; {} where they were not counted."""
    totals: dict[str, float] = {}
    for step in steps:
        for part, value in step.items():
            totals[part] = totals.get(part, 0.0) + value
    return totals | {"total": sum(totals.values())} if totals else {}
