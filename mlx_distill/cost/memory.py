"""What a training step holds in memory, by part and by moment, counted from two configs before any
weight is loaded.

In: a recipe, the two models as their config.json describes them, the shapes of the micro-batches, a
machine. Out: the bytes of each moment that can be the peak. Decided here: what is kept, and what is
under way.

A step has a few moments that can be its peak, for a micro-batch of n = B·T tokens of which N carry
loss. Above the weights and the optimizer's state there are

    teacher           kept + part of the teacher's forward pass          (both trunks are one lazy
    graph) loss              kept + the walk over the vocabulary + the head's gradient
    joining           kept + the head's gradient twice                   (its blocks and their
    concatenation) backward begins   kept + one block's working set + the head's gradient
    backward ends     one block kept + its working set + all gradients, the tied embedding's twice
    update            all gradients + what the optimizer has under way
    validation        a forward pass or a walk over whole sequences

and all but the last two the gradients held from the micro-batches before, if a step has several. An
eager backend's teacher has finished before the student keeps anything, its head's gradient is made
in one piece, and it adds a gradient to the held one as soon as it is there. `kept` is what the
backward pass needs of the forward pass, counted from the Llama block in `_kept_per_token`. What is
under way at one moment (a block's working set, the walk's window) cannot be counted on paper where
execution runs ahead of what frees memory, nor what an allocator does not give back: these numbers
are in `Calibration` and come from measurement (benchmarks/bench_plan.py, which also says how far
off the sum is). Axes: B sequences, T tokens, N loss positions, V vocabulary, D width, F width of
the MLP, H heads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from mlx_distill.backends import chunks
from mlx_distill.cost.flops import Adapters, Shape
from mlx_distill.errors import ModelError
from mlx_distill.machine import Machine
from mlx_distill.recipe.recipe import Recipe

if TYPE_CHECKING:
    pass

FLOAT = 4  # bytes of a trained number, its gradient and each of its moments
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# what was measured


@dataclass(frozen=True)
class Working:
    """Numbers alive at once per token while blocks are worked on, in units of the block's widths;
    scores per T² of a head.
    """

    width: float  # of (D + heads · head_dim) / 2
    keys: float  # of kv_heads · head_dim
    ffn: float
    scores: float

    def bytes(self, shape: Shape, micro: "Micro", size: int) -> float:
        width, keys = (
            (shape.width + shape.heads * shape.head_dim) / 2,
            shape.kv_heads * shape.head_dim,
        )
        per_token = self.width * width + self.keys * keys + self.ffn * shape.ffn
        return size * (micro.tokens * per_token + self.scores * shape.heads * micro.scores)


@dataclass(frozen=True)
class Update:
    """What an optimizer has under way in its step: whole trees of the trained numbers, blocks of
    them, vocabulary matrices.
    """

    trees: float
    blocks: float
    heads: float


@dataclass(frozen=True)
class Slack:
    """What a process holds beyond its live tensors, where memory is what the operating system
    counts.
    """

    # bytes: code that is loaded with the models, the workspace of a matrix library for products of
    # a chunk
    fixed: float
    # full → bytes a kept byte of the model's widths and of the MLP's: what is freed between kept
    # tensors is not filled again. None under checkpointing, see backends/torch/resident.py
    holes: dict[bool, tuple[float, float]]
    # bytes: tensors of this size and more are given back when they are freed, and leave none
    largest: int


@dataclass(frozen=True)
class Calibration:
    """Constants of one backend, fitted to measured peaks of random dense models. Another backend is
    another instance.
    """

    # a micro-batch is one graph: teacher and student run together, new gradients lie beside held
    # ones
    lazy: bool
    ffn_kept: float  # tensors of the MLP's width a token keeps
    # attention's probabilities a token keeps: 0 where training runs a fused kernel, which keeps its
    # result
    scores_kept: float
    dora_kept: float  # tensors of an adapted matrix's outputs that DoRA keeps
    backward: dict[
        tuple[bool, bool], Working
    ]  # (full, checkpointing) → a block in the backward pass
    backward_end: float  # share of that under checkpointing when the last block is reached
    forward: Working
    teacher_share: dict[
        bool, float
    ]  # of the teacher's forward that meets the student's kept tensors, by checkpointing
    window: dict[
        str, tuple[float, float]
    ]  # blocks of logits the walk holds: fixed, and for each block of the vocabulary
    jsd: float  # more of these blocks where the divergence is not one of the two KLs
    cross_rows: dict[
        str, int
        # positions of a block that exist at once, the logits themselves aside; all where nothing is
        # said
    ]
    block_elements: dict[str, int]
    widest_block: dict[str, int]  # ids; any number where nothing is said
    update: dict[str, Update]
    slack: dict[str, Slack]  # by device; absent where a framework counts its own arrays


MLX = Calibration(
    lazy=True,
    # gate, its sigmoid, their product, up, and the product that enters the last matrix
    ffn_kept=5.0,
    scores_kept=1.0,  # MLX trains through the unfused form, on the CPU and on Metal
    dora_kept=1.0,
    backward={
        (True, False): Working(18.5, 4.5, 1.7, 2.0),
        (False, False): Working(14.0, 3.0, 1.9, 1.9),
        (True, True): Working(37.0, 3.0, 16.5, 3.2),
        (False, True): Working(16.0, 8.0, 18.5, 1.3),
    },
    backward_end=0.8,
    forward=Working(14.0, 4.0, 2.3, 0.9),
    teacher_share={False: 0.75, True: 1.05},
    window={
        "alone": (8.0, 1.0),
        "plain": (14.0, 2.0),
        "heated": (19.0, 3.0),
    },  # heated: at a temperature other than 1
    jsd=0.0,  # not measured
    cross_rows={},
    block_elements={
        "cpu": chunks.MLX_BLOCK_ELEMENTS["cpu"],
        "metal": chunks.MLX_BLOCK_ELEMENTS["gpu"],
        "cuda": chunks.MLX_BLOCK_ELEMENTS["gpu"],
    },
    widest_block=chunks.MLX_WIDEST_BLOCK,
    update={"adamw": Update(0, 4, 1.5), "lion": Update(1, 4, 1), "adafactor": Update(0, 5.3, 2.1)},
    slack={},
)
# Live bytes of each phase were counted below torch's allocator (malloc and free), resident bytes
# beside them, on Linux's CPU: what is kept and the walk are as autograd's saved tensors and
# backends/torch/loss.py say; the rest is fitted. The slack is glibc's: another C library was not
# measured.
TORCH = Calibration(
    lazy=False,
    ffn_kept=4.0,  # gate, its activation, up, and the product
    scores_kept=0.0,  # the fused kernel, grouped queries too
    dora_kept=2.0,  # a matrix's result and its adapter's
    backward={
        (True, False): Working(1.0, 0.0, 1.5, 0.0),
        (False, False): Working(0.0, 0.0, 1.0, 0.0),
        (True, True): Working(8.0, 2.0, 7.0, 0.0),
        (False, True): Working(6.0, 2.0, 7.3, 0.0),  # with what the block keeps anew
    },
    backward_end=1.0,
    forward=Working(5.0, 2.0, 3.0, 0.0),
    teacher_share={False: 1.0, True: 1.0},
    window={
        "alone": (2.0, 0.0),
        "plain": (3.0, 0.0),
        "heated": (5.0, 0.0),
    },  # buffers [C, V], whatever C · V
    cross_rows={"cpu": chunks.TORCH_ROWS_AT_ONCE},
    # the distance, the two ratios, the two terms less the one that is the distance, and where one
    # is larger
    jsd=4.25,
    block_elements={"cpu": 2**62, "cuda": 2**62},  # the vocabulary is not cut
    widest_block={},
    update={
        "adamw": Update(0, 0, 0),
        "lion": Update(0, 0, 0),
        "adafactor": Update(0, 0, 3),
    },  # AdamW's is fused; torch has no Lion
    slack={
        "cpu": Slack(fixed=60e6, holes={True: (1.0, 0.0), False: (1.1, 1.1)}, largest=2**25)
    },  # glibc's own limit, 32 MiB
)
CALIBRATIONS = {"mlx": MLX, "torch": TORCH}


# the models


@dataclass(frozen=True)
class Dense:
    """A dense decoder as its config describes it: what decides its size beside its shape."""

    shape: Shape
    tied: bool
    head_norms: bool  # Qwen3's norms of queries and keys
    biases: int  # numbers a block
    stored: str  # dtype
    bits: int  # of a stored quantised weight; 0 = not quantised
    group_size: int  # weights that share a scale and a bias, where quantised

    @classmethod
    def of(cls, config: dict, name: str) -> "Dense":
        """Raises `ModelError` where the config is not one of a dense Llama or Qwen."""
        shape = Shape.of(config)
        if shape is None:
            raise ModelError(
                f"{name}: its cost cannot be planned, since its config.json "
                f"({config.get('model_type', 'no model_type')}) does not "
                "describe a dense decoder as Llama and Qwen do; `run` works all the same where "
                "the backend knows the family"
            )
        family = config.get("model_type", "")
        stored = config.get("dtype") or config.get("torch_dtype") or "float32"
        packed = config.get("quantization") or {}
        return cls(
            shape,
            config.get("tie_word_embeddings", True),
            family.startswith("qwen3"),
            _biases(config, shape),
            stored,
            packed.get("bits", 0),
            packed.get("group_size", 64),
        )

    @property
    def vocabulary_weights(self) -> int:
        """Numbers of embedding and head together."""
        return (1 if self.tied else 2) * self.shape.vocabulary * self.shape.width

    @property
    def vectors(self) -> int:
        """Numbers in norms and biases."""
        shape = self.shape
        return (
            shape.layers * (2 * shape.width + 2 * shape.head_dim * self.head_norms + self.biases)
            + shape.width
        )

    @property
    def matrices(self) -> int:
        return self.vocabulary_weights + self.shape.layers * self.shape.block_weights()

    @property
    def parameters(self) -> int:
        return self.matrices + self.vectors


def _biases(config: dict, shape: Shape) -> int:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = queries + 2 * keys if config.get("model_type") == "qwen2" else 0
    if config.get("attention_bias"):
        attention = queries + 2 * keys + shape.width
    return attention + (2 * shape.ffn + shape.width if config.get("mlp_bias") else 0)


def teacher_bytes(model: Dense, quantize_bits: int, device_dtype: str) -> float:
    """A frozen teacher's weights: float32 where the device computes in it, as stored elsewhere;
    quantised by groups of 64.
    """
    number = FLOAT if device_dtype == "float32" else DTYPE_BYTES.get(model.stored, 2)
    packed = quantize_bits or model.bits
    bits = packed + 2 * 8 * number / model.group_size if packed else 8 * number
    return model.matrices * bits / 8 + model.vectors * number


# what a step holds


@dataclass(frozen=True)
class Micro:
    """The shape of a micro-batch: B sequences padded to T tokens, N loss positions (padded)."""

    sequences: int
    length: int
    positions: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def scores(self) -> int:
        """Entries of one head's attention matrices."""
        return self.sequences * self.length**2


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


PARTS = tuple(field.name for field in fields(Moment))[1:]


@dataclass(frozen=True)
class Memory:
    """Everything the moments are made from: two models, a recipe, a number format and the constants
    of a backend.
    """

    recipe: Recipe
    teacher: Dense | None
    student: Dense
    machine: Machine
    constants: Calibration

    @property
    def full(self) -> bool:
        return self.recipe.student.tuning == "full"

    @property
    def dtype(self) -> str:
        asked = self.recipe.student.compute_dtype
        return self.machine.dtype if asked == "auto" else asked

    @property
    def number(self) -> int:
        """Bytes of a computed number."""
        return DTYPE_BYTES[self.dtype]

    @property
    def teaches(self) -> bool:
        return self.teacher is not None and self.recipe.objective.kd_weight > 0

    @property
    def blocks(self) -> int:
        """Blocks that gradients reach."""
        adapters = Adapters.of(self.recipe.student, self.student.shape)
        return (
            min(adapters.blocks, self.student.shape.layers)
            if adapters
            else self.student.shape.layers
        )

    def trainable(self) -> int:
        if self.full:
            return self.student.parameters
        adapters = Adapters.of(self.recipe.student, self.student.shape)
        return adapters.weights + (
            self.blocks * sum(self._adapted_outputs())
            if self.recipe.student.tuning == "dora"
            else 0
        )

    def optimizer_numbers(self) -> int:
        kind = self.recipe.optim.optimizer
        if kind != "adafactor":
            return self.trainable() * {"adamw": 2, "lion": 1}[kind]
        shape = self.student.shape
        if self.full:  # a row and a column for each matrix, vectors as they are
            ends = [sum(matrix) for matrix in shape.matrices().values()]
            vocabulary = (1 if self.student.tied else 2) * (shape.vocabulary + shape.width)
            return vocabulary + shape.layers * sum(ends) + self.student.vectors
        rank, names = self.recipe.student.rank, self._targets()
        ends = [sum(shape.matrices()[name]) + 2 * rank for name in names]
        return self.blocks * (
            sum(ends)
            + (sum(self._adapted_outputs()) if self.recipe.student.tuning == "dora" else 0)
        )

    def _targets(self) -> list[str]:
        return [
            name
            for name in self.recipe.student.lora_targets
            if name in self.student.shape.matrices()
        ]

    def _adapted_outputs(self) -> list[int]:
        return [self.student.shape.matrices()[name][1] for name in self._targets()]

    def student_bytes(self) -> float:
        """float32 weights and the copy that is computed in; frozen ones in the computed format
        beside float32 adapters.
        """
        weights = self.student.parameters
        if self.full:
            return weights * (FLOAT + (self.number if self.dtype != "float32" else 0))
        return weights * self.number + FLOAT * self.trainable()

    def teacher_bytes(self) -> float:
        return (
            teacher_bytes(self.teacher, self.recipe.teacher.quantize_bits, self.machine.dtype)
            if self.teacher
            else 0.0
        )

    def moments(
        self, training: Iterable[Micro], validation: Iterable[Micro], accumulates: bool
    ) -> list[Moment]:
        """The peak of each moment over the micro-batches."""
        found: dict[str, Moment] = {}
        shapes = [(self._training_moments, micro) for micro in training] + [
            (self._validation_moments, micro) for micro in validation
        ]
        for moments, micro in shapes:
            for moment in moments(micro, accumulates):
                if moment.name not in found or moment.total > found[moment.name].total:
                    found[moment.name] = moment
        return list(found.values())

    def _moment(
        self,
        name: str,
        gradients: float = 0.0,
        activations: float = 0.0,
        loss: float = 0.0,
        updating: float = 0.0,
    ) -> Moment:
        optimizer, slack = (
            FLOAT * self.optimizer_numbers() + updating,
            self.constants.slack.get(self.machine.device),
        )
        fixed = slack.fixed if slack else 0.0
        return Moment(
            name,
            self.teacher_bytes(),
            self.student_bytes(),
            gradients,
            optimizer,
            activations,
            loss,
            fixed,
        )

    def _training_moments(self, micro: Micro, accumulates: bool) -> Iterator[Moment]:
        """What is in the holes of the forward pass stays to the end of the step."""
        holes = self._holes_bytes(micro)
        for moment in self._live_moments(micro, accumulates):
            yield replace(moment, allocator=moment.allocator + holes)

    def _live_moments(self, micro: Micro, accumulates: bool) -> Iterator[Moment]:
        c, checkpointing = self.constants, self.recipe.student.gradient_checkpointing
        gradients = float(FLOAT * self.trainable())
        held = gradients if accumulates else 0.0
        kept, one = self._kept_bytes(micro), self._block_kept_bytes(micro)
        working = c.backward[self.full, checkpointing].bytes(self.student.shape, micro, self.number)
        head = (
            float(FLOAT * self.student.shape.vocabulary * self.student.shape.width)
            if self.full
            else 0.0
        )
        hidden = self._hidden_bytes(micro)
        if self.teaches:
            forward = c.teacher_share[checkpointing] * self._forward_bytes(self.teacher, micro)
            yield self._moment("teacher", held, c.lazy * kept + forward)
        yield self._moment(
            "loss",
            held,
            kept,
            self._walk_bytes(micro, self.recipe.objective.temperature) + hidden + head,
        )
        if c.lazy:
            yield self._moment("joining", held, kept, 2 * head + hidden)
        yield self._moment("backward begins", held, kept + working, head)
        last = c.backward_end * working if checkpointing else one + working
        yield self._moment(
            "backward ends", c.lazy * held + gradients + head * self.student.tied, last
        )
        yield self._moment("update", gradients, updating=self._update_bytes(gradients, head))

    def _validation_moments(self, micro: Micro, accumulates: bool) -> Iterator[Moment]:
        models = [self.student, *([self.teacher] if self.teacher else [])]
        forward = max(self._forward_bytes(model, micro) for model in models)
        walk = (
            self._walk_bytes(micro, 1.0)
            if self.teacher
            else self._walk_bytes(micro, 1.0, alone=True)
        )
        yield self._moment("validation", activations=forward)
        yield self._moment("validation's loss", loss=walk + self._hidden_bytes(micro))

    def _kept_per_token(self) -> float:
        """Numbers a block keeps for its backward pass per token, attention's scores aside.

        Of width D: the block's input and the sum after attention, which its norms divide by their
        own size; each norm's result, where it enters a matrix that has a gradient; for the gradient
        of a norm's own weight what it multiplies. Of the heads' widths: scaled queries, keys,
        values, attention's result. Of the MLP's: see `Calibration.ffn_kept`, of which the last is
        only kept for the gradient of the last matrix.
        """
        shape = self.student.shape
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        plain = 2 * shape.width + queries + 2 * keys + (self.constants.ffn_kept - 1) * shape.ffn
        norms, fused = (queries + keys) * self.student.head_norms, not self.constants.scores_kept
        if self.full:
            return plain + 4 * shape.width + queries + shape.ffn + 2 * norms
        names = set(self._targets())
        inputs = shape.width * (
            bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names & {"gate_proj", "up_proj"})
        )
        inputs += (
            queries * (fused or "o_proj" in names)
            + shape.ffn * ("down_proj" in names)
            + self.recipe.student.rank * len(names)
        )
        dora = (
            self.constants.dora_kept * sum(self._adapted_outputs())
            if self.recipe.student.tuning == "dora"
            else 0
        )
        return plain + norms + inputs + dora

    def _block_kept_bytes(self, micro: Micro) -> float:
        scores = self.constants.scores_kept * self.student.shape.heads * micro.scores
        return self.number * (micro.tokens * self._kept_per_token() + scores)

    def _kept_bytes(self, micro: Micro) -> float:
        if self.recipe.student.gradient_checkpointing:
            return float(self.number * self.blocks * micro.tokens * self.student.shape.width)
        return self.blocks * self._block_kept_bytes(micro)

    def _holes_bytes(self, micro: Micro) -> float:
        """What the allocator holds between kept tensors: the forward pass frees its temporaries
        there and does not fill them again.
        """
        slack = self.constants.slack.get(self.machine.device)
        if slack is None or self.recipe.student.gradient_checkpointing:
            return 0.0
        shape, size = self.student.shape, self.number * micro.tokens
        of_ffn = (
            self.constants.ffn_kept - 1 + (self.full or "down_proj" in self._targets())
        ) * shape.ffn
        widths, ffn = slack.holes[self.full]
        small = widths * (self._kept_per_token() - of_ffn) * (size * shape.width < slack.largest)
        small += ffn * of_ffn * (size * shape.ffn < slack.largest)
        return self.blocks * size * small

    def _forward_bytes(self, model: Dense, micro: Micro) -> float:
        number = FLOAT if self.machine.dtype == "float32" else DTYPE_BYTES.get(model.stored, 2)
        return self.constants.forward.bytes(model.shape, micro, number)

    def _hidden_bytes(self, micro: Micro) -> float:
        widths = 3 * self.student.shape.width + (self.teacher.shape.width if self.teacher else 0)
        return float(FLOAT * micro.positions * widths)

    def _walk_bytes(self, micro: Micro, temperature: float, alone: bool | None = None) -> float:
        """The loss: so many blocks [C, V / blocks] of float32, and on a GPU the promoted blocks of
        the heads.
        """
        alone = not self.teaches if alone is None else alone
        vocabulary = (
            self.student.shape.vocabulary
            if alone
            else min(self.student.shape.vocabulary, self.teacher.shape.vocabulary)
        )
        chunk = chunks.chunk_tokens(
            self.recipe.objective.chunk_tokens, self.machine.backend, self.machine.device
        )
        rows = min(chunk, micro.positions)
        if not self.constants.lazy and rows:
            rows = chunks.even_chunk(micro.positions, chunk)
        blocks = chunks.vocabulary_blocks(
            vocabulary,
            rows,
            self.constants.block_elements[self.machine.device],
            self.constants.widest_block.get(self.machine.device, 0),
        )
        fixed, each = self.constants.window[
            "alone" if alone else "plain" if temperature == 1 else "heated"
        ]
        if not alone and self.recipe.objective.divergence not in ("forward_kl", "reverse_kl"):
            fixed += self.constants.jsd
        widths = self.student.shape.width * (not self.full) + (
            0 if alone else self.teacher.shape.width
        )
        promoted = FLOAT * vocabulary / blocks * widths if self.machine.dtype != "float32" else 0.0
        logits, crossed = (
            1 if alone else 2,
            min(rows, self.constants.cross_rows.get(self.machine.device, rows)),
        )
        buffers = logits * rows + (fixed + each * blocks - logits) * crossed
        return FLOAT * buffers * vocabulary / blocks + promoted

    def _update_bytes(self, gradients: float, head: float) -> float:
        update = self.constants.update[self.recipe.optim.optimizer]
        vocabulary = head * (1 if self.student.tied else 2)
        block = (gradients - vocabulary) / max(1, self.blocks)
        under_way = update.blocks * block + update.heads * vocabulary
        return update.trees * gradients + min(gradients, under_way)
