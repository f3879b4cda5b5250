"""`config.json` and `generation_config.json` of a `.gguf` file.

In: an opened file. Out: the two documents. Decided here: which rope scalings are understood, and
how the special tokens are called.
"""

from typing import Any

import numpy as np

from mlx_distill.models.gguf.file import ARCHITECTURES, GGUFFile, short

SPECIAL_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Llama 3.1 to 3.3 share all of their scaling but the factor.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def model_config(file: GGUFFile) -> dict[str, Any]:
    """The `config.json` of the family, without the number type."""
    sizes = file.sizes
    for key in ("rope.dimension_count", "attention.value_length"):
        if file.get(key, sizes.head_dim) != sizes.head_dim:
            raise file.refused(
                f"{key} {short(file.get(key))} differs from the width of a head, {sizes.head_dim}"
            )
    window = file.get("attention.sliding_window", 0)
    if window and not (type(window) is int and window >= file.need("context_length")):
        raise file.refused(f"attention.sliding_window is {short(window)}, which is not understood")
    return {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "attention_bias": file.architecture == "qwen2",
        "vocab_size": sizes.rows,
        "max_position_embeddings": file.need("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon", 1e-6, 1e-12, 1e-1),
        "rope_theta": _rope_theta(file),
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **special_token_ids(file),
    }


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """Greedy by default; stops on the end of text, of turn and of message, whichever the file
    names.
    """
    named = (file.token_id(name) for name in ("eos", "eot", "eom"))
    ends = sorted({number for number in named if number is not None})
    return {**special_token_ids(file), "eos_token_id": ends}


def special_token_ids(file: GGUFFile) -> dict[str, int]:
    """Those that the file names, by their Hugging Face names."""
    ids = {ours: file.token_id(theirs) for ours, theirs in SPECIAL_TOKENS.items()}
    return {name: value for name, value in ids.items() if value is not None}


def _rope_theta(file: GGUFFile) -> float:
    return file.number("rope.freq_base", 10000.0, 1.0, 1e15)


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """None, `linear` and `yarn` from the metadata; `llama3`, which GGUF keeps as a tensor of
    factors, from those.
    """
    legacy = file.number("rope.scale_linear", 0.0, 0.0, 1e6)
    factor = file.number("rope.scaling.factor", legacy, 0.0, 1e6)
    kind = file.get("rope.scaling.type", "linear" if factor else "none")  # llama.cpp's default
    if kind == "linear" and factor in (0, 1):  # 0 is none to llama.cpp
        kind = "none"
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise file.refused(f"rope scaling {short(kind)} beside rope_freqs.weight")
        return _llama3_scaling(file)
    match kind:
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": factor}
        case "yarn":
            return {"rope_type": "yarn", "factor": factor or 1.0} | _yarn(file)
    raise file.refused(f"rope scaling {kind!r} is not one of none, linear, yarn, llama3")


def _yarn(file: GGUFFile) -> dict[str, Any]:
    betas = {
        name: file.number(f"rope.scaling.yarn_{name}", 1.0, 0.0, 1e6)
        for name in ("beta_fast", "beta_slow")
        if file.get(f"rope.scaling.yarn_{name}") is not None
    }
    length = file.need("rope.scaling.original_context_length")
    return betas | {"original_max_position_embeddings": length}


def _llama3_scaling(file: GGUFFile) -> dict[str, Any]:
    """The scaling whose factors are the file's, among those that Llama 3.1 to 3.3 use."""
    low, high, trained = LLAMA3.values()
    dims = file.sizes.head_dim
    found = np.array(file.tensors["rope_freqs.weight"].data, np.float64)
    factor = float(found.max())
    turns = trained / (2 * np.pi * _rope_theta(file) ** (np.arange(0, dims, 2) / dims))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise file.refused(
            f"its rope_freqs.weight is not the llama3 scaling (low {low:g}, high {high:g}, "
            f"original context {trained})"
        )
    return {"rope_type": "llama3", "factor": factor} | LLAMA3
