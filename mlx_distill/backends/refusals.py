"""Why a model is refused, in one wording for every backend. `library` is what read the model:
mlx-lm or transformers.
"""

import json
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.files import all_lines


def unloadable(
    name: str, folder: Path, library: str, error: BaseException, seen: Path | None = None
) -> ModelError:
    """`seen` is where the library thought that the folder is."""
    reason = all_lines(error)
    return ModelError(
        f"{name}: {library} cannot load {folder}: "
        f"{reason.replace(str(seen), str(folder)) if seen else reason}"
    )


def no_trunk(name: str, kind: type) -> ModelError:
    return ModelError(
        f"{name}: no trunk (model, transformer or backbone) in {kind.__module__}; please report it"
    )


def not_computed(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name}: a text of seven tokens cannot be computed ({type(error).__name__}: "
        f"{all_lines(error)}): its config.json does not fit its weights, or asks for what the "
        "family's code lacks; fetch both again"
    )


def not_finite(name: str) -> ModelError:
    return ModelError(
        f"{name}: its logits are not finite, though its weights are: a number in config.json is "
        "wrong, or the weights are too large for their type; fetch both again, or name another "
        "model"
    )


def beyond_float16(name: str) -> ModelError:
    return ModelError(
        f"{name}: computed in float16, whose numbers end at 65,504, its logits are not finite: set "
        'teacher.compute_dtype = "bfloat16"'
    )


def not_split(name: str, kind: type, how: str) -> ModelError:
    return ModelError(
        f"{name}: head(hidden(x)) {how} model(x), so this family ({kind.__module__}) "
        "cannot be distilled here yet; please report it with the model's name"
    )


def no_such_layer(name: str, asked: int, found: int) -> ModelError:
    return ModelError(
        f"{name}: [objective] hidden_layers asks for layer {asked}, but it has {found}: name layers "
        f"from 1 to {found}"
    )


def quantised_already(
    name: str, asked: int | str, stored: int | str, field: str = "quantize_bits"
) -> ModelError:
    return ModelError(
        f"{name}: {field} = {json.dumps(asked)} asked, but it is already stored in {stored} bits: "
        "set 0"
    )


def nf4_on_mlx(name: str, field: str = "") -> ModelError:
    """`field` asks for it; without one the folder is stored so."""
    remedy = "set 4, or use --backend torch" if field else "use --backend torch"
    return ModelError(f"{name}: {_nf4(field)}, which MLX does not have: {remedy}")


def no_bitsandbytes(name: str, field: str = "") -> ModelError:
    remedy = "or set 4" if field else "or name the original"
    return ModelError(
        f"{name}: {_nf4(field)}, but bitsandbytes is not installed: pip install "
        f'"mlx-distill[torch]", {remedy}'
    )


def _nf4(field: str) -> str:
    return f'{field} = "nf4" asked' if field else "it is stored as bitsandbytes packs it"


def too_narrow(name: str, group_size: int, field: str = "quantize_bits") -> ModelError:
    return ModelError(
        f"{name}: no layer is as wide as a multiple of {group_size}, so it cannot be quantised: set "
        f"{field} = 0"
    )


def quantised_student(name: str) -> ModelError:
    return ModelError(
        f"{name}: its weights are quantised, so they cannot train: set [student] tuning = "
        '"lora" or "dora", or name the original'
    )


def quantised_otherwise(name: str, found: str) -> ModelError:
    """A student's base that is packed, but not as the program can unpack it for its export."""
    return ModelError(
        f"{name}: it is quantised as {found}, but a student's base may only be quantised in MLX's "
        "affine format (`mlx_lm.convert -q`) or in bitsandbytes' four bits: name the original"
    )


def head_is_no_matrix(name: str) -> ModelError:
    return ModelError(
        f"{name}: a student's head must be one plain matrix, this family scales, caps or biases "
        "it; choose a Llama or Qwen"
    )


def rewritten(name: str, tensor: str, how: str, library: str) -> ModelError:
    """A family whose tensors are renamed, made or changed on load: its export would not open
    everywhere.
    """
    return ModelError(
        f"{name}: tensor {tensor} is {how} by {library} on load, so a student of this family would "
        "not open in transformers; choose a Llama, Qwen2 or Qwen3 student"
    )


def not_obeyed(name: str, keys: tuple[str, ...]) -> str:
    """Said, not refused: the exported student is right here and in transformers."""
    return (
        f"{name}: mlx-lm alone does not obey {' and '.join(keys)} of its config.json; the exported "
        "student is computed as trained here and by transformers, and otherwise by mlx-lm"
    )


def other_state(folder: Path) -> ModelError:
    return ModelError(f"checkpoint {folder}: its arrays are not those of this student")
