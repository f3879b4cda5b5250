"""MLX's affine format on torch: integers of 2 to 8 bits, and a scale and a bias for each group of them.

In: matrices, or what MLX stored of them. Out: modules that keep the integers packed and compute with
`integer * scale + bias`, made anew for each product and not kept for the backward pass. Decided
here: nothing; rounding, packing and names are those of `mx.quantize` and `mlx.nn.quantize`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BITS = (2, 3, 4, 5, 6, 8)
WORD = 32  # bits of what MLX stores
ROW = 8  # integers that fill whole bytes, whatever their bits
SMALLEST_SCALE = 1e-7


@dataclass(frozen=True)
class Packing:
    """How many bits an integer has, and how many of them share a scale and a bias."""

    bits: int
    group_size: int


def quantise(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Packed integers int32[..., D · bits / 32] and scales and biases [..., D / group_size] of a
    matrix [..., D], in its own format (`affine_quantize` of mlx/backend/cpu/quantized.cpp).
    """
    largest = 2**packing.bits - 1
    groups = weight.float().unflatten(-1, (-1, packing.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    rising = low.abs() > high.abs()
    scale = ((high - low) / largest).clamp(min=SMALLEST_SCALE)
    scale = torch.where(rising, scale, -scale)
    edge = torch.where(rising, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero == 0, scale, edge / zero)
    bias = torch.where(zero == 0, 0.0, edge)
    integers = ((groups - bias[..., None]) / scale[..., None]).round().clamp(0, largest)
    packed = pack(integers.flatten(-2).to(torch.uint8), packing.bits)
    return packed, scale.to(weight.dtype), bias.to(weight.dtype)


def dequantise(packed: Tensor, scales: Tensor, biases: Tensor, packing: Packing) -> Tensor:
    """The matrix [..., D] in the scales' format."""
    integers = unpack(packed, packing.bits).unflatten(-1, (-1, packing.group_size))
    numbers = integers.to(scales.dtype).mul_(scales[..., None]).add_(biases[..., None])
    return numbers.flatten(-2)


def pack(integers: Tensor, bits: int) -> Tensor:
    """uint8[..., D] below 2^bits as one stream of bits, the lowest first: int32[..., D · bits / 32]."""
    rows = integers.unflatten(-1, (-1, ROW)).long()
    streams = [torch.zeros_like(rows[..., 0]) for _ in range(bits)]
    for place in range(ROW):
        byte, shift = divmod(place * bits, 8)
        moved = rows[..., place] << shift
        streams[byte] |= moved & 0xFF
        if shift + bits > 8:
            streams[byte + 1] |= moved >> 8
    return torch.stack(streams, -1).to(torch.uint8).flatten(-2).view(torch.int32)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8[..., D]."""
    streams = packed.view(torch.uint8).unflatten(-1, (-1, bits))
    rows = []
    for place in range(ROW):
        byte, shift = divmod(place * bits, 8)
        found = streams[..., byte] >> shift
        if shift + bits > 8:
            found = found | (streams[..., byte + 1] << (8 - shift))
        rows.append(found & (2**bits - 1))
    return torch.stack(rows, -1).flatten(-2)


class Affine(nn.Module):
    """A module whose matrix [rows, width] is packed. What was its weight holds no numbers, only
    their format and device: whoever multiplies with it fails.
    """

    packing: Packing
    packed: Tensor  # none of these trains, and ranks do not share them
    scales: Tensor
    biases: Tensor
    weight: Tensor

    def hold(self, packed: Tensor, scales: Tensor, biases: Tensor) -> None:
        """Have this matrix, as `quantise` gives it."""
        for name in ("weight", "scales", "biases"):
            if hasattr(self, name):
                delattr(self, name)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("biases", biases)
        self.register_buffer("weight", scales.new_empty(0), persistent=False)

    def matrix(self) -> Tensor:
        """[rows, width]"""
        return dequantise(self.packed, self.scales, self.biases, self.packing)

    @property
    def numbers(self) -> int:
        """How many the matrix has."""
        return self.scales.numel() * self.packing.group_size


class AffineLinear(Affine, nn.Linear):
    """x [..., width] → [..., rows]."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias


class Shown:
    """An affine module whose weight is its matrix, made whenever somebody looks at it."""

    matrix: Callable[[], Tensor]

    @property
    def weight(self) -> Tensor:
        return self.matrix()

    def hold(self, packed: Tensor, scales: Tensor, biases: Tensor) -> None:
        self.packed, self.scales, self.biases = packed, scales, biases


class AffineEmbedding(Affine, nn.Embedding):
    """ids [...] → [..., width]."""

    def forward(self, ids: Tensor) -> Tensor:
        chosen = self.packed[ids], self.scales[ids], self.biases[ids]
        return dequantise(*chosen, self.packing)


class TiedHead(nn.Module):
    """A head that is an embedding's matrix, which it does not hold itself."""

    def __init__(self, embedding: Affine):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, which registers nothing

    @property
    def weight(self) -> Tensor:
        """Its format and device."""
        return self._embedding[0].weight

    def matrix(self) -> Tensor:
        return self._embedding[0].matrix()

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)
        return product


class _Product(torch.autograd.Function):
    """x @ matrix.T, whose matrix is made again for the backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, module: Affine | TiedHead) -> Tensor:
        context.module = module
        return functional.linear(x, module.matrix().to(x.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ context.module.matrix().to(gradient.dtype), None


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a model holds of packed matrices, by the names that MLX stores it under."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Affine):
            parts = {"weight": module.packed, "scales": module.scales, "biases": module.biases}
            found |= {f"{path}.{name}": tensor for name, tensor in parts.items()}
    return found


def cast_packed(model: nn.Module, dtype: torch.dtype) -> None:
    """Have packed matrices made in another format."""
    for module in model.modules():
        if isinstance(module, Affine):
            module.hold(module.packed, module.scales.to(dtype), module.biases.to(dtype))


def become(module: nn.Module, packing: Packing) -> Affine:
    """Make a linear or embedding module an affine one that has no matrix yet. What its class does
    besides (Gemma scales what its embedding gives) it still does.
    """
    kind = AffineLinear if isinstance(module, nn.Linear) else AffineEmbedding
    plain = type(module) in (nn.Linear, nn.Embedding)
    module.__class__ = kind if plain else type(kind.__name__, (type(module), kind), {})
    assert isinstance(module, Affine)
    module.packing = packing
    return module


def show_matrices(model: nn.Module, paths: list[str]) -> None:
    """Let code that is not ours (peft's DoRA) read the matrices of these affine layers."""
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, AffineLinear):
            del module.weight
            kind = type(module)
            module.__class__ = type(f"Shown{kind.__name__}", (Shown, kind), {})


def quantise_model(model: nn.Module, packing: Packing) -> int:
    """Quantise what `mlx.nn.quantize` would: each linear and embedding module whose width is whole
    groups; a head that is tied to its embedding once for both. Returns how many there are.
    """
    embeddings: dict[int, Affine] = {}  # by the matrix that they are made of
    fitting = [
        (path, module, module.weight)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        and module.weight.shape[-1] % packing.group_size == 0
    ]
    for path, module, matrix in fitting:
        if tied := embeddings.get(id(matrix)):
            model.set_submodule(path, TiedHead(tied))
            continue
        affine = become(module, packing)
        affine.hold(*quantise(matrix.detach(), packing))
        if isinstance(affine, AffineEmbedding):
            embeddings[id(matrix)] = affine
    return len(fitting)
