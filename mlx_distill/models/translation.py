"""A config.json in mlx-lm's words.

In: a `Meaning`. Out: the keys that mlx-lm's classes are told beside those of the file, and a whole
config.json that transformers, mlx-lm and llama.cpp read alike. transformers 5 writes `rope_theta`,
scaling and `partial_rotary_factor` only inside `rope_parameters`; most of mlx-lm's classes look for
them beside it and take their own defaults without a word where they find none. Decided here: what
they are told of that, of scaling, and of layers with a window.
"""

import math
from typing import Any

from mlx_distill.models.config import FULL, WINDOWED, Meaning
from mlx_distill.models.rotary import yarn_scale

# families that have no other scaling than one with this key
ONLY_SCALING = {"phi3": "long_factor", "hunyuan_v1_dense": "alpha"}


def for_mlx(meaning: Meaning, tied: bool | None = None) -> dict[str, Any]:
    """What `mlx_lm.utils.load_model` takes as `model_config`; `tied` overrides
    `tie_word_embeddings`.
    """
    keys = keys_for_mlx(meaning)
    if tied is not None:
        keys["tie_word_embeddings"] = tied
    if not meaning.nested:
        return keys
    declared = meaning.declared
    rows = {"vocab_size": declared["vocab_size"]} if "vocab_size" in declared else {}
    return rows | {"text_config": meaning.stored | keys}


def keys_for_mlx(meaning: Meaning) -> dict[str, Any]:
    """The keys of the language model that mlx-lm is told beside, or against, those that the file
    holds.
    """
    keys = {
        key: value
        for key, value in meaning.declared.items()
        if meaning.stored.get(key) is None and value is not None
    }
    keys.pop("rope_parameters", None)
    if meaning.stored.get("head_dim") is None and "num_attention_heads" in meaning.declared:
        keys["head_dim"] = meaning.head_dim
    return keys | _rotary_keys(meaning) | _window_keys(meaning)


def portable(meaning: Meaning) -> dict[str, Any]:
    """The whole config.json with its rotary keys in both places, so that mlx-lm alone and llama.cpp
    find them too.
    """
    keys = {key: value for key, value in _rotary_keys(meaning).items() if value is not None}
    for of_one_class in ("rotary_emb_base", "rotary_pct"):
        keys.pop(of_one_class, None)
    if scaling := keys.get("rope_scaling"):
        beside = ("rope_theta", "partial_rotary_factor")
        inside = scaling | {key: keys[key] for key in beside if key in keys}
        inside.pop("type")
        stored = getattr(meaning.config, "rope_parameters", None) or {}
        keys["rope_parameters"] = stored | {FULL: inside} if FULL in stored else inside
    if (tied := meaning.declared.get("tie_word_embeddings")) is not None:
        keys["tie_word_embeddings"] = tied
    if not meaning.nested:
        return meaning.whole | keys
    return meaning.whole | {"text_config": meaning.stored | keys}


def _rotary_keys(meaning: Meaning) -> dict[str, Any]:
    parameters = meaning.rope_parameters()
    if not parameters:
        return {}
    longest = getattr(meaning.config, "max_position_embeddings", None)
    keys = flat_rotary_keys(parameters, longest, "qk_rope_head_dim" in meaning.declared)
    keys["rotary_emb_base"] = keys["rope_theta"]
    keys["rotary_pct"] = keys.get("partial_rotary_factor", 1.0)
    if local := (meaning.rope_parameters(WINDOWED) or {}).get("rope_theta"):
        keys["rope_local_base_freq"] = local
    if not meaning.tested:
        return {key: value for key, value in keys.items() if meaning.stored.get(key) is None}
    needed = ONLY_SCALING.get(meaning.family)
    if needed and needed not in (keys["rope_scaling"] or {}):
        keys["rope_scaling"] = None  # its class takes no other; the layers get theirs after loading
    return keys


def _window_keys(meaning: Meaning) -> dict[str, Any]:
    """mlx-lm's Gemma 3 and Cohere 2 know one layer in so many that sees all, its Llama must have
    one; the layers of the families like it get their windows after loading.
    """
    if meaning.family in ("llama", "mistral", "smollm3"):
        return {"layer_types": None, "sliding_window": None}
    types = meaning.declared.get("layer_types")
    if meaning.family not in ("gemma3_text", "cohere2") or not types:
        return {}
    pattern = types.index(FULL) + 1 if FULL in types else 0
    kinds = [WINDOWED] * (pattern - 1) + [FULL]
    if not pattern or types != (kinds * len(types))[: len(types)]:
        remedy = "mlx-lm knows one full layer in every so many; use --backend torch"
        raise meaning.refusal("layer_types", f"is {types}", remedy)
    return {"sliding_window_pattern": pattern}


def flat_rotary_keys(
    parameters: dict[str, Any], longest: int | None, latent: bool = False
) -> dict[str, Any]:
    """The keys of transformers 4, which mlx-lm and llama.cpp look for, for the flat
    `rope_parameters` of transformers 5.

    transformers 5 reads them as it reads the new ones. `latent` attention (DeepSeek's) takes its
    scale from the mscales, which are left as they are.
    """
    keys = {"rope_theta": parameters.get("rope_theta"), "rope_scaling": None}
    if (partial := parameters.get("partial_rotary_factor")) is not None:
        keys["partial_rotary_factor"] = partial
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    outside = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    scaling = {
        key: value for key, value in parameters.items() if key not in outside and value is not None
    }
    if kind == "default" and not scaling:
        return keys
    scaling |= {"type": kind, "rope_type": kind}
    if kind == "yarn" and not latent:
        scaling |= _yarn_for_mlx(parameters, longest)
    if "original_max_position_embeddings" in scaling:
        keys["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return keys | {"rope_scaling": scaling}


def _yarn_for_mlx(parameters: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """mlx-lm's scale is (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1),
    attention factor or not.
    """
    stretched = (longest or 1) / parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or stretched
    keys = {
        "factor": factor,
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
    }
    if factor > 1:
        scale = yarn_scale(parameters, factor)
        mscale = (scale - 1) / (0.1 * math.log(factor))
        keys |= {"attention_factor": scale, "mscale": mscale, "mscale_all_dim": 0}
    return keys
