"""Peak memory of a run, estimated from two configs before any weight is loaded.

In: a recipe, the two models as their config.json describes them, the shapes of the micro-batches, a
machine. Out: the bytes of each moment that can be the peak. Decided here: what is held when.

A micro-batch has n = B·T tokens, N of them with loss. Always held are both models' weights and the
optimizer's state. Above them, in bytes:

    kept      what the blocks keep for the backward pass, counted in `_kept_per_token`; under
              gradient checkpointing each block keeps its input alone
    block     what one block keeps without checkpointing: the measure of what is under way while a
              block is computed
    walk      the loss: logits [C, V] of a chunk for each model, and a few blocks of them
    head      float32[V, D]: the gradient of a head that trains
    held      the gradients of the micro-batches before, where a step has several

    moment            holds
    teacher           held + (MLX: kept, both trunks are one lazy graph) + a block of the teacher
    loss              held + kept + head + walk  (MLX: head again, joined from blocks, if larger)
    backward begins   held + kept + head + the block under way
    backward ends     all gradients (MLX: beside those held) + a tied embedding's second gradient
                      + the block under way
    update            all gradients + what MLX has under way in the optimizer's lazy step
    validation        a block of the larger model, or a walk, over whole sequences
    writing           the writer's block over the longest prompts, their keys and values until the
                      longest text ends, and its logits; of the rest of a run only what is loaded

What a backend has under way, and what the C library keeps of freed memory, cannot be counted on
paper. `Habits` has one measured number for each; `mlx-distill plan --probe` measures the sum.
Axes: B sequences, T tokens, N loss positions, V vocabulary, D width, F width of the MLP, C
positions of a chunk.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

from mlx_distill.backends import chunks
from mlx_distill.cost.dense import DTYPE_BYTES, FLOAT, Dense, frozen_bytes
from mlx_distill.cost.weights import Weights
from mlx_distill.cost.writing import kv_bytes
from mlx_distill.machine import versions


@dataclass(frozen=True)
class Habits:
    """What a backend keeps (counted in its code) and has under way (measured on a CPU)."""

    lazy: bool  # a micro-batch is one graph, and new gradients lie beside the held ones
    ffn_kept: int  # tensors [n, F] that an MLP keeps
    scores_kept: int  # attention matrices [n, T] a head keeps, where no fused kernel keeps none
    dora_kept: int  # outputs of an adapted matrix that DoRA keeps
    recomputing: float  # blocks under way where each is computed again; otherwise there is one
    blocks_under_way: int  # of logits [C, V / blocks], beside those of each model


HABITS = {
    "mlx": Habits(
        lazy=True,
        ffn_kept=5,  # gate, its sigmoid, their product, up, and the product with up
        scores_kept=1,
        dora_kept=1,
        recomputing=3.0,  # execution runs ahead of what frees memory
        blocks_under_way=7,
    ),
    "torch": Habits(
        lazy=False,
        ffn_kept=4,  # gate, its activation, up, and the product
        scores_kept=0,
        dora_kept=2,
        recomputing=2.0,  # what the block keeps anew, and its gradients
        blocks_under_way=0,
    ),
}
# MLX's attention keeps scores for its backward pass, but on Metal from this version on not at these
# widths of a head (mlx-metal's ScaledDotProductAttentionVJP; for the others it takes the plain
# formula). A forward pass alone keeps none at these widths.
FUSED_BACKWARD_SINCE = (0, 32, 4)
FUSED_WIDTHS = (64, 72, 80, 96, 128)
# [rows, V] float32 that the elementwise part of torch's walk works in, for a KL at temperature 1
# and for anything else
TORCH_WALK_BUFFERS = (1, 4)
# What an update has under way on MLX: under AdamW, which writes over what it reads, the squares of
# one gradient, of which the norm is made; else lazily the gradients of so many blocks and embeddings
MLX_UPDATE = (4.0, 1.5)

# torch's memory on a CPU is what the operating system counts. Beyond the tensors a process holds
# the code that it loads with the models, and glibc's holes: tensors that the forward pass frees
# between kept ones, as a share of the kept ones. Tensors of glibc's limit or more leave none.
RESIDENT_CODE = 35e6
RESIDENT_HOLES = {"full": 0.3, "lora": 1.1, "dora": 1.1}
GLIBC_LIMIT = 2**25


@dataclass(frozen=True)
class Micro:
    """The shape of a micro-batch: B sequences padded to T tokens, N loss positions (padded)."""

    sequences: int
    length: int
    positions: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Moment:
    """Bytes by part at one moment of a run."""

    name: str
    teacher: float
    student: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    allocator: float = 0.0  # beyond what is live

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def trains(self) -> bool:
        return not self.name.startswith(("validation", "writing"))


PARTS = tuple(field.name for field in fields(Moment))[1:]


@dataclass(frozen=True)
class Memory(Weights):
    """The formula: what is held throughout, and what each moment adds."""

    @property
    def habits(self) -> Habits:
        return HABITS[self.machine.backend]

    # activations

    def _kept_per_token(self) -> float:
        """Numbers a block keeps for its backward pass per token, attention's scores aside.

        Of width D: the block's input and the sum after attention, which its norms divide by their
        own size; each norm's result, where it enters a matrix that has a gradient; for the gradient
        of a norm's own weight what it multiplies. Of the heads' widths: scaled queries, keys,
        values, attention's result. Of the MLP's: see `Habits.ffn_kept`, of which the last is only
        kept for the gradient of the last matrix.
        """
        if self.full:
            return _all_kept_per_token(self.student, self.habits)
        shape, names = self.student.shape, set(self.targets())
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        fused = not self._scores_kept(self.student)
        kept = 2 * shape.width + queries + 2 * keys + (self.habits.ffn_kept - 1) * shape.ffn
        kept += (queries + keys) * self.student.head_norms
        kept += shape.width * bool(names & {"q_proj", "k_proj", "v_proj"})
        kept += shape.width * bool(names & {"gate_proj", "up_proj"})
        kept += queries * (fused or "o_proj" in names) + shape.ffn * ("down_proj" in names)
        kept += self.table.rank * len(names)
        return kept + (self.habits.dora_kept * sum(self.adapted_outputs()) if self.is_dora else 0)

    def _block_bytes(self, micro: Micro) -> float:
        """What one block keeps without checkpointing."""
        numbers = micro.tokens * self._kept_per_token() + self._scores(micro)
        return self.number * numbers + self.unpacked_for_backward()

    def _scores(self, micro: Micro) -> float:
        heads = self.student.shape.heads
        return self._scores_kept(self.student) * heads * micro.tokens * micro.length

    def _scores_kept(self, model: Dense, trains: bool = True) -> int:
        """Attention matrices [n, T] a head keeps, as the MLX that is installed computes them."""
        on_metal = (self.machine.backend, self.machine.device) == ("mlx", "metal")
        fused = on_metal and model.shape.head_dim in FUSED_WIDTHS
        if fused and (not trains or _installed_mlx() >= FUSED_BACKWARD_SINCE):
            return 0
        return self.habits.scores_kept

    def _kept_bytes(self, micro: Micro) -> float:
        if self.table.gradient_checkpointing:
            return float(self.number * self.blocks * micro.tokens * self.student.shape.width)
        return self.blocks * self._block_bytes(micro)

    def _under_way_bytes(self, micro: Micro) -> float:
        recomputing = self.table.gradient_checkpointing
        return (self.habits.recomputing if recomputing else 1) * self._block_bytes(micro)

    def _forward_bytes(self, model: Dense, micro: Micro) -> float:
        """A forward pass that keeps nothing: about what one block would keep."""
        scores = self._scores_kept(model, trains=False) * model.shape.heads * micro.length
        numbers = micro.tokens * (_all_kept_per_token(model, self.habits) + scores)
        return self._computed(model) * numbers

    def _computed(self, model: Dense) -> int:
        """Bytes of a number of a model that does not train."""
        return FLOAT if self.machine.dtype == "float32" else DTYPE_BYTES.get(model.stored, 2)

    def _holes_bytes(self, micro: Micro) -> float:
        """What glibc holds between kept tensors. None under checkpointing, where
        `backends/torch/resident.py` has freed memory given back.
        """
        large = self.number * micro.tokens * self.student.shape.width >= GLIBC_LIMIT
        if not self._resident or self.table.gradient_checkpointing or large:
            return 0.0
        return RESIDENT_HOLES[self.table.tuning] * self._kept_bytes(micro)

    @property
    def _resident(self) -> bool:
        return (self.machine.backend, self.machine.device) == ("torch", "cpu")

    # the loss

    def _hidden_bytes(self, micro: Micro) -> float:
        """float32 hidden states at the loss positions: of both models, gradients and a copy."""
        teacher = self.teacher.shape.width if self.teacher else 0
        widths = 3 * self.student.shape.width + teacher
        # of a layer that is matched: both states, what is projected, their difference, gradients
        matched = self.recipe.objective.matched_layers
        widths += matched * (2 * self.student.shape.width + 3 * teacher)
        return float(FLOAT * micro.positions * widths)

    def _walk_bytes(self, micro: Micro, temperature: float, teacher: Dense | None) -> float:
        """Logits [C, V] of each model (MLX: once more at a temperature other than 1) and what is
        under way in blocks of them; on a GPU the frozen heads' blocks in float32.
        """
        shapes = [self.student.shape, *([teacher.shape] if teacher else [])]
        vocabulary = min(shape.vocabulary for shape in shapes)
        rows, blocks = self._chunk(micro, vocabulary)
        block = FLOAT * rows * vocabulary / blocks
        frozen = sum(shape.width for shape in (shapes[1:] if self.full else shapes))
        promoted = FLOAT * vocabulary / blocks * frozen if self.machine.dtype != "float32" else 0.0
        if self.habits.lazy:
            logits = len(shapes) + (teacher is not None and temperature != 1)
            return logits * (blocks + self.habits.blocks_under_way) * block + promoted
        few = chunks.torch_rows(vocabulary, os.cpu_count() or 1)
        at_once = min(rows, few) if self.machine.device == "cpu" else rows
        kl = not teacher or self.recipe.objective.divergence in ("forward_kl", "reverse_kl")
        buffers = TORCH_WALK_BUFFERS[not (kl and temperature == 1)]
        return len(shapes) * block + buffers * FLOAT * at_once * vocabulary + promoted

    def _chunk(self, micro: Micro, vocabulary: int) -> tuple[int, int]:
        """Positions whose logits exist at once, and the blocks that their vocabulary is cut into."""
        asked = self.recipe.objective.chunk_tokens
        most = chunks.chunk_tokens(asked, self.machine.backend, self.machine.device)
        if not self.habits.lazy:
            return chunks.even_chunk(micro.positions, most) if micro.positions else 0, 1
        rows, kind = min(most, micro.positions), "cpu" if self.machine.device == "cpu" else "gpu"
        elements, widest = chunks.MLX_BLOCK_ELEMENTS[kind], chunks.MLX_WIDEST_BLOCK.get(kind, 0)
        return rows, chunks.vocabulary_blocks(vocabulary, rows, elements, widest)

    # moments

    def moments(
        self, training: Iterable[Micro], validation: Iterable[Micro], accumulates: bool
    ) -> list[Moment]:
        """The peak of each moment over the micro-batches."""
        found: dict[str, Moment] = {}
        made = [self._training_moments(micro, accumulates) for micro in training]
        made += [self._validation_moments(micro) for micro in validation]
        for moment in chain.from_iterable(made):
            if moment.name not in found or moment.total > found[moment.name].total:
                found[moment.name] = moment
        return list(found.values())

    def costliest(self, training: Iterable[Micro]) -> Micro:
        """The micro-batch of the highest peak, the optimizer's step aside: that sees no batch."""

        def peak(micro: Micro) -> float:
            moments = self._training_moments(micro, accumulates=True)
            return max(moment.total for moment in moments if moment.name != "update")

        return max(training, key=peak)

    def _moment(
        self,
        name: str,
        holes: float = 0.0,
        updating: float = 0.0,
        gradients: float = 0.0,
        activations: float = 0.0,
        loss: float = 0.0,
    ) -> Moment:
        """With what is held at all of them."""
        return Moment(
            name,
            teacher=self.teacher_bytes(),
            student=self.student_bytes(),
            gradients=gradients,
            optimizer=FLOAT * self.optimizer_numbers() + updating,
            activations=activations,
            loss=loss,
            allocator=holes + (RESIDENT_CODE if self._resident else 0.0),
        )

    def _training_moments(self, micro: Micro, accumulates: bool) -> Iterator[Moment]:
        lazy, holes = self.habits.lazy, self._holes_bytes(micro)
        gradients = float(FLOAT * self.trainable())
        held = gradients if accumulates else 0.0
        shape, kept = self.student.shape, self._kept_bytes(micro)
        unpacked = self.student_unpacked_bytes()
        head = float(FLOAT * shape.vocabulary * shape.width) if self.full else 0.0
        if self.asked:
            forward = self._forward_bytes(self.asked, micro) + self.unpacked_bytes()
            yield self._moment("teacher", holes, gradients=held, activations=lazy * kept + forward)
        walk = self._walk_bytes(micro, self.recipe.objective.temperature, self.asked)
        walk += self.head_unpacked_bytes() + (self.unpacked_bytes() if self.asked else 0.0)
        loss = max(walk, head if lazy else 0.0) + self._hidden_bytes(micro) + head
        yield self._moment("loss", holes, gradients=held, activations=kept, loss=loss)
        under_way = self._under_way_bytes(micro) + unpacked
        yield self._moment(
            "backward begins", holes, gradients=held, activations=kept + under_way, loss=head
        )
        made = lazy * held + gradients + head * self.student.tied
        yield self._moment("backward ends", holes, gradients=made, activations=under_way)
        updating = self._update_bytes(gradients, head) if lazy else 0.0
        yield self._moment("update", holes, updating, gradients=gradients)

    def _validation_moments(self, micro: Micro) -> Iterator[Moment]:
        models = [self.student, *([self.teacher] if self.teacher else [])]
        forward = max(self._forward_bytes(model, micro) for model in models)
        forward += max(self.unpacked_bytes(), self.student_unpacked_bytes())
        beside = float(FLOAT * self.trainable() * self.recipe.optim.schedule_free)  # or the mean
        yield self._moment("validation", updating=beside, activations=forward)
        loss = self._walk_bytes(micro, 1.0, self.teacher) + self._hidden_bytes(micro)
        loss += self.unpacked_bytes() + self.head_unpacked_bytes()
        yield self._moment("validation's loss", updating=beside, loss=loss)

    def writing(self, prompts: Sequence[int], writer: Dense) -> Moment:
        """While `writer` answers the longest of these prompts, by their lengths.

        One that writes once is alone then; a student that writes as it learns is not.
        """
        rollouts, number = self.recipe.rollouts, self._computed(writer)
        at_once = min(rollouts.batch_size, len(prompts))
        forward = self._forward_bytes(writer, Micro(at_once, max(prompts), 0))
        length = max(prompts) + rollouts.max_new_tokens
        made = self._moment(
            "writing",
            activations=forward + kv_bytes(writer.shape, at_once, length, number),
            loss=2.0 * FLOAT * at_once * writer.shape.vocabulary,  # logits, and what is drawn from
        )
        if rollouts.refresh_every:
            return made
        if rollouts.by == "teacher":
            return replace(made, student=0.0, optimizer=0.0)
        student = frozen_bytes(writer, self.table.quantize_bits, number)
        return replace(made, teacher=0.0, optimizer=0.0, student=student)

    def _update_bytes(self, gradients: float, head: float) -> float:
        if self.recipe.optim.optimizer == "adamw":
            shape = self.student.shape
            return min(gradients, max(head, FLOAT * shape.width * shape.ffn))
        vocabulary = head * (1 if self.student.tied else 2)
        block = (gradients - vocabulary) / max(1, self.blocks)
        return min(gradients, MLX_UPDATE[0] * block + MLX_UPDATE[1] * vocabulary)


def _installed_mlx() -> tuple[int, ...]:
    """Its version in numbers; () where it is not installed."""
    parts = versions().get("mlx", "").split(".")[:3]
    return tuple(int(part) for part in parts if part.isdigit())


def _all_kept_per_token(model: Dense, habits: Habits) -> float:
    """What `Memory._kept_per_token` counts, where every matrix and norm has a gradient."""
    shape = model.shape
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (queries + keys) * model.head_norms
    return 6 * shape.width + 2 * queries + 2 * keys + norms + habits.ffn_kept * shape.ffn
