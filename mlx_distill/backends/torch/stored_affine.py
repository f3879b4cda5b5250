"""A folder that MLX quantised, loaded by transformers as it is stored.

In: the folder's config.json and the names of its tensors. Out: what `from_pretrained` needs to put
affine modules where the folder has packed matrices. Decided here: which of MLX's formats are known.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mlx_distill.backends.torch.affine import (
    BITS,
    WORD,
    Affine,
    AffineEmbedding,
    Packing,
    TiedHead,
    become,
)
from mlx_distill.errors import ModelError
from mlx_distill.models.keys import QUANTISATION
from mlx_distill.models.weights import Weights

METHOD = "mlx_affine"
SCALES = ".scales"


class AffineConfig(QuantizationConfigMixin):
    """Which modules are packed, and how."""

    def __init__(self, packings: dict[str, Packing]):
        super().__init__(METHOD)
        self.packings = packings


@register_quantizer(METHOD)
class AffineQuantizer(HfQuantizer):
    """Puts empty affine modules into a model before its weights are read."""

    requires_calibration = True  # the weights are packed already

    def __init__(self, quantization_config: AffineConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs | {"pre_quantized": True})

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        modules = dict(model.named_modules())
        for path, packing in self.quantization_config.packings.items():
            if isinstance(modules.get(path), nn.Linear | nn.Embedding):
                _expect(become(modules[path], packing))  # what is no module here is not expected
        embedding = model.get_input_embeddings()
        if model.config.tie_word_embeddings and isinstance(embedding, AffineEmbedding):
            model.set_output_embeddings(TiedHead(embedding))
            model._tied_weights_keys = model.all_tied_weights_keys = {}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, Affine):
                module.hold(module.weight.view(torch.int32), module.scales, module.biases)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _expect(module: Affine) -> None:
    """Make room for what the folder has of its matrix, under the folder's names."""
    (rows, width), packing = module.weight.shape, module.packing
    made: dict[str, Any] = {"device": module.weight.device}
    words = torch.empty(rows, width * packing.bits // WORD, dtype=torch.int32, **made)
    groups = torch.empty(rows, width // packing.group_size, dtype=module.weight.dtype, **made)
    del module.weight
    for name, room in (("weight", words), ("scales", groups), ("biases", groups.clone())):
        module.register_buffer(name, room)


def stored_packings(config: dict[str, Any], weights: Weights, name: str) -> dict[str, Packing]:
    """By the path of each packed module; nothing for a folder that MLX did not quantise.

    Raises `ModelError` for a format of MLX's that is not its affine one.
    """
    said = config.get(QUANTISATION[0])
    if not isinstance(said, dict):
        return {}
    paths = [key.removesuffix(SCALES) for key in weights.tensors if key.endswith(SCALES)]
    return {path: _packing(_of(path, said), f"{name}: {path}") for path in paths}


def _of(path: str, said: dict[str, Any]) -> dict[str, Any]:
    """A module's own settings, else everybody's."""
    own = said.get(path)
    return said | own if isinstance(own, dict) else said


def _packing(said: dict[str, Any], where: str) -> Packing:
    bits, group_size, mode = (said.get(key) for key in ("bits", "group_size", "mode"))
    if mode not in (None, "affine") or bits not in BITS or not isinstance(group_size, int):
        raise ModelError(
            f"{where} is stored in mode {mode!r} with {bits} bits in groups of {group_size}, but "
            f"torch has MLX's affine format alone ({', '.join(map(str, BITS))} bits): use "
            "--backend mlx, or the original model"
        )
    return Packing(bits, group_size)
