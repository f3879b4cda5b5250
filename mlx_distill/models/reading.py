"""Whether older versions of this program computed a model as this one does.

In: a model folder. Out: "" where mlx-lm alone reads its config.json as transformers does, so that
every version computed the same; else the version of our translation, which caches and runs keep
beside the model's fingerprint. Decided here: where it is not certain, it is the version.
"""

from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.models.config import Layer, Meaning, with_rope_type
from mlx_distill.models.keys import HARMLESS
from mlx_distill.models.translation import keys_for_mlx
from mlx_distill.models.weights import read_weights

TRANSLATION = "1"  # raise it when a folder that mlx-lm alone reads wrong is computed otherwise
OWN_PARTS = ("gemma", "starcoder2", "gemma3_text")  # whose activation or embedding we replace
READ_INSIDE = ("qwen3",)  # mlx-lm's class looks for rope_theta inside rope_parameters
READ_AS_WRITTEN = ("default", "linear", "llama3")  # the other types are put in mlx-lm's words
SCALED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
FILLED_ALIKE = {  # keys that mlx-lm fills in as transformers does, or needs
    "rope_parameters",
    "head_dim",
    "hidden_act",
    "num_key_value_heads",
    "tie_word_embeddings",
    "layer_types",
    "sliding_window",
    "max_window_layers",
}


def reading_of(folder: Path) -> str:
    """The mark of a folder, also of one that MLX refuses and torch may compute.

    A head that is stored though tied is read now and was not: whether it differs is not looked at.
    """
    try:
        meaning = Meaning(folder, str(folder))
    except ModelError:
        return TRANSLATION
    tied = meaning.declared.get("tie_word_embeddings")
    second_head = tied and "lm_head.weight" in read_weights(folder, str(folder)).tensors
    return TRANSLATION if second_head or _is_read_otherwise(meaning) else ""


def _is_read_otherwise(meaning: Meaning) -> bool:
    """Whether mlx-lm alone may compute something else than what the file asks for."""
    if meaning.config is None:
        return bool(keys_for_mlx(meaning))
    layers = meaning.layers or [Layer(None, 1)]
    return (
        meaning.family in OWN_PARTS
        or any(layer.window for layer in layers)
        or not _finds_rotary_keys(meaning)
        or _fills_in_otherwise(meaning)
    )


def _finds_rotary_keys(meaning: Meaning) -> bool:
    """Whether mlx-lm's class finds them where they are, in words that it knows."""
    parameters = meaning.rope_parameters()
    if not parameters:
        return True
    kind = parameters.get("rope_type") or "default"
    if kind not in READ_AS_WRITTEN:
        return False
    if meaning.family in READ_INSIDE and meaning.rope_parameters_as_stored():
        return True
    if any(isinstance(value, dict) for value in parameters.values()):
        return False
    outside = with_rope_type(meaning.stored.get("rope_scaling") or {})
    if kind == "llama3" and "original_max_position_embeddings" not in outside:
        return False
    beside = ("rope_theta", "partial_rotary_factor")
    return (
        kind == outside["rope_type"]
        and all(outside.get(key) == parameters[key] for key in SCALED if key in parameters)
        and all(meaning.stored.get(key) == parameters.get(key) for key in beside)
    )


def _fills_in_otherwise(meaning: Meaning) -> bool:
    """Whether transformers fills in a number where mlx-lm may fill in another."""
    missing = {
        key
        for key, value in meaning.declared.items()
        if meaning.stored.get(key) is None and value not in (None, False)
    }
    told = "tie_word_embeddings" in meaning.stored
    untied = not told and not meaning.declared.get("tie_word_embeddings")
    return untied or bool(missing - HARMLESS - FILLED_ALIKE)
