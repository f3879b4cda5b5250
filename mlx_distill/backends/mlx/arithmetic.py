"""Whether a model that mlx-lm loaded computes what its config.json asks for: what is found out here
without torch.

In: the loaded model and the folder's `Meaning`. Out: the same model, some parts replaced by ours
where mlx-lm has none (a window, a rotary embedding, an activation), or a `ModelError` that names
the key. Rotary embeddings are judged in `rotary.py`; windows, scales, caps and norms' eps are read
off the modules.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import RotatingKVCache

from mlx_distill.backends.mlx.rotary import settle_rotary
from mlx_distill.errors import ModelError
from mlx_distill.files import one_line
from mlx_distill.models.config import Meaning
from mlx_distill.models.keys import HARMLESS, INITIAL_OR_KERNEL, WIDTHS
from mlx_distill.models.ranges import ACTIVATIONS
from mlx_distill.models.translation import keys_for_mlx

HANDLED = {  # keys that are checked by what they do
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layers",
    "tie_word_embeddings",
    "head_dim",
    "num_key_value_heads",
    "no_rope_layer_interval",
    "attention_bias",
    "mlp_bias",
    "use_bias",
    "use_qkv_bias",  # a tensor too many or too few is refused at load
}
OWN_ACTIVATION = {
    "gemma": "gelu",
    "starcoder2": "gelu",
}  # what mlx-lm computes, where not the family's default
EQUAL_ACTIVATIONS = ({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"}, {"silu", "swish"})
TANH = EQUAL_ACTIVATIONS[0]


def settle(model: nn.Module, meaning: Meaning) -> tuple[str, ...]:
    """Replace what mlx-lm lacks, check the rest; returns the config's keys that mlx-lm alone does
    not obey.

    Raises `ModelError` for a key that asks for what the model does not do.
    """
    try:
        return _settled(model, meaning)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if meaning.tested:
            raise
        raise ModelError(  # a family whose parts are not where they are in those that we know
            f"{meaning.name}: mlx-lm's {meaning.family} cannot be checked against "
            f"{meaning.file} ({one_line(error)}); use --backend torch"
        ) from None


def _settled(model: nn.Module, meaning: Meaning) -> tuple[str, ...]:
    owner = getattr(model, "language_model", model)
    if not meaning.config or not hasattr(owner, "args"):
        return ()
    ours: list[str] = []
    _check_arguments(owner.args, meaning)
    ours += _settle_activation(owner, meaning)
    ours += _settle_embedding(owner, meaning)
    if meaning.layers:
        if len(meaning.layers) != len(owner.layers):
            raise meaning.refusal(
                "num_hidden_layers", f"is {len(meaning.layers)}", f"mlx-lm made {len(owner.layers)}"
            )
        ours += settle_rotary(owner, meaning)
        ours += _settle_windows(owner, meaning)
    _check_values(owner, meaning)
    return tuple(dict.fromkeys(ours))


def _check_arguments(args: Any, meaning: Meaning) -> None:
    """Each declared key has reached mlx-lm's class, or is one that it need not know, or has the
    value that it computes."""
    known = {field.name: field for field in fields(type(args))}
    for key, value in meaning.declared.items():
        if key in HARMLESS or key in HANDLED or "token_id" in key:
            continue
        if key not in known:
            if _is_missed(key, known, meaning):
                raise meaning.refusal(
                    key, f"is {value}", "mlx-lm does not read it; use --backend torch"
                )
            continue
        reached = getattr(args, key)
        if reached is None and known[key].type in (float, int, bool):
            raise meaning.refusal(
                key, "is null", f"mlx-lm's {meaning.family} needs a number; use --backend torch"
            )
        if isinstance(value, bool | int | float | str) and reached != value:
            raise meaning.refusal(
                key, f"is {value}", f"mlx-lm reads {reached}; use --backend torch"
            )
    _check_stray(args, meaning, known)


def _is_missed(key: str, known: dict[str, Any], meaning: Meaning) -> bool:
    """Whether a key that mlx-lm's class does not know would change what it computes.

    A shape that it takes from elsewhere is checked when the weights are loaded.
    """
    if key in ACTIVATIONS or key in WIDTHS or key in INITIAL_OR_KERNEL:
        return False
    kind: Any = type(meaning.config)  # transformers' own class, which is not read
    aliases = {alias for alias, name in kind.attribute_map.items() if name == key}
    return not known.keys() & aliases and meaning.asks_for(key)


def _check_stray(args: Any, meaning: Meaning, known: dict[str, Any]) -> None:
    """A key that mlx-lm obeys and transformers does not, where both know the family."""
    told = keys_for_mlx(meaning)
    for key, value in meaning.stored.items():
        stray = key in known and key not in {"model_type", "head_dim", *meaning.declared, *told}
        if stray and meaning.tested and value is not None and value != known[key].default:
            raise meaning.refusal(
                key, f"is {value}", "mlx-lm obeys it and transformers does not; remove it"
            )


# activation and embedding


def _settle_activation(owner: nn.Module, meaning: Meaning) -> list[str]:
    key = next((key for key in ACTIVATIONS if meaning.declared.get(key)), None)
    if key is None:
        return []
    kind: Any = type(meaning.config)
    default = next(field.default for field in fields(kind) if field.name == key)
    asked, computed = meaning.declared[key], OWN_ACTIVATION.get(meaning.family, default)
    if asked == computed or any({asked, computed} <= equal for equal in EQUAL_ACTIVATIONS):
        return []
    if asked not in TANH or meaning.family not in OWN_ACTIVATION:
        raise meaning.refusal(
            key, f"is {asked}", f"mlx-lm computes {computed}; use --backend torch"
        )
    for layer in owner.layers:
        _specialise(layer.mlp, _gated_by_tanh if "gate_proj" in layer.mlp else _plain_by_tanh)
    return [key]


def _gated_by_tanh(self: nn.Module, x: mx.array) -> mx.array:
    return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


def _plain_by_tanh(self: nn.Module, x: mx.array) -> mx.array:
    return self.c_proj(nn.gelu_approx(self.c_fc(x)))


def _settle_embedding(owner: nn.Module, meaning: Meaning) -> list[str]:
    """mlx-lm's Gemma 3 rounds √width to bfloat16 whatever the weights are; transformers rounds
    to the weights' type."""
    if meaning.family != "gemma3_text":
        return []
    exact = owner.args.hidden_size**0.5
    rest = exact / mx.array(exact, mx.bfloat16).astype(mx.float32).item()
    plain = type(owner.model.embed_tokens)

    def call(self: nn.Module, tokens: mx.array) -> mx.array:
        found = plain.__call__(self, tokens)
        return found if found.dtype != mx.float32 else found * rest

    if rest != 1:
        _specialise(owner.model.embed_tokens, call)
    return ["the exact root of hidden_size"] if rest != 1 else []


# windows


def _settle_windows(owner: nn.Module, meaning: Meaning) -> list[str]:
    """Give each layer the window that it is asked to have, unless the family's own code does."""
    asked = [layer.window for layer in meaning.layers or ()]
    own = _own_windows(owner)
    if own == asked:
        return []
    if any(own):
        raise meaning.refusal(
            "layer_types", f"asks for windows {asked}", f"mlx-lm makes {own}; use --backend torch"
        )
    for layer, window in zip(owner.layers, asked, strict=True):
        if window:
            _specialise(layer, _within(type(layer), window))
    return ["sliding_window"]


def _own_windows(owner: nn.Module) -> list[int | None]:
    """By the caches that the family makes for its layers."""
    caches = owner.make_cache() if hasattr(owner, "make_cache") else [None] * len(owner.layers)
    return [cache.max_size if isinstance(cache, RotatingKVCache) else None for cache in caches]


def _within(plain: type, window: int) -> Callable[..., mx.array]:
    """A block's call with a mask of its own: a token sees itself and the `window` - 1 before it."""

    def call(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if cache is not None or x.shape[1] > window:
            mask = create_attention_mask(x, cache, window_size=window, return_array=True)
            mask = _for_each_head(mask, self)
        return plain.__call__(self, x, mask, cache)

    return call


def _for_each_head(mask: mx.array | None, layer: nn.Module) -> mx.array | None:
    """Gemma 2 keeps the queries that share a key in an axis of their own, which a mask of
    several texts lacks."""
    grouped = hasattr(layer.self_attn, "attn_logit_softcapping") and layer.self_attn.repeats > 1
    return mx.expand_dims(mask, 2) if grouped and mask is not None and mask.ndim == 4 else mask


def _specialise(module: nn.Module, call: Callable[..., mx.array]) -> None:
    """The module with another `__call__`; no other module of its class changes."""
    plain = type(module)
    module.__class__ = type(
        plain.__name__, (plain,), {"__call__": call, "__module__": plain.__module__}
    )


# numbers that modules keep


def _check_values(owner: nn.Module, meaning: Meaning) -> None:
    """Norms' eps, attention's scale, and every number that a module keeps under its config's
    own name."""
    for path, name, found in _numbers(owner):
        asked = _asked(name, path, meaning)
        if asked is not None and not math.isclose(found, asked, rel_tol=1e-6):
            key = (
                name
                if name in meaning.declared
                else {"eps": "rms_norm_eps"}.get(name, "attention scale")
            )
            raise meaning.refusal(
                key, f"asks for {asked:g}", f"mlx-lm computes {found:g} in {path or 'the model'}"
            )


def _numbers(owner: nn.Module) -> Iterator[tuple[str, str, float]]:
    for path, module in owner.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield path, name, float(value)


def _asked(name: str, path: str, meaning: Meaning) -> float | None:
    if not meaning.tested:
        return None
    value = meaning.declared.get(name)
    if name == "eps":
        value = next(
            (
                meaning.declared[key]
                for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
                if key in meaning.declared
            ),
            None,
        )
    if name == "scale" and path.endswith("self_attn"):
        declared = meaning.declared
        scalar = declared.get("query_pre_attn_scalar") or meaning.head_dim
        value = declared.get("attention_multiplier", scalar**-0.5)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
