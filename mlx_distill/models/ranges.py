"""The numbers that a model's config.json may hold, whichever framework computes them.

In: the document. Out: nothing, or a `ModelError` that names the key. Decided here: the ranges
outside of which no model is meant, and in which every library computes finite numbers.
"""

import math
from typing import Any

from mlx_distill.errors import ModelError

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base")
BASE = (1.0, 1e15)
FACTOR = (1e-6, 1e6)
EPS = (1e-30, 1.0)
NORMS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
SCALINGS = ("rope_parameters", "rope_scaling")


def refuse_impossible(config: dict[str, Any], begin: str) -> None:
    """Raise `ModelError`, which starts with `begin`, for a key that no model can have.

    A key that is null is left to the libraries, but for the base of a rotary embedding: it is a
    family without one that lacks the key.
    """
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            _refuse_sizes(part, begin)
            _refuse_numbers(part, begin)


def _refuse_sizes(part: dict[str, Any], begin: str) -> None:
    for key in COUNTS:
        value = part.get(key)
        if isinstance(value, int | float) and (type(value) is not int or value < 1):
            raise ModelError(
                f"{begin}: {key} is {_short(value)}: a whole number of at least 1 is needed"
            )
    heads, shared = part.get("num_attention_heads"), part.get("num_key_value_heads")
    if type(heads) is int and type(shared) is int and heads % shared:
        raise ModelError(
            f"{begin}: num_key_value_heads is {shared}, which does not divide "
            f"num_attention_heads, {heads}"
        )


def _refuse_numbers(part: dict[str, Any], begin: str) -> None:
    tables = [part]
    for key in SCALINGS:
        if isinstance(found := part.get(key), dict):
            tables += [found, *(inner for inner in found.values() if isinstance(inner, dict))]
    for table in tables:
        for key in BASES:
            said_elsewhere = table is part and isinstance(part.get("rope_parameters"), dict)
            if key in table and not (table[key] is None and said_elsewhere):
                _refuse_outside(key, table[key], BASE, begin)
    for table in tables[1:]:
        for key, value in table.items():
            if key == "factor" and value is not None:
                _refuse_outside(key, value, FACTOR, begin)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ModelError(f"{begin}: {key} of its rotary embedding is {value}: no number")
    for key in NORMS:
        if part.get(key) is not None:
            _refuse_outside(key, part[key], EPS, begin)


def _refuse_outside(key: str, value: Any, allowed: tuple[float, float], begin: str) -> None:
    least, most = allowed
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise ModelError(
            f"{begin}: {key} is {_short(value)}: a number from {least:g} to {most:g} is needed"
        )


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
