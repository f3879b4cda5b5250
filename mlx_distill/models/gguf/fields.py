"""A model's config.json as fields of a `.gguf` file: the inverse of `config.py`.

In: what a folder's config means. Out: the fields of its architecture, and the factors of a rotary
scaling that the format keeps as a tensor. Decided here: which models llama.cpp computes as
transformers does; any other is refused by the key that is in the way.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.config import Meaning
from mlx_distill.models.gguf.file import ARCHITECTURES
from mlx_distill.models.rotary import Rotary, yarn_scale

if TYPE_CHECKING:
    from gguf import GGUFWriter

ROPE_FACTORS = "rope_freqs.weight"


def refused(name: str, found: str) -> ModelError:
    """Why a model cannot be written, with what can be done instead."""
    return ModelError(f"{name}: {found}; export --to hf or --to mlx instead")


def refuse_unwritable(meaning: Meaning) -> None:
    """Raise `ModelError` for a family, or a setting of one, that a `.gguf` file of ours cannot say."""
    name, family = meaning.name, meaning.family
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise refused(name, f"its family {family!r} cannot be written as GGUF, only {known} can")
    activation = meaning.declared.get("hidden_act")
    if activation != "silu":
        raise refused(name, f"hidden_act is {activation!r}, a {family} in llama.cpp has silu")
    layers = meaning.layers or []
    if window := next((layer.window for layer in layers if layer.window), None):
        raise refused(name, f"sliding_window is {window}, a {family} in llama.cpp sees all")
    rotary = rotary_of(meaning)
    if rotary.type not in ("default", "linear", "yarn", "llama3"):
        raise refused(name, f"rope_type is {rotary.type!r}, which has no place in a .gguf file")
    if rotary.type == "yarn":
        _refuse_unusual_yarn(name, rotary)


def add_fields(writer: "GGUFWriter", meaning: Meaning) -> None:
    """The sizes and numbers of the model; `refuse_unwritable` has let it in."""
    config = meaning.declared
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(meaning.head_dim)
    writer.add_value_length(meaning.head_dim)
    writer.add_rope_dimension_count(meaning.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_rotation(writer, rotary_of(meaning))


def rope_factors(meaning: Meaning) -> np.ndarray | None:
    """float32[head_dim / 2] by which llama.cpp divides each frequency, for `llama3`; else None."""
    rotary = rotary_of(meaning)
    if rotary.type != "llama3":
        return None
    plain = Rotary(rotary.dims, rotary.longest, parameters=_plain(rotary.parameters))
    return np.asarray(plain.angles(2)[0] / rotary.angles(2)[0], np.float32)


def rotary_of(meaning: Meaning) -> Rotary:
    """That of all layers; raises `ModelError` where one does not rotate."""
    rotaries = [layer.rotary for layer in meaning.layers or []]
    if not rotaries or rotaries[0] is None or any(each != rotaries[0] for each in rotaries):
        raise refused(meaning.name, "its layers rotate differently")
    return rotaries[0]


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": parameters["rope_theta"]}


def _add_rotation(writer: "GGUFWriter", rotary: Rotary) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rotary.parameters["rope_theta"])
    if rotary.type in ("default", "llama3"):  # the latter is a tensor of factors
        return
    writer.add_rope_scaling_type(RopeScalingType(rotary.type))
    writer.add_rope_scaling_factor(_factor(rotary))
    if rotary.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rotary.trained)


def _factor(rotary: Rotary) -> float:
    return rotary.parameters.get("factor") or rotary.longest / rotary.trained


def _refuse_unusual_yarn(name: str, rotary: Rotary) -> None:
    """llama.cpp scales attention by the factor alone, counts whole pairs, and does not read a
    file's betas.
    """
    factor = _factor(rotary)
    usual = yarn_scale({}, factor)
    found = yarn_scale(rotary.parameters, factor)
    if not math.isclose(found, usual, rel_tol=1e-6):
        raise refused(name, f"yarn's attention factor is {found:g}, llama.cpp takes {usual:g}")
    for key, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if (found := rotary.parameters.get(key) or usual) != usual:
            raise refused(name, f"yarn's {key} is {found:g}, llama.cpp takes {usual}")
    if not rotary.parameters.get("truncate", True):
        raise refused(name, "yarn's truncate is false, llama.cpp counts whole pairs")
