"""Models of mlx-lm, split where the loss needs them split: a trunk (tokens → hidden states) and a
head (→ logits).

In: a model folder. Out: a `SplitModel` whose head was checked against the whole model, or a
`ModelError`. Decided here: how the split is made, which models may be students, and what a saved
student looks like.
"""

import inspect
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_distill.backends import export, refusals
from mlx_distill.backends.adapters import adapted_paths, initial_matrix
from mlx_distill.backends.mlx import arithmetic
from mlx_distill.backends.mlx.loss import CallableHead, Head, MatrixHead, QuantizedHead
from mlx_distill.errors import ModelError
from mlx_distill.files import all_lines
from mlx_distill.models.config import Meaning
from mlx_distill.models.folder import Weights, read_config, read_generation_config, read_weights
from mlx_distill.recipe.tables import StudentTable

PROBE = [[1, 5, 2, 7, 3, 1, 4]]
PROBE_LOGIT = 100.0  # the largest one when a head is probed: far into any cap
PROBE_TOLERANCE = 1e-3  # relative to the largest logit; a wrong split is off by orders of magnitude
HALF_TOLERANCE = 2e-2  # the same in bfloat16 or float16: a few units in the last place
Notes = tuple[str, ...]
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "embeddings",
    "tok_embeddings",
    "word_embeddings",
)  # names of a trunk's tied matrix


class SplitModel:
    """An mlx-lm model as trunk and head.

    `hidden(tokens [B, T]) -> [B, T, D]`: the last hidden states, final norm included.
    `head(hidden [..., D]) -> [..., V]`: logits, by the family's own code (tied or not, quantised or
    not, soft-capped or scaled): the model is called with its trunk replaced by one that answers
    `hidden`.
    """

    def __init__(self, model: nn.Module, name: str, notes: tuple[str, ...] = ()):
        self.model = model
        self.name = name
        self.notes = notes  # what a person should know of how it is computed
        self.owner, self.trunk_name = _find_trunk(model, name)
        self.stored_dtype: mx.Dtype | None = None  # of the weights on disk, where that matters
        self._trunk_extras = [None] * (
            _required_arguments(self.trunk) - 1
        )  # a few families insist on a cache
        self._head = _AfterTrunk(self.owner, self.trunk_name)
        self._check_split()

    @property
    def trunk(self) -> nn.Module:
        return getattr(self.owner, self.trunk_name)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def hidden(self, tokens: mx.array) -> mx.array:
        return self.trunk(tokens, *self._trunk_extras)

    def head(self, hidden: mx.array) -> mx.array:
        return self._head(hidden)

    def head_matrix(self) -> mx.array | None:
        """`[V, D]`, if the head is that matrix and nothing else; None for quantised, biased, capped
        or scaled heads.
        """
        return self._head_module.weight if self._head_is_matrix else None

    def head_rows(self) -> int:
        return self._probe_logits.shape[-1]

    def loss_head(self) -> Head:
        """The head as the loss walks it: by blocks of the vocabulary where it is a matrix and what
        an element needs after it (bias, cap, scale), in one piece otherwise.
        """
        for finish in (None, self._finish()):
            head = self._head_by_blocks(finish)
            if head is not None and self._equals_head(head):
                return head
        return CallableHead(self.head)

    @cached_property
    def head_path(self) -> str:
        """The path of the head's matrix among a student's parameters (whose head is one plain
        matrix).
        """
        return (
            next(path for path, module in self.model.named_modules() if module is self._head_module)
            + ".weight"
        )

    @cached_property
    def _head_is_matrix(self) -> bool:
        module = self._head_module
        return (
            module is not None
            and set(module) == {"weight"}
            and self._equals_head(MatrixHead(module.weight))
        )

    @property
    def _head_name(self) -> str | None:
        """The name of the projection in its owner, or of the tied embedding in the trunk."""
        if "lm_head" in self.owner:
            return "lm_head"
        return next((name for name in EMBEDDINGS if name in self.trunk), None)

    @property
    def _head_module(self) -> nn.Module | None:
        name = self._head_name
        return None if name is None else (self.owner if name == "lm_head" else self.trunk)[name]

    def _head_by_blocks(self, finish: Callable[[mx.array], mx.array] | None) -> Head | None:
        module = self._head_module
        if module is None:
            return None
        if "scales" not in module:
            return MatrixHead(module.weight, module.get("bias"), finish)
        quantised = (
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            module.mode,
        )
        return QuantizedHead(*quantised, module.get("bias"), finish)

    def _finish(self) -> Callable[[mx.array], mx.array]:
        """What the family's own code does to logits after the projection, as a function of logits
        [..., any number].
        """
        return _AfterTrunk(self.owner, self.trunk_name, skipped=self._head_name)

    def _equals_head(self, head: Head) -> bool:
        """Whether `head`, met in two blocks, gives the family's logits for large random hidden
        states.
        """
        rows, middle = self.head_rows(), self.head_rows() // 3
        probe = mx.array(
            np.random.default_rng(0).normal(size=(3, self._probe_width)).astype(np.float32)
        )
        try:
            probe = probe * (
                PROBE_LOGIT / mx.abs(self._head_by_blocks(None).logits(probe, 0, rows)).max()
            )
            blocks = mx.concatenate(
                [head.logits(probe, 0, middle), head.logits(probe, middle, rows)], axis=-1
            )
            return _close(blocks, self.head(probe))
        # a family's code run on parts it was not written for: any failure says that it is not this
        # head
        except Exception:
            return False

    def _check_split(self) -> None:
        probe = mx.array(PROBE)
        try:
            hidden, self._probe_logits = self.hidden(probe), self.model(probe)
            finite = mx.all(mx.isfinite(self._probe_logits)).item()
        except Exception as error:  # a family's code, run on a config it was not written for
            raise refusals.not_computed(self.name, error) from None
        if not finite:
            raise refusals.not_finite(self.name)
        self._probe_width = hidden.shape[-1]
        try:
            equal, how = _close(self.head(hidden), self._probe_logits), "differs from"
        except Exception as error:  # as above
            equal, how = False, f"fails ({all_lines(error, 100)}) instead of giving"
        if not equal:
            raise refusals.not_split(self.name, type(self.model), how)


class _AfterTrunk:
    """What a family's own code does after its trunk, as a function of the trunk's output [..., D].

    The projection called `skipped`, the owner's or the trunk's, then returns what it is given.
    """

    def __init__(self, owner: nn.Module, trunk_name: str, skipped: str | None = None):
        passing = {skipped: _PassOn()} if skipped else {}
        self._trunk = _StandIn(getattr(owner, trunk_name), passing)
        self._owner = _with_parts(
            owner, {trunk_name: self._trunk} | (passing if skipped in owner else {})
        )

    def __call__(self, output: mx.array) -> mx.array:
        self._trunk.output = output.reshape(1, -1, output.shape[-1])
        logits = self._owner(
            mx.zeros(self._trunk.output.shape[:2], mx.int32)
        )  # tokens that nobody reads
        self._trunk.output = None
        return logits.reshape(*output.shape[:-1], -1)


class _StandIn:
    """Answers `output` in the place of a trunk, and lends the trunk's attributes (a tied embedding)
    but for `parts`.
    """

    def __init__(self, trunk: nn.Module, parts: dict[str, "_PassOn"]):
        self._trunk, self.output = trunk, None
        self.__dict__.update(parts)

    def __call__(self, *args, **kwargs) -> mx.array:
        return self.output

    def __getattr__(self, name: str):
        return getattr(self._trunk, name)


class _PassOn:
    """A projection that returns what it is given."""

    def __call__(self, given: mx.array) -> mx.array:
        return given

    as_linear = __call__


def _find_trunk(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    for owner in (model, getattr(model, "language_model", None)):
        for trunk in ("model", "transformer", "backbone") if owner is not None else ():
            if isinstance(owner.get(trunk), nn.Module):  # a part, no property that looks into one
                return owner, trunk
    raise refusals.no_trunk(name, type(model))


def _required_arguments(trunk: nn.Module) -> int:
    parameters = inspect.signature(trunk.__call__).parameters.values()
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _with_parts(owner: nn.Module, parts: dict[str, _StandIn | _PassOn]) -> nn.Module:
    """A view of `owner` with other parts; every remaining one is shared with the original."""
    view = type(owner).__new__(type(owner))
    nn.Module.__init__(view)
    view.__dict__.update(owner.__dict__)
    dict.update(view, owner)  # Module.update would descend into the shared parts
    for name, part in parts.items():
        dict.pop(view, name)
        object.__setattr__(view, name, part)
    return view


def _close(left: mx.array, right: mx.array) -> bool:
    tolerance = PROBE_TOLERANCE if left.dtype == right.dtype == mx.float32 else HALF_TOLERANCE
    left, right = left.astype(mx.float32), right.astype(mx.float32)
    scale = mx.maximum(mx.abs(right).max(), 1e-6)
    return left.shape == right.shape and (mx.abs(left - right).max() / scale).item() <= tolerance


def load_teacher(folder: Path, name: str, quantize_bits: int) -> SplitModel:
    """Any causal LM that mlx-lm loads, frozen; `quantize_bits` (4, 6, 8; 0 = as stored) quantises
    on load.
    """
    model, config, notes, _ = _load(folder, name, student=False, lazy=bool(quantize_bits))
    if quantize_bits:
        if "quantization" in config:
            raise refusals.quantised_already(
                name, quantize_bits, config["quantization"].get("bits")
            )
        _quantize(model, name, quantize_bits)
    model.freeze()
    return SplitModel(model, name, notes)


def _quantize(model: nn.Module, name: str, bits: int, group_size: int = 64) -> None:
    def fits(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    if not any(fits(path, module) for path, module in model.named_modules()):
        raise ModelError(
            f"{name}: no layer is as wide as a multiple of {group_size}, so it cannot be "
            "quantised: set quantize_bits = 0"
        )
    nn.quantize(model, group_size, bits, class_predicate=fits)
    mx.eval(model.parameters())


def load_student(folder: Path, name: str, table: StudentTable, seed: int) -> SplitModel:
    """A model whose tensors equal Hugging Face's by name and value, in float32 where it trains;
    others are refused.
    """
    read_generation_config(folder, name)  # which its export will read, hours from now
    model, config, notes, ours = _load(folder, name, student=True, lazy=False)
    notes += (refusals.not_obeyed(name, ours),) if ours else ()
    if config.get("quantization") or config.get("quantization_config"):
        raise refusals.quantised_student(name)
    _refuse_rewritten(model, folder, name)
    stored_dtype = next(
        p.dtype for _, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)
    )
    if table.tuning == "full":
        model.update(cast(model.parameters(), mx.float32))
        split = SplitModel(model, name, notes)
    else:
        split = SplitModel(model, name, notes)
        add_adapters(split, table, seed)
    if split.head_matrix() is None:
        raise refusals.head_is_no_matrix(name)
    split.stored_dtype = stored_dtype
    return split


def parameter_count(model: nn.Module) -> int:
    """How many numbers a model holds; packed quantised weights count as what they stand for."""
    return mlx_lm.utils.get_total_parameters(model)


def cast_frozen(model: nn.Module, dtype: mx.Dtype) -> None:
    """The frozen arrays as `dtype`, the adapters untouched."""
    trained = dict(tree_flatten(model.trainable_parameters()))
    frozen = [(key, array) for key, array in tree_flatten(model.parameters()) if key not in trained]
    model.update(cast(tree_unflatten(frozen), dtype), strict=False)


def cast(parameters: dict, dtype: mx.Dtype) -> dict:
    """The tree with its floating-point arrays as `dtype`."""
    return tree_map(
        lambda p: p.astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p, parameters
    )


def _load(
    folder: Path, name: str, student: bool, lazy: bool
) -> tuple[nn.Module, dict, Notes, Notes]:
    """The model as its config.json asks for, mlx-lm's config, notes for a person, and the keys that
    mlx-lm alone would not obey.
    """
    weights = read_weights(folder, name)
    weights.refuse_unusable(read_config(folder, name), name)
    meaning = Meaning(folder, name)
    _refuse_missing_head(weights, meaning)
    told = meaning.for_mlx(None if student else _tied(folder, meaning))
    with weights.alone() as alone:
        try:
            model, config = mlx_lm.utils.load_model(alone, lazy=lazy, model_config=told)
        except (
            Exception,
            SystemExit,
        ) as error:  # a family's code, run on a config it was not written for, fails in any way
            raise refusals.unloadable(name, folder, "mlx-lm", error, alone) from None
    ours = arithmetic.settle(model, meaning)
    return model, config, meaning.notes(arithmetic.unread(model, meaning)), ours


def _refuse_missing_head(weights: Weights, meaning: Meaning) -> None:
    """transformers would make one at random, and some of mlx-lm's families would take the
    embedding.
    """
    headless = not any(key.rpartition("lm_head.")[1] for key in weights.tensors)
    if meaning.tested and headless and meaning.declared.get("tie_word_embeddings") is False:
        found = (
            "is absent, which means false for this family"
            if "tie_word_embeddings" not in meaning.stored
            else "is false"
        )
        raise meaning.refusal(
            "tie_word_embeddings",
            f"{found}, but there is no lm_head.weight",
            "set it to true if the head is the embedding",
        )


def _tied(folder: Path, meaning: Meaning) -> bool | None:
    """Whether the head is the embedding: as config.json says, unless the folder holds both and they
    differ (as in transformers).

    mlx-lm would drop the stored head; a student of such a folder is refused for it, because its
    export would be read so.
    """
    tied = meaning.declared.get("tie_word_embeddings")
    stored = stored_weights(folder, meaning.name)
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if tied and head is not None and embedding is not None:
        return head.shape == embedding.shape and mx.array_equal(head, embedding).item()
    return tied


def stored_weights(folder: Path, name: str = "") -> dict[str, mx.array]:
    """The tensors of a model folder's files, buffers of rotary embeddings left out."""
    files = read_weights(folder, name or str(folder)).files
    try:
        stored = {key: value for file in files for key, value in mx.load(str(file)).items()}
    except RuntimeError as error:  # formats that MLX does not have, float64 among them
        raise refusals.unloadable(name or str(folder), folder, "mlx", error) from None
    return {key: value for key, value in stored.items() if "rotary_emb.inv_freq" not in key}


def _refuse_rewritten(model: nn.Module, folder: Path, name: str) -> None:
    """Refuse a family whose tensors mlx-lm renames or changes on load: its export would not open in
    transformers.
    """
    loaded, stored = dict(tree_flatten(model.parameters())), stored_weights(folder, name)
    if (
        "lm_head.weight" not in loaded and "lm_head.weight" in stored
    ):  # a tied head that is stored all the same, or is it one?
        loaded["lm_head.weight"] = loaded.get("model.embed_tokens.weight", mx.array(0.0))
    for key in sorted(stored.keys() ^ loaded.keys()):
        raise refusals.rewritten(name, key, "renamed" if key in stored else "made", "mlx-lm")
    for key, value in stored.items():
        if (
            value.shape != loaded[key].shape
            or not mx.array_equal(value, loaded[key], equal_nan=True).item()
        ):
            raise refusals.rewritten(name, key, "changed", "mlx-lm")


def add_adapters(split: SplitModel, table: StudentTable, seed: int) -> None:
    """Freeze the model and add LoRA or DoRA to the layers that `adapted_paths` chooses; lora_a is
    `initial_matrix`, lora_b zero.
    """
    model = split.model
    model.freeze()
    linear = {
        id(module): path for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    blocks = [
        [linear[id(module)] for _, module in block.named_modules() if id(module) in linear]
        for block in split.layers
    ]
    paths = adapted_paths(blocks, table, split.name)
    keys = {
        path
        for block in split.layers
        for path, module in block.named_modules()
        if linear.get(id(module)) in paths
    }
    config = {"rank": table.rank, "scale": table.alpha / table.rank, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, table.lora_layers, config, use_dora=table.tuning == "dora")
    for path, module in model.named_modules():
        if "lora_a" in module:
            module.lora_a = mx.array(initial_matrix(module.lora_a.shape, path, seed))


def checkpoint_layers(split: SplitModel) -> None:
    """Recompute each block in the backward pass. The blocks of this model get a class of their own:
    no other model changes.
    """
    for layer in split.layers:
        plain = type(layer)

        def call(self, *args, _forward=plain.__call__, **kwargs):
            def run(parameters, *args):
                self.update(parameters)
                return _forward(self, *args, **kwargs)

            return mx.checkpoint(run)(self.trainable_parameters(), *args)

        layer.__class__ = type(f"Checkpointed{plain.__name__}", (plain,), {"__call__": call})


def fused_weights(model: nn.Module, base: Path) -> dict[str, mx.array]:
    """Every tensor by its Hugging Face name, adapters fused into the matrices they adapt; the model
    keeps its adapters.

    What has no adapter is as the folder `base` stores it, whatever type the frozen copy is computed
    in.
    """
    adapted = {path: module for path, module in model.named_modules() if "lora_a" in module}
    if not adapted:
        return dict(tree_flatten(model.parameters()))
    stored = stored_weights(base)
    return stored | {
        f"{path}.weight": _fused(module, stored[f"{path}.weight"])
        for path, module in adapted.items()
    }


def _fused(module: nn.Module, weight: mx.array) -> mx.array:
    """The matrix that does what a LoRA or DoRA layer over `weight` does, in float32: mlx-lm's
    `fuse` adds in the frozen one's type.
    """
    frozen = module.linear.weight
    module.linear.weight = weight.astype(mx.float32)
    fused = module.fuse()
    module.linear.weight = frozen
    return fused.weight


def save_folder(
    weights: dict[str, mx.array],
    base: Path,
    folder: Path,
    dtype: mx.Dtype | None,
    stop_ids: list[int],
) -> None:
    """A Hugging Face folder; dtype None keeps each tensor's type in the base model."""
    tensors = {key: value.astype(dtype) if dtype else value for key, value in weights.items()}
    export.save_folder(
        tensors, _save, base, folder, str(dtype).rpartition(".")[2] if dtype else "", stop_ids
    )


def _save(tensors: dict[str, mx.array], file: Path) -> None:
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
