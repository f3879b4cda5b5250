"""A student's base that is packed in a few bits: which folders may be one, and for which students.

In: a config.json and a recipe's `[student]` table. Out: a `ModelError` where the two do not go
together. Decided here: packed numbers do not train, so such a base needs adapters (QLoRA, Dettmers
et al. 2023); and of all formats MLX's affine one and, on torch, bitsandbytes' four bits are known,
which are unpacked when a student is exported.
"""

from typing import Any

from mlx_distill.backends import refusals
from mlx_distill.models.keys import QUANTISATION
from mlx_distill.recipe.tables import StudentTable

AFFINE = (None, "affine")


def refuse_packed(config: dict[str, Any], table: StudentTable, name: str) -> None:
    """Raise `ModelError` where a folder is quantised and cannot be this student's base."""
    if not config.keys() & set(QUANTISATION):
        return
    bits: int | str = 4
    if not packed_by_bitsandbytes(config):
        bits = _affine_bits(config, name)
    if table.tuning == "full":
        raise refusals.quantised_student(name)
    if table.quantize_bits:
        raise refusals.quantised_already(name, table.quantize_bits, bits, "student.quantize_bits")


def packed_by_bitsandbytes(config: dict[str, Any]) -> bool:
    """Whether a folder is stored in bitsandbytes' four bits."""
    said = config.get("quantization_config")
    return isinstance(said, dict) and bool(said.get("load_in_4bit"))


def stored_bits(config: dict[str, Any]) -> int | str:
    """In how many bits a folder is stored, or "fewer"; 0 where it is not quantised."""
    said = config.get("quantization") or config.get("quantization_config")
    if not said:
        return 0
    four = packed_by_bitsandbytes(config)
    return said.get("bits", 4 if four else "fewer") if isinstance(said, dict) else "fewer"


def _affine_bits(config: dict[str, Any], name: str) -> int | str:
    said = config.get("quantization")
    if not isinstance(said, dict):
        raise refusals.quantised_otherwise(name, _method(config))
    modes = {part.get("mode") for part in (said, *said.values()) if isinstance(part, dict)}
    if others := modes - set(AFFINE):
        raise refusals.quantised_otherwise(name, f"mode {min(map(repr, others))}")
    return said.get("bits", "fewer")


def _method(config: dict[str, Any]) -> str:
    """What another program's format is called in config.json."""
    said = config.get("quantization_config")
    found = said.get("quant_method") if isinstance(said, dict) else None
    return repr(found or "an unknown format")
