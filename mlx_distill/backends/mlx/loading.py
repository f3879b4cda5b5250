"""From a model folder to a `SplitModel` of mlx-lm, as teacher or as student.

In: a folder and what a recipe asks of it. Out: the model, computing what its config.json says, or
a `ModelError` that says what is in the way. Decided here: which models may be teachers, and that a
student's tensors are the folder's by name and value.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten

from mlx_distill.backends import refusals
from mlx_distill.backends.failures import refuse_of_device
from mlx_distill.backends.mlx import arithmetic
from mlx_distill.backends.mlx.adapters import add_adapters
from mlx_distill.backends.mlx.model import SplitModel
from mlx_distill.backends.mlx.rounding import GROUP_SIZE, fits
from mlx_distill.backends.mlx.threads import WIDE, threads
from mlx_distill.backends.mlx.weights import cast, stored_weights
from mlx_distill.backends.packed import packed_by_bitsandbytes, refuse_packed
from mlx_distill.models.config import Meaning
from mlx_distill.models.folder import read_config, read_generation_config
from mlx_distill.models.translation import for_mlx
from mlx_distill.models.weights import Weights, read_weights
from mlx_distill.recipe.tables import StudentTable

Notes = tuple[str, ...]


def load_teacher(folder: Path, name: str, quantize_bits: int | str) -> SplitModel:
    """Any causal LM that mlx-lm loads, frozen; `quantize_bits` (4, 6, 8; 0 = as stored) quantises
    on load.
    """
    if isinstance(quantize_bits, str):
        raise refusals.nf4_on_mlx(name, "teacher.quantize_bits")
    model, config, notes, _ = _load(folder, name, student=False, lazy=bool(quantize_bits))
    if quantize_bits:
        if "quantization" in config:
            raise refusals.quantised_already(
                name, quantize_bits, config["quantization"].get("bits")
            )
        _quantize(model, name, quantize_bits)
    model.freeze()
    return SplitModel(model, name, notes)


def _quantize(
    model: nn.Module,
    name: str,
    bits: int,
    group_size: int = GROUP_SIZE,
    field: str = "quantize_bits",
) -> None:
    def is_fit(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    if not any(is_fit(path, module) for path, module in model.named_modules()):
        raise refusals.too_narrow(name, group_size, field)
    nn.quantize(model, group_size, bits, class_predicate=is_fit)
    mx.eval(model.parameters())


def load_student(folder: Path, name: str, table: StudentTable, seed: int) -> SplitModel:
    """A model whose tensors equal Hugging Face's by name and value, in float32 where it trains, packed
    where a frozen base is to be; others are refused.
    """
    read_generation_config(folder, name)  # which its export will read, hours from now
    refuse_packed(read_config(folder, name), table, name)
    model, _, notes, ours = _load(folder, name, student=True, lazy=False)
    notes += (refusals.not_obeyed(name, ours),) if ours else ()
    _refuse_rewritten(model, folder, name)
    stored_dtype = next(
        p.dtype for _, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)
    )
    if isinstance(table.quantize_bits, str):
        raise refusals.nf4_on_mlx(name, "student.quantize_bits")
    if table.tuning == "full":
        model.update(cast(model.parameters(), mx.float32))
        split = SplitModel(model, name, notes)
    else:
        if table.quantize_bits:
            _quantize(model, name, table.quantize_bits, field="student.quantize_bits")
        split = SplitModel(model, name, notes)
        add_adapters(split, table, seed)
    if split.head_matrix() is None:
        raise refusals.head_is_no_matrix(name)
    if table.quantize_aware_bits and not any(
        map(fits, (array for _, array in tree_flatten(model.parameters())))
    ):
        raise refusals.too_narrow(name, GROUP_SIZE, "student.quantize_aware_bits")
    split.stored_dtype = stored_dtype
    return split


def _load(
    folder: Path, name: str, student: bool, lazy: bool
) -> tuple[nn.Module, dict, Notes, Notes]:
    """The model as its config.json asks for, mlx-lm's config, notes for a person, and the keys that
    mlx-lm alone would not obey.
    """
    config = read_config(folder, name)
    if packed_by_bitsandbytes(config):
        raise refusals.nf4_on_mlx(name)
    weights = read_weights(folder, name)
    weights.refuse_unusable(config, name)
    meaning = Meaning(folder, name)
    _refuse_missing_head(weights, meaning)
    told = for_mlx(meaning, None if student else _tied(folder, meaning))
    threads.suit(meaning.declared.get("hidden_size", WIDE))
    with weights.alone() as alone:
        try:
            model, read = mlx_lm.utils.load_model(alone, lazy=lazy, model_config=told)
        except (
            Exception,
            SystemExit,
        ) as error:  # a family's code, run on a config it was not written for, fails in any way
            refuse_of_device(f"loading {name}", error)
            raise refusals.unloadable(name, folder, "mlx-lm", error, alone) from None
    ours = arithmetic.settle(model, meaning)
    return model, read, meaning.notes(), ours


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
    for key in list(stored):
        value = stored.pop(key)  # one at a time, so that the model is not held twice
        if (
            value.shape != loaded[key].shape
            or not mx.array_equal(value, loaded[key], equal_nan=True).item()
        ):
            raise refusals.rewritten(name, key, "changed", "mlx-lm")
