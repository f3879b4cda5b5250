"""What a model folder's config.json means.

In: a folder. Out: a `Meaning`: transformers' reading of the file, its defaults filled in, and the
rotary embedding and window of each layer as plain numbers. Decided here: that transformers' reading
is the right one, and which pairs of keys contradict each other. How mlx-lm is told is decided in
`translation.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.files import all_lines
from mlx_distill.models.folder import read_config
from mlx_distill.models.keys import QUANTISATION, named_by_the_code, own_fields
from mlx_distill.models.ranges import refuse_impossible
from mlx_distill.models.rotary import TYPES, Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# compared with transformers in tests/models; of other families a line says that they were not
TESTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "phi",
    "phi3",
    "olmo2",
    "olmo3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "cohere",
    "cohere2",
    "granite",
    "glm4",
    "stablelm",
    "starcoder2",
    "hunyuan_v1_dense",
)
INTERLEAVED = ("cohere", "cohere2", "glm4")  # of those: rotate neighbours
PARTIAL = ("phi", "phi3", "glm4", "stablelm")  # of those: can rotate a part of the head
WINDOWED, FULL = "sliding_attention", "full_attention"  # the kinds of layer that are known here
OLDER_NAMES = (("su", "longrope"), ("longrope", "su"))
FLOAT_TAG = "__float__"  # how transformers writes numbers that JSON has no word for


@dataclass(frozen=True)
class Layer:
    """`rotary` is None where a layer does not rotate, `window` is how many tokens it sees, None
    for all."""

    rotary: Rotary | None
    window: int | None


class Meaning:
    """A config.json, as transformers reads it. `name` is what the recipe calls the model.

    `config` is None for a family that transformers does not know: such a folder is handed to mlx-lm
    as it is, but for its rotary keys. Raises `ModelError` where the file contradicts itself or
    cannot be read.
    """

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.file = folder / "config.json"
        self.whole: dict[str, Any] = _decoded(read_config(folder, name))
        refuse_impossible(self.whole, f"{name}: {self.file}")
        self.nested = isinstance(self.whole.get("text_config"), dict)
        self.stored: dict[str, Any] = self.whole["text_config"] if self.nested else self.whole
        self._refuse_contradictions()
        self.config = self._read(self.whole)
        if self.tested and self.layers is None:  # which refuses what cannot be computed
            raise self._without_layers()

    @property
    def family(self) -> str:
        if self.config is None:
            return self.whole["model_type"]
        return "mistral" if self.config.model_type == "ministral" else self.config.model_type

    @property
    def tested(self) -> bool:
        """Whether the family was compared with transformers by our tests."""
        return self.family in TESTED

    def notes(self) -> tuple[str, ...]:
        """What a person should know of a family that was never compared."""
        if self.tested:
            return ()
        return (
            f"{self.name}: mlx-lm's {self.family} was not compared with transformers by our tests; "
            "`mlx-distill doctor --model` compares it here",
        )

    def refusal(self, key: str, found: str, remedy: str) -> ModelError:
        return ModelError(f"{self.name}: {self.file}: {key} {found}: {remedy}")

    # keys

    @cached_property
    def declared(self) -> dict[str, Any]:
        """The keys that transformers' class of the family has, with their values; nothing where
        it knows none."""
        if self.config is None:
            return {}
        return {key: _value(self.config, key) for key in own_fields(type(self.config))}

    def asks_for(self, key: str) -> bool:
        """Whether a model of this file without `key` would be another one, to the family's code in
        transformers.
        """
        family: Any = type(self.config)
        if not self.tested and key not in named_by_the_code(family):
            return False
        rest = {name: value for name, value in self.stored.items() if name != key}
        try:
            config = self._read(self.whole | {"text_config": rest} if self.nested else rest)
        except ModelError:  # the others need it
            return True
        return _value(config, key) != self.declared[key]

    def rope_parameters(self, kind: str = FULL) -> dict[str, Any] | None:
        """As transformers reads them: the flat ones, or those of a kind of layer."""
        stored = self.stored.get("rope_parameters")
        found = getattr(self.config, "rope_parameters", None) if self.config else stored
        if not isinstance(found, dict):
            return None
        by_kind = any(isinstance(value, dict) for value in found.values())
        return found.get(kind, found) if by_kind else found

    def rope_parameters_as_stored(self) -> dict[str, Any]:
        """The flat ones of the file, or those of full attention."""
        found = self.stored.get("rope_parameters")
        if not isinstance(found, dict):
            return {}
        inner = found.get(FULL)
        return inner if isinstance(inner, dict) else found

    # layers

    @cached_property
    def layers(self) -> list[Layer] | None:
        """None where they are not of kinds that are known here."""
        types = self._layer_types()
        if types is None or not set(types) <= {WINDOWED, FULL}:
            return None
        rotaries = {kind: self._rotary(kind) for kind in set(types)}
        if None in rotaries.values():
            return None
        return [
            Layer(rotaries[kind] if self._rotates(index, kind) else None, self._window(kind))
            for index, kind in enumerate(types)
        ]

    @property
    def head_dim(self) -> int:
        config: Any = self.config
        return _value(config, "head_dim") or config.hidden_size // config.num_attention_heads

    def _layer_types(self) -> list[str] | None:
        if types := self.declared.get("layer_types"):
            return list(types)
        windowed = self.declared.get("sliding_window") is not None
        windowed = windowed and self.declared.get("use_sliding_window", True)
        count = self.declared.get("num_hidden_layers")
        return [WINDOWED if windowed else FULL] * count if count else None

    def _window(self, kind: str) -> int | None:
        window = self.declared.get("sliding_window") if kind == WINDOWED else None
        if window is not None and window < 1:
            raise self.refusal(
                "sliding_window", f"is {window}", "write how many tokens a token sees, or null"
            )
        return window

    def _rotates(self, index: int, kind: str) -> bool:
        if self.family == "cohere2":
            return kind == WINDOWED
        without = self.declared.get("no_rope_layers")
        if without and len(without) != self.declared["num_hidden_layers"]:
            found = f"has {len(without)} entries for {self.declared['num_hidden_layers']} layers"
            raise self.refusal("no_rope_layers", found, "write one for each layer")
        return bool(without[index]) if without else True

    def _rotary(self, kind: str) -> Rotary | None:
        parameters = self.rope_parameters(kind) or {}
        heads = getattr(self.config, "num_attention_heads", None)
        if parameters.get("rope_theta") is None or "qk_rope_head_dim" in self.declared or not heads:
            return None
        partial = parameters.get("partial_rotary_factor") or 1.0
        rotary = Rotary(
            dims=int(self.head_dim * partial),
            longest=getattr(self.config, "max_position_embeddings", 0),
            interleaved=self.family in INTERLEAVED,
            parameters=parameters,
        )
        if self.tested:
            self._refuse_unknown_rotation(rotary, partial)
        return rotary if rotary.type in TYPES else None

    def _refuse_unknown_rotation(self, rotary: Rotary, partial: float) -> None:
        if partial != 1 and self.family not in PARTIAL:
            remedy = f"a {self.family} rotates whole heads; remove it"
            raise self.refusal("partial_rotary_factor", f"is {partial}", remedy)
        if rotary.type not in TYPES:
            remedy = f"known here: {', '.join(TYPES)}; use --backend torch"
            raise self.refusal("rope_type", f"is {rotary.type!r}", remedy)
        if rotary.dims < 2 or rotary.dims % 2:
            found = f"leaves {rotary.dims} numbers to rotate"
            raise self.refusal("head_dim", found, "they rotate in pairs; correct it")
        try:
            with np.errstate(all="raise", under="ignore"):
                angles = [rotary.angles(length)[0] for length in rotary.lengths()]
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            why = f"{type(error).__name__} {error}"
            found = f"is {rotary.parameters} and cannot be computed ({why})"
            raise self.refusal("rope_parameters", found[:300], "correct it") from None
        if not all(len(each) == rotary.dims // 2 and np.all(np.isfinite(each)) for each in angles):
            found = f"gives no {rotary.dims // 2} finite angles"
            raise self.refusal("rope_parameters", found, "correct it")

    def _without_layers(self) -> ModelError:
        if not (self.rope_parameters() or {}).get("rope_theta"):
            return self.refusal("rope_theta", "is null", "write the base that it was trained with")
        unknown = set(self._layer_types() or ["none"]) - {WINDOWED, FULL}
        found = f"has {', '.join(sorted(unknown))}"
        return self.refusal("layer_types", found[:100], f"known: {WINDOWED}, {FULL}")

    # reading

    def _read(self, document: dict[str, Any]) -> "PreTrainedConfig | None":
        """`document` as transformers reads it; None for a family that it does not know."""
        from transformers import CONFIG_MAPPING, PreTrainedConfig
        from transformers.utils import logging

        kind = self.whole["model_type"]
        if kind == "mistral" and "layer_types" in document:
            kind = "ministral"  # as transformers' AutoConfig reads it
        if kind not in CONFIG_MAPPING:
            return None
        plain = {key: value for key, value in document.items() if key not in QUANTISATION}
        said = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of what is refused here, or of nothing
        try:
            config = CONFIG_MAPPING[kind].from_dict(plain | {"model_type": kind})
            config = config.get_text_config(decoder=True)
        except Exception as error:  # its checks of the values raise whatever they like
            raise ModelError(
                f"{self.name}: {self.file} cannot be read by transformers: {all_lines(error)}"
            ) from None
        finally:
            logging.set_verbosity(said)
        if not isinstance(config, PreTrainedConfig):
            raise self.refusal("text_config", f"is there, which a {kind} has not", "remove it")
        return config

    def _refuse_contradictions(self) -> None:
        """Two places for one thing: transformers believes one of them, mlx-lm the other."""
        parameters = self.rope_parameters_as_stored()
        for key in ("rope_theta", "partial_rotary_factor"):
            outside, inside = self.stored.get(key), parameters.get(key)
            if None not in (outside, inside) and outside != inside:
                found = f"is {outside}, but inside rope_parameters it is {inside}"
                raise self.refusal(key, found, "remove the wrong one")
        scaling = self.stored.get("rope_scaling")
        if not isinstance(scaling, dict) or not parameters:
            return
        outsides, insides = with_rope_type(scaling), with_rope_type(parameters)
        for key in sorted(outsides.keys() - {"type"}):
            outside, inside = outsides[key], insides.get(key)
            equal = outside == inside or (outside, inside) in OLDER_NAMES
            if None not in (outside, inside) and not equal:
                found = f"has {key} = {outside}, but rope_parameters has {inside}"
                raise self.refusal("rope_scaling", found, "remove the wrong one")


def with_rope_type(scaling: dict[str, Any]) -> dict[str, Any]:
    """A `rope_scaling` or `rope_parameters` that names its type by transformers 5's key."""
    return scaling | {"rope_type": scaling.get("rope_type") or scaling.get("type") or "default"}


def _value(config: "PreTrainedConfig | None", key: str) -> Any:
    """None too for a key that varies by layer, which some families refuse to say for all."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def _decoded(value: Any) -> Any:
    """Numbers that JSON has no word for, as transformers tags them."""
    if isinstance(value, dict):
        if set(value) == {FLOAT_TAG}:
            return float(value[FLOAT_TAG])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
