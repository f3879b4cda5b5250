"""The tensors of a `.gguf` file under their Hugging Face names, dequantised one at a time.

In: an opened file. Out: the names of its tensors, and float32 arrays. Decided here: which tensors a
family has and of which shapes; a file with more, fewer or others is refused before one is read.
"""

from typing import Any

import numpy as np

from mlx_distill.models.gguf.file import GGUFFile

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
BLOCK_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
EXTRA_BLOCK_TENSORS: dict[str, dict[str, str]] = {
    "llama": {},
    "qwen2": {f"attn_{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"},
    "qwen3": {f"attn_{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"},
}


def tensor_names(file: GGUFFile) -> dict[str, str]:
    """GGUF name → Hugging Face name of every tensor, refusing a file that has more or fewer than
    the family has.
    """
    layers = file.need("block_count")
    if layers > len(file.tensors):
        raise file.refused(f"block_count {layers} for {len(file.tensors)} tensors")
    block = BLOCK_TENSORS | EXTRA_BLOCK_TENSORS[file.architecture]
    names = dict(TENSORS)
    for layer in range(layers):
        for theirs, ours in block.items():
            names[f"blk.{layer}.{theirs}"] = f"model.layers.{layer}.{ours}"
    if "output.weight" in file.tensors:
        names["output.weight"] = "lm_head.weight"
    if missing := names.keys() - file.tensors.keys():
        raise file.refused(f"tensor {min(missing)} is missing")
    if unknown := file.tensors.keys() - names.keys() - {"rope_freqs.weight"}:
        raise file.refused(f"tensor {min(unknown)} is not one of a plain {file.architecture} model")
    return names


def check_shapes(file: GGUFFile) -> None:
    """Refuse a file whose tensors have other shapes than its fields say, before one of them is
    read.
    """
    sizes = file.sizes
    width, inner = sizes.width, sizes.inner
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (sizes.rows, width),
        "output_norm.weight": (width,),
        "output.weight": (sizes.rows, width),
        # of each block
        "attn_norm.weight": (width,),
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner, width),
        "ffn_down.weight": (width, inner),
        "attn_q.weight": (queries, width),
        "attn_q.bias": (queries,),
        "attn_k.weight": (keys, width),
        "attn_k.bias": (keys,),
        "attn_v.weight": (keys, width),
        "attn_v.bias": (keys,),
        "attn_q_norm.weight": (sizes.head_dim,),
        "attn_k_norm.weight": (sizes.head_dim,),
        "attn_output.weight": (width, queries),
    }
    for name, tensor in file.tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        wanted = expected.get(name) or expected.get(name.split(".", 2)[-1])
        if wanted and shape != wanted:
            raise file.refused(
                f"tensor {name} has the shape {list(shape)}, its fields ask for {list(wanted)}"
            )


def number_type(file: GGUFFile) -> type[np.floating[Any]]:
    """What loses nothing that counts: float32 where every matrix of the file is float32, else
    float16. A quantised weight has at most 15 significant bits; float16 keeps 11, well below the
    quantisation's own error.
    """
    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    whole = {tensor.tensor_type.name for tensor in matrices} == {"F32"}
    return np.float32 if whole else np.float16


def read_tensor(file: GGUFFile, name: str) -> np.ndarray:
    """One tensor in float32, rows in Hugging Face's order."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    try:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
        raise file.refused(
            f"tensor {name} is quantised as {tensor.tensor_type.name}, which cannot be read"
        ) from error
    if file.architecture != "llama":
        return values
    if name.endswith(".attn_q.weight"):
        return unpermute(values, file.sizes.heads)
    if name.endswith(".attn_k.weight"):
        return unpermute(values, file.sizes.kv_heads)
    return values


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k rows [heads·d, D]: rotary pairs adjacent → half a head
    apart.

    llama.cpp rotates rows 2i and 2i+1 of a head together, Hugging Face rows i and i + d/2. Its
    converter does so for the architecture `llama` alone.
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows [heads·d, D] from Hugging Face's: `unpermute` undoes it."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
