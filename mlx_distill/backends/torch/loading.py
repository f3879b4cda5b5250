"""From a model folder to a `SplitModel` of transformers, as teacher or as student.

In: a folder and what a recipe asks of it. Out: the model, or a `ModelError` that says what is in
the way. Decided here: which models may be teachers, and that a student's tensors are the folder's
by name and value.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.activations import ACT2CLS

from mlx_distill.backends import refusals
from mlx_distill.backends.packed import packed_by_bitsandbytes, refuse_packed, stored_bits
from mlx_distill.backends.torch import nf4
from mlx_distill.backends.torch.adapters import add_adapters
from mlx_distill.backends.torch.affine import Packing, packed_tensors, quantise_model
from mlx_distill.backends.torch.model import SplitModel
from mlx_distill.backends.torch.rounding import GROUP_SIZE, fits
from mlx_distill.backends.torch.stored_affine import AffineConfig, stored_packings
from mlx_distill.backends.torch.weights import cast_frozen, stored_weights
from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config, read_generation_config
from mlx_distill.models.keys import QUANTISATION
from mlx_distill.models.ranges import ACTIVATIONS, refuse_impossible
from mlx_distill.models.weights import read_weights
from mlx_distill.recipe.tables import StudentTable

transformers.utils.logging.disable_progress_bar()


def load_teacher(
    folder: Path,
    name: str,
    quantize_bits: int | str,
    device: torch.device,
    dtype: torch.dtype | None,
) -> SplitModel:
    """Any causal LM that transformers loads, frozen, in `dtype` (None = as stored). `quantize_bits`
    (0 = as stored) quantises on load: to MLX's affine format, or to bitsandbytes' "nf4".
    """
    config = read_config(folder, name)
    if quantize_bits and (bits := stored_bits(config)):
        raise refusals.quantised_already(name, quantize_bits, bits)
    if isinstance(quantize_bits, int) and quantize_bits:
        model = _load(folder, name, torch.device("cpu"), None)  # rounded from what is stored
        if not quantise_model(model, Packing(quantize_bits, GROUP_SIZE)):
            raise refusals.too_narrow(name, GROUP_SIZE)
        model = model.to(device=device, dtype=dtype)
    else:
        options = nf4.options(name) if quantize_bits else {}
        model = _load(folder, name, device, dtype, **options)
    return SplitModel(model.requires_grad_(False), name)


def load_student(
    folder: Path,
    name: str,
    table: StudentTable,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> SplitModel:
    """A model whose tensors equal the folder's by name and value, float32 where it trains, `dtype`
    where frozen, packed where a frozen base is to be; others are refused.
    """
    read_generation_config(folder, name)  # which its export will read, hours from now
    refuse_packed(read_config(folder, name), table, name)
    stored = stored_weights(folder, name)
    dtypes = {value.dtype for value in stored.values() if value.is_floating_point()}
    model = _load(
        folder, name, torch.device("cpu"), dtypes.pop() if len(dtypes) == 1 else torch.float32
    )  # whatever config.json says
    _refuse_rewritten(model, stored, name)
    stored_dtype = stored[next(iter(dict(model.named_parameters())))].dtype
    if table.tuning == "full":
        split = SplitModel(model.float().requires_grad_(True).to(device), name)
    else:
        if table.quantize_bits == "nf4":
            nf4.quantise_model(model, device, name)
        elif table.quantize_bits and not quantise_model(
            model, Packing(table.quantize_bits, GROUP_SIZE)
        ):
            raise refusals.too_narrow(name, GROUP_SIZE, "student.quantize_bits")
        split = SplitModel(model.to(device), name)
        add_adapters(split, table, seed)
        cast_frozen(split.model, dtype)
    if split.head_matrix() is None:
        raise refusals.head_is_no_matrix(name)
    if table.quantize_aware_bits and not any(map(fits, model.parameters())):
        raise refusals.too_narrow(name, GROUP_SIZE, "student.quantize_aware_bits")
    split.stored_dtype, split.rounded_to = stored_dtype, table.quantize_aware_bits
    return split


def _load(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | None, **options: Any
) -> transformers.PreTrainedModel:
    weights = read_weights(folder, name)
    config = read_config(folder, name)
    refuse_impossible(config, f"{name}: {folder / 'config.json'}")
    weights.refuse_unusable(config, name)
    _refuse_unknown_activation(config, folder, name)
    if packed_by_bitsandbytes(config):
        nf4.library(name)
    packings = stored_packings(config, weights, name)
    if device.type == "cuda":
        options |= {"device_map": {"": device}}
    quiet = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is refused below
    with weights.alone() as alone:
        try:
            if packings:
                options |= {
                    "config": _unpacked(alone),
                    "quantization_config": AffineConfig(packings),
                }
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                alone,
                dtype=dtype or "auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except (
            Exception
        ) as error:  # a family's code, run on a config it was not written for, fails in any way
            raise refusals.unloadable(name, folder, "transformers", error, alone) from None
        finally:
            transformers.utils.logging.set_verbosity(quiet)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if wrong := sorted(map(str, found[kind])):
            reason = f"{len(wrong)} tensors are {kind.partition('_')[0]}, {wrong[0]} among them"
            raise refusals.unloadable(name, folder, "transformers", ValueError(reason))
    nf4.compute_in(model, model.dtype)
    return model


def _unpacked(folder: Path) -> transformers.PretrainedConfig:
    """The folder's config without MLX's words for its format, which transformers does not know."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    for key in QUANTISATION:
        if hasattr(config, key):
            delattr(config, key)
    return config


def _refuse_unknown_activation(config: dict, folder: Path, name: str) -> None:
    for key in ACTIVATIONS:
        asked = config.get(key)
        if isinstance(asked, str) and asked not in ACT2CLS:
            raise ModelError(
                f"{name}: {folder / 'config.json'}: {key} is {asked!r}, which transformers does "
                "not know"
            )


def _refuse_rewritten(
    model: transformers.PreTrainedModel, stored: dict[str, Tensor], name: str
) -> None:
    """Refuse a family whose tensors transformers renames or changes on load: its export would not
    open everywhere.
    """
    loaded = dict(model.named_parameters()) | packed_tensors(model) | nf4.stored_parts(model)
    if (
        model.config.tie_word_embeddings and "lm_head.weight" in stored
    ):  # a tied head stored all the same, or is it one?
        loaded["lm_head.weight"] = model.get_input_embeddings().weight
    for key in sorted(stored.keys() ^ loaded.keys()):
        raise refusals.rewritten(name, key, "renamed" if key in stored else "made", "transformers")
    for key, value in stored.items():
        found = loaded[key].detach()
        if nf4.is_packed(loaded[key]):  # bytes, whatever they lie there as
            value, found = value.view(torch.uint8), found.view(torch.uint8)
        if value.shape != found.shape or not torch.equal(value, found.to(value.dtype)):
            raise refusals.rewritten(name, key, "changed", "transformers")
