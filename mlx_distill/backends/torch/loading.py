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
from mlx_distill.backends.torch.adapters import add_adapters
from mlx_distill.backends.torch.model import SplitModel
from mlx_distill.backends.torch.weights import cast_frozen, stored_weights
from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config, read_generation_config
from mlx_distill.models.ranges import ACTIVATIONS, refuse_impossible
from mlx_distill.models.weights import read_weights
from mlx_distill.recipe.tables import StudentTable

transformers.utils.logging.disable_progress_bar()


def load_teacher(
    folder: Path, name: str, quantize_bits: int, device: torch.device, dtype: torch.dtype | None
) -> SplitModel:
    """Any causal LM that transformers loads, frozen, in `dtype` (None = as stored); `quantize_bits`
    (4, 8; 0 = none) quantises on load.
    """
    options = _quantisation(folder, name, quantize_bits, device) if quantize_bits else {}
    model = _load(folder, name, device, dtype, **options).requires_grad_(False)
    return SplitModel(model, name)


def _quantisation(folder: Path, name: str, bits: int, device: torch.device) -> dict:
    """bitsandbytes' NF4 or int8, which need CUDA."""
    config = read_config(folder, name)
    if stored := config.get("quantization_config") or config.get("quantization"):
        raise refusals.quantised_already(name, bits, stored.get("bits", "fewer"))
    if device.type != "cuda":
        raise ModelError(
            f"{name}: quantize_bits = {bits} asked, but torch quantises on CUDA alone and this is "
            f"a {device.type}: set 0"
        )
    if bits not in (4, 8):
        raise ModelError(
            f"{name}: quantize_bits = {bits} asked, but on CUDA there are 4 and 8 (bitsandbytes): "
            "choose one"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ModelError(
            f"{name}: quantize_bits = {bits} asked, but bitsandbytes is not installed: pip "
            'install "mlx-distill[torch]", or set 0'
        ) from None
    chosen = (
        {"load_in_8bit": True}
        if bits == 8
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    return {"quantization_config": transformers.BitsAndBytesConfig(**chosen)}


def load_student(
    folder: Path,
    name: str,
    table: StudentTable,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> SplitModel:
    """A model whose tensors equal the folder's by name and value, float32 where it trains, `dtype`
    where frozen; others are refused.
    """
    read_generation_config(folder, name)  # which its export will read, hours from now
    config = read_config(folder, name)
    if config.get("quantization") or config.get("quantization_config"):
        raise refusals.quantised_student(name)
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
        split = SplitModel(model.to(device), name)
        add_adapters(split, table, seed)
        cast_frozen(split.model, dtype)
    if split.head_matrix() is None:
        raise refusals.head_is_no_matrix(name)
    split.stored_dtype = stored_dtype
    return split


def _load(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | None, **options: Any
) -> transformers.PreTrainedModel:
    weights = read_weights(folder, name)
    config = read_config(folder, name)
    refuse_impossible(config, f"{name}: {folder / 'config.json'}")
    weights.refuse_unusable(config, name)
    _refuse_unknown_activation(config, folder, name)
    if device.type == "cuda":
        options |= {"device_map": {"": device}}
    quiet = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is refused below
    with weights.alone() as alone:
        try:
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
    return model


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
    loaded = dict(model.named_parameters())
    if (
        model.config.tie_word_embeddings and "lm_head.weight" in stored
    ):  # a tied head stored all the same, or is it one?
        loaded["lm_head.weight"] = model.get_input_embeddings().weight
    for key in sorted(stored.keys() ^ loaded.keys()):
        raise refusals.rewritten(name, key, "renamed" if key in stored else "made", "transformers")
    for key, value in stored.items():
        if value.shape != loaded[key].shape or not torch.equal(
            value, loaded[key].detach().to(value.dtype)
        ):
            raise refusals.rewritten(name, key, "changed", "transformers")
