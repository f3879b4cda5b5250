"""What a model folder's config.json means, and how it is put so that mlx-lm reads the same.

In: a folder. Out: a `Meaning`: transformers' reading of the file, its defaults filled in; rotary
embedding and window of each layer as plain numbers; and `for_mlx`, the keys as mlx-lm's classes
call them. Decided here: that transformers' reading is the right one, which pairs of keys contradict
each other, and which keys never change arithmetic.

transformers 5 writes `rope_theta`, scaling and `partial_rotary_factor` only inside
`rope_parameters`; most of mlx-lm's classes look for them beside it and take their own defaults
without a word where they find none.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config, read_weights
from mlx_distill.models.keys import HARMLESS, named_by_the_code, own_fields
from mlx_distill.models.ranges import refuse_impossible
from mlx_distill.models.rotary import TYPES, Rotary, yarn_scale

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
WINDOWED_BY_TYPE = ("sliding_attention", "full_attention")
TRANSLATION = "1"  # raise it when a folder that mlx-lm alone reads wrong is computed otherwise
READ_INSIDE = ("qwen3",)  # mlx-lm's class looks for rope_theta inside rope_parameters
READ_AS_WRITTEN = ("default", "linear", "llama3")  # the other types are put in mlx-lm's words
OWN_PARTS = ("gemma", "starcoder2", "gemma3_text")  # whose activation or embedding we replace
FLOAT_TAG = "__float__"  # how transformers writes numbers that JSON has no word for
SCALED = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
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
        self.whole = _decoded(read_config(folder, name))
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

    def _without_layers(self) -> ModelError:
        if not (self.rope_parameters() or {}).get("rope_theta"):
            return self.refusal("rope_theta", "is null", "write the base that it was trained with")
        unknown = set(self._layer_types() or ["none"]) - set(WINDOWED_BY_TYPE)
        found = f"has {', '.join(sorted(unknown))}"
        return self.refusal("layer_types", found[:100], f"known: {', '.join(WINDOWED_BY_TYPE)}")

    # what it means

    @cached_property
    def declared(self) -> dict[str, Any]:
        """The keys that transformers' class of the family has, with their values; nothing where
        it knows none."""
        if self.config is None:
            return {}
        return {key: _value(self.config, key) for key in own_fields(type(self.config))}

    @cached_property
    def layers(self) -> list[Layer] | None:
        """None where they are not of kinds that are known here."""
        types = self._layer_types()
        if types is None or not set(types) <= set(WINDOWED_BY_TYPE):
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
        return (
            _value(self.config, "head_dim")
            or self.config.hidden_size // self.config.num_attention_heads
        )

    def _layer_types(self) -> list[str] | None:
        count = self.declared.get("num_hidden_layers")
        if types := self.declared.get("layer_types"):
            return list(types)
        windowed = self.declared.get("sliding_window") is not None and self.declared.get(
            "use_sliding_window", True
        )
        return ["sliding_attention" if windowed else "full_attention"] * count if count else None

    def _window(self, kind: str) -> int | None:
        window = self.declared.get("sliding_window") if kind == "sliding_attention" else None
        if window is not None and window < 1:
            raise self.refusal(
                "sliding_window", f"is {window}", "write how many tokens a token sees, or null"
            )
        return window

    def _rotates(self, index: int, kind: str) -> bool:
        if self.family == "cohere2":
            return kind == "sliding_attention"
        without = self.declared.get("no_rope_layers")
        if without and len(without) != self.declared["num_hidden_layers"]:
            found = f"has {len(without)} entries for {self.declared['num_hidden_layers']} layers"
            raise self.refusal("no_rope_layers", found, "write one for each layer")
        return bool(without[index]) if without else True

    def _rotary(self, kind: str) -> Rotary | None:
        parameters = self.rope_parameters(kind)
        if (
            not parameters
            or parameters.get("rope_theta") is None
            or "qk_rope_head_dim" in self.declared
        ):
            return None
        partial = parameters.get("partial_rotary_factor") or 1.0
        interleaved = self.family in INTERLEAVED
        longest = getattr(self.config, "max_position_embeddings", 0)
        rotary = Rotary(int(self.head_dim * partial), longest, interleaved, parameters)
        if self.tested:
            self._refuse_unknown_rotation(rotary, partial)
        return rotary if rotary.type in TYPES else None

    def _refuse_unknown_rotation(self, rotary: Rotary, partial: float) -> None:
        if partial != 1 and self.family not in PARTIAL:
            raise self.refusal(
                "partial_rotary_factor",
                f"is {partial}",
                f"a {self.family} rotates whole heads; remove it",
            )
        if rotary.type not in TYPES:
            raise self.refusal(
                "rope_type",
                f"is {rotary.type!r}",
                f"known here: {', '.join(TYPES)}; use --backend torch",
            )
        if rotary.dims < 2 or rotary.dims % 2:
            raise self.refusal(
                "head_dim",
                f"leaves {rotary.dims} numbers to rotate",
                "they rotate in pairs; correct it",
            )
        try:
            with np.errstate(all="raise", under="ignore"):
                angles = [rotary.angles(length)[0] for length in rotary.lengths()]
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            found = (
                f"is {rotary.parameters} and cannot be computed ({type(error).__name__} {error})"
            )
            raise self.refusal("rope_parameters", found[:300], "correct it") from None
        if not all(len(each) == rotary.dims // 2 and np.all(np.isfinite(each)) for each in angles):
            raise self.refusal(
                "rope_parameters", f"gives no {rotary.dims // 2} finite angles", "correct it"
            )

    def rope_parameters(self, kind: str = "full_attention") -> dict[str, Any] | None:
        """The flat ones, or those of a kind of layer."""
        found = (
            getattr(self.config, "rope_parameters", None)
            if self.config
            else self.stored.get("rope_parameters")
        )
        if not isinstance(found, dict):
            return None
        return (
            found.get(kind, found)
            if any(isinstance(value, dict) for value in found.values())
            else found
        )

    # what mlx-lm alone would make of it

    @property
    def reading(self) -> str:
        """ "" where mlx-lm alone computes what this file asks for, as every version of this program
        did; else the version of the translation, by which the numbers of older ones are told apart.
        Where it is not certain it is the version."""
        if self.config is None:
            return TRANSLATION if self.keys_for_mlx() else ""
        layers = self.layers or [Layer(None, 1)]
        translated = (
            self.family in OWN_PARTS
            or any(layer.window for layer in layers)
            or not self._rotary_keys_are_read()
            or self._missing_keys_matter()
        )
        return TRANSLATION if translated else ""

    def _rotary_keys_are_read(self) -> bool:
        """Whether mlx-lm's class finds them where they are, in words that it knows."""
        parameters = self.rope_parameters()
        if not parameters:
            return True
        kind = parameters.get("rope_type") or "default"
        if self.family in READ_INSIDE and self.rope_parameters_as_stored():
            return kind in READ_AS_WRITTEN
        outside = _scaling(self.stored.get("rope_scaling") or {})
        return (
            not any(isinstance(value, dict) for value in parameters.values())
            and kind in READ_AS_WRITTEN
            and kind == outside["rope_type"]
            and (kind != "llama3" or "original_max_position_embeddings" in outside)
            and all(outside.get(key) == value for key, value in parameters.items() if key in SCALED)
            and all(
                self.stored.get(key) == parameters.get(key)
                for key in ("rope_theta", "partial_rotary_factor")
            )
        )

    def _missing_keys_matter(self) -> bool:
        """Whether transformers fills in a number where mlx-lm may fill in another."""
        missing = {
            key
            for key, value in self.declared.items()
            if self.stored.get(key) is None and value not in (None, False)
        }
        tied = self.stored.get("tie_word_embeddings", self.declared.get("tie_word_embeddings"))
        untold = "tie_word_embeddings" not in self.stored and not tied
        return untold or bool(missing - HARMLESS - FILLED_ALIKE)

    # how mlx-lm is told

    def for_mlx(self, tied: bool | None = None) -> dict[str, Any]:
        """What `mlx_lm.utils.load_model` takes as `model_config`; `tied` overrides
        `tie_word_embeddings`."""
        keys = self.keys_for_mlx()
        if tied is not None:
            keys["tie_word_embeddings"] = tied
        if not self.nested:
            return keys
        rows = {"vocab_size": self.declared["vocab_size"]} if "vocab_size" in self.declared else {}
        return rows | {"text_config": self.stored | keys}

    def keys_for_mlx(self) -> dict[str, Any]:
        """The keys of the language model that mlx-lm is told beside, or against, those that the
        file holds."""
        keys = {
            key: value
            for key, value in self.declared.items()
            if self.stored.get(key) is None and value is not None
        }
        keys.pop("rope_parameters", None)
        if self.stored.get("head_dim") is None and "num_attention_heads" in self.declared:
            keys["head_dim"] = self.head_dim
        return keys | self._rotary_keys() | self._window_keys()

    def portable(self) -> dict[str, Any]:
        """The whole config.json with its rotary keys in both places, so that mlx-lm alone and
        llama.cpp find them too."""
        aliases = ("rotary_emb_base", "rotary_pct")
        keys = {
            key: value
            for key, value in self._rotary_keys().items()
            if key not in aliases and value is not None
        }
        if scaling := keys.get("rope_scaling"):
            inner = {key: value for key, value in scaling.items() if key != "type"}
            others = {
                key: keys[key] for key in ("rope_theta", "partial_rotary_factor") if key in keys
            }
            keys["rope_parameters"] = self._with_full_attention(inner | others)
        if (tied := self.declared.get("tie_word_embeddings")) is not None:
            keys["tie_word_embeddings"] = tied
        return (
            self.whole | {"text_config": self.stored | keys} if self.nested else self.whole | keys
        )

    def _with_full_attention(self, parameters: dict[str, Any]) -> dict[str, Any]:
        found = getattr(self.config, "rope_parameters", None) or {}
        return found | {"full_attention": parameters} if "full_attention" in found else parameters

    def _rotary_keys(self) -> dict[str, Any]:
        parameters = self.rope_parameters()
        if not parameters:
            return {}
        longest = getattr(self.config, "max_position_embeddings", None)
        keys = flat_rotary_keys(parameters, longest, "qk_rope_head_dim" in self.declared)
        keys |= {
            "rotary_emb_base": keys["rope_theta"],
            "rotary_pct": keys.get("partial_rotary_factor", 1.0),
        }
        if local := (self.rope_parameters("sliding_attention") or {}).get("rope_theta"):
            keys["rope_local_base_freq"] = local
        if self.tested:
            scaling = keys["rope_scaling"] or {}
            needs = {"phi3": "long_factor", "hunyuan_v1_dense": "alpha"}.get(self.family)
            return keys | (
                {"rope_scaling": None} if needs and needs not in scaling else {}
            )  # given after loading
        return {key: value for key, value in keys.items() if self.stored.get(key) is None}

    def _window_keys(self) -> dict[str, Any]:
        """mlx-lm's Gemma 3 and Cohere 2 know one layer in so many, its Llama must have a layer
        that sees all."""
        if self.family in ("llama", "mistral", "smollm3"):
            return {
                "layer_types": None,
                "sliding_window": None,
            }  # each such layer gets its window after loading
        types = self.declared.get("layer_types")
        if self.family not in ("gemma3_text", "cohere2") or not types:
            return {}
        pattern = next((i + 1 for i, kind in enumerate(types) if kind == "full_attention"), 0)
        if not pattern or types != [
            WINDOWED_BY_TYPE[(i + 1) % pattern == 0] for i in range(len(types))
        ]:
            raise self.refusal(
                "layer_types",
                f"is {types}",
                "mlx-lm knows one full layer in every so many; use --backend torch",
            )
        return {"sliding_window_pattern": pattern}

    # reading

    def asks_for(self, key: str) -> bool:
        """Whether a model of this file without `key` would be another one, to the family's code in
        transformers.
        """
        if not self.tested and key not in named_by_the_code(type(self.config)):
            return False
        rest = {name: value for name, value in self.stored.items() if name != key}
        try:
            config = self._read(self.whole | {"text_config": rest} if self.nested else rest)
        except ModelError:  # the others need it
            return True
        return _value(config, key) != self.declared[key]

    def _read(self, document: dict[str, Any]) -> "PreTrainedConfig | None":
        """`document` as transformers reads it; None for a family that it does not know."""
        from transformers import CONFIG_MAPPING, PreTrainedConfig
        from transformers.utils import logging

        kind = self.whole["model_type"]
        if kind == "mistral" and "layer_types" in document:
            kind = "ministral"  # as transformers' AutoConfig reads it
        if kind not in CONFIG_MAPPING:
            return None
        plain = {
            key: value
            for key, value in document.items()
            if key not in ("quantization", "quantization_config")
        }
        said = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of what is refused here, or of nothing
        try:
            config = CONFIG_MAPPING[kind].from_dict(plain | {"model_type": kind})
            config = config.get_text_config(decoder=True)
        except Exception as error:  # its checks of the values raise whatever they like
            reason = " ".join(str(error).split())[
                :300
            ]  # in its first line only that a check failed
            raise ModelError(
                f"{self.name}: {self.file} cannot be read by transformers: {reason}"
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
        for key in sorted({"rope_type", *scaling} - {"type"}):
            outside, inside = (_scaling(table).get(key) for table in (scaling, parameters))
            if (
                None not in (outside, inside)
                and outside != inside
                and {outside, inside} != {"su", "longrope"}
            ):
                found = f"has {key} = {outside}, but rope_parameters has {inside}"
                raise self.refusal("rope_scaling", found, "remove the wrong one")

    def rope_parameters_as_stored(self) -> dict[str, Any]:
        """The flat ones of the file, or those of full attention."""
        found = self.stored.get("rope_parameters")
        if not isinstance(found, dict):
            return {}
        inner = found.get("full_attention")
        return inner if isinstance(inner, dict) else found


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
    attention factor or not."""
    factor = (
        parameters.get("factor") or (longest or 1) / parameters["original_max_position_embeddings"]
    )
    keys = {
        "factor": factor,
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
    }
    if factor > 1:
        scale = yarn_scale(parameters, factor)
        keys |= {
            "attention_factor": scale,
            "mscale": (scale - 1) / (0.1 * math.log(factor)),
            "mscale_all_dim": 0,
        }
    return keys


def _value(config: "PreTrainedConfig", key: str) -> Any:
    """None too for a key that varies by layer, which some families refuse to say for all."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None


def reading_of(folder: Path) -> str:
    """`Meaning.reading` of a folder, also of one that MLX refuses and torch may compute.

    A head that is stored though tied is read now and was not: whether it differs is not looked at.
    """
    try:
        meaning = Meaning(folder, str(folder))
    except ModelError:
        return TRANSLATION
    tied = meaning.declared.get("tie_word_embeddings")
    if tied and "lm_head.weight" in read_weights(folder, str(folder)).tensors:
        return TRANSLATION
    return meaning.reading


def _scaling(table: dict[str, Any]) -> dict[str, Any]:
    return table | {"rope_type": table.get("rope_type") or table.get("type") or "default"}


def _decoded(value: Any) -> Any:
    """Numbers that JSON has no word for, as transformers tags them."""
    if isinstance(value, dict):
        if set(value) == {FLOAT_TAG}:
            return float(value[FLOAT_TAG])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
