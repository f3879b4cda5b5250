"""What the config of a dense decoder says of its size: numbers in its weights, bytes of a teacher.

In: a `config.json` as a dict. Out: `Dense`, its shape and what else decides how many numbers it
has. Decided here: which configs can be planned from.
"""

from dataclasses import dataclass

from mlx_distill.backends.packed import packed_by_bitsandbytes
from mlx_distill.cost.flops import Shape
from mlx_distill.errors import ModelError

FLOAT = 4  # bytes of a trained number, its gradient and each of its moments
NF4_GROUP, NF4_NESTED_GROUP = 64, 256  # numbers that share a scale, scales that share one
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Dense:
    """A dense decoder as its config describes it: what decides its size beside its shape."""

    shape: Shape
    tied: bool
    head_norms: bool  # Qwen3's norms of queries and keys
    biases: int  # numbers a block
    stored: str  # dtype
    bits: int | str  # of a stored quantised weight, or "nf4"; 0 = not quantised
    group_size: int  # weights that share a scale and a bias, where quantised
    nested: bool = False  # bitsandbytes' scales are quantised in turn

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
        four = packed_by_bitsandbytes(config)
        return cls(
            shape,
            config.get("tie_word_embeddings", True),
            family.startswith("qwen3"),
            _biases(config, shape),
            stored,
            "nf4" if four else packed.get("bits", 0),
            packed.get("group_size", 64),
            four and config["quantization_config"].get("bnb_4bit_use_double_quant", False),
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
    def of_whole_groups(self) -> int:
        """Numbers in the matrices that MLX quantises: whose rows are whole groups."""
        fitting = [
            inputs * outputs
            for inputs, outputs in self.shape.matrices().values()
            if inputs % self.group_size == 0
        ]
        ends = self.vocabulary_weights if self.shape.width % self.group_size == 0 else 0
        return ends + self.shape.layers * sum(fitting)

    @property
    def parameters(self) -> int:
        return self.matrices + self.vectors


def _biases(config: dict, shape: Shape) -> int:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = queries + 2 * keys if config.get("model_type") == "qwen2" else 0
    if config.get("attention_bias"):
        attention = queries + 2 * keys + shape.width
    return attention + (2 * shape.ffn + shape.width if config.get("mlp_bias") else 0)


def teacher_bytes(
    model: Dense, quantize_bits: int | str, device_dtype: str, compute_dtype: str = "auto"
) -> float:
    """A frozen teacher's weights in its `compute_dtype`; "auto" is float32 where the device computes
    in it, as stored elsewhere.
    """
    stored = "float32" if device_dtype == "float32" else model.stored
    number = DTYPE_BYTES.get(stored if compute_dtype == "auto" else compute_dtype, 2)
    return frozen_bytes(model, quantize_bits, number)


def frozen_bytes(model: Dense, quantize_bits: int | str, number: int) -> float:
    """Weights that do not train, of so many bytes a number, but those that are packed, as stored or
    on load.
    """
    bits = model.bits or quantize_bits
    if isinstance(bits, str):
        blocks = model.shape.layers * model.shape.block_weights()
        scale = 1 + FLOAT / NF4_NESTED_GROUP if model.nested else FLOAT
        return blocks * (1 / 2 + scale / NF4_GROUP) + (model.parameters - blocks) * number
    packed = model.of_whole_groups if bits else 0
    each = bits / 8 + 2 * number / model.group_size
    return packed * each + (model.parameters - packed) * number
