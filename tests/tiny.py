"""Tiny models, rows and recipes for tests: random weights in ordinary Hugging Face folders, made in
milliseconds.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from mlx_distill.backends.protocol import Model, Sampling
from mlx_distill.recipe.recipe import Recipe

VOCABULARY = 288  # a byte tokenizer's 265 ids and some padding rows


def llama_config(
    layers: int = 2,
    width: int = 32,
    tied: bool = True,
    vocabulary: int = VOCABULARY,
    family: str = "llama",
) -> dict:
    """A Hugging Face config; `family` is llama, qwen2 or qwen3."""
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    return {
        "architectures": [names[family]],
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "intermediate_size": 2 * width,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }


def random_weights(config: dict, seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    """Weights of a llama, qwen2 (biases on q, k, v) or qwen3 (norms on q, k) by their Hugging Face
    names, float32.
    """
    random, family = np.random.default_rng(seed), config["model_type"]
    width, ffn, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    draw = lambda *shape: (scale * random.normal(size=shape)).astype(np.float32)  # noqa: E731
    weights = {
        "model.embed_tokens.weight": draw(config["vocab_size"], width),
        "model.norm.weight": 1 + draw(width),
    }
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}."
        for name, rows, columns in (
            ("q", heads * size, width),
            ("k", kv * size, width),
            ("v", kv * size, width),
            ("o", width, heads * size),
        ):
            weights[f"{path}self_attn.{name}_proj.weight"] = draw(rows, columns)
            if family == "qwen2" and name != "o":
                weights[f"{path}self_attn.{name}_proj.bias"] = draw(rows)
        if family == "qwen3":
            weights |= {f"{path}self_attn.{name}_norm.weight": 1 + draw(size) for name in "qk"}
        for name, rows, columns in (("gate", ffn, width), ("up", ffn, width), ("down", width, ffn)):
            weights[f"{path}mlp.{name}_proj.weight"] = draw(rows, columns)
        weights |= {
            f"{path}{name}_layernorm.weight": 1 + draw(width)
            for name in ("input", "post_attention")
        }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = draw(config["vocab_size"], width)
    return weights


def model_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config) -> Path:
    """A model folder with random weights; keyword arguments go to `llama_config`."""
    tokenizer.save_pretrained(folder)
    described = llama_config(**config)
    (folder / "config.json").write_text(json.dumps(described))
    save_file(
        random_weights(described, seed), folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def rows_file(path: Path, count: int = 24, seed: int = 0) -> Path:
    """A `.jsonl` of prompt, cot, answer: sums of two digits, with reasoning of differing length."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        a, b = map(int, random.integers(0, 10, 2))
        steps = " ".join(f"{a}+{i}={a + i}." for i in range(b + 1))
        rows.append({"prompt": f"#{index} {a}+{b}?", "cot": steps, "answer": str(a + b)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# what a recipe has to name
NAMED = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"source": "rows.jsonl"}}


SMALL_ADAPTERS = {"rank": 8, "alpha": 16.0}


def recipe_of(**tables) -> Recipe:
    """A recipe of these tables' fields, with names of models and data where they give none, and
    adapters that are small beside a tiny model.
    """
    if tables.get("student", {}).get("tuning", "full") != "full":
        tables["student"] = SMALL_ADAPTERS | tables["student"]
    return Recipe.model_validate(
        {name: NAMED.get(name, {}) | tables.get(name, {}) for name in NAMED | tables}
    )


RECIPE = """
[teacher]
model = "{root}/teacher"
[student]
model = "{root}/student"
[data]
source = "{root}/rows.jsonl"
validation_examples = 4
[truncation]
fraction = 0.5
[objective]
chunk_tokens = 16
[batch]
micro_batch_size = 2
global_batch_size = 4
pad_multiple = 8
[optim]
learning_rate = 1e-3
steps = 6
[eval]
task = "jsonl:{root}/rows.jsonl"
examples = 4
max_new_tokens = 8
[run]
folder = "{root}/runs"
checkpoint_every = 2
validate_every = 3
"""


def recipe_file(root: Path, tokenizer: PreTrainedTokenizerFast, **student) -> Path:
    """A whole world under `root`: teacher (3 layers), student (2 layers), rows, and the path of
    `tiny.toml` that uses them.
    """
    model_folder(root / "teacher", tokenizer, seed=1, layers=3)
    model_folder(root / "student", tokenizer, seed=2, **student)
    rows_file(root / "rows.jsonl")
    path = root / "tiny.toml"
    path.write_text(RECIPE.format(root=root))
    return path


def family_folder(
    folder: Path,
    config: dict,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A model folder of any family that mlx-lm knows: its own class, random weights by its own
    names.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    random, weights = np.random.default_rng(seed), {}
    for name, array in tree_flatten(model_class(arguments.from_dict(config)).parameters()):
        drawn = 0.1 * random.normal(size=array.shape) + (array.ndim == 1)
        weights[name] = mx.array(drawn.astype(np.float32)).astype(getattr(mx, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def texts(model: Model, prompts: list[list[int]], count: int, **sampling) -> list[list[int]]:
    """What a model writes after each prompt, in the prompts' order: at most `count` new ids."""
    found = dict(model.generate(prompts, Sampling(count, **sampling)))
    return [found[place] for place in range(len(prompts))]


def left_by_a_mac(folder: Path) -> None:
    """What macOS puts into a folder: the Finder's file, and beside each file and folder one of what
    the disk cannot hold of it (AppleDouble).
    """
    for path in list(folder.iterdir()):
        if not path.name.startswith("."):
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X\xff")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\xff")
