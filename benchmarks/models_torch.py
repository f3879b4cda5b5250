"""Model folders and batches for benchmarks of whole steps: a real model's folder, or a published
shape with random weights.

Time, memory and operations do not depend on the values, so tokens are random, and a teacher of the
student's own folder is that model with noise in its weights (a teacher equal to its student has a
divergence of 0, which proves nothing).
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_distill.cost.flops import Shape
from mlx_distill.data.batches import Batch, Step, make_batch
from mlx_distill.data.sequences import TokenSequence

if TYPE_CHECKING:
    import torch

NOISE = 0.1  # of each tensor's standard deviation


def _qwen3(width: int, layers: int, heads: int, ffn: int, tied: bool) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": 151_936,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 40_960,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
    }


SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, False),
    "tiny": {
        **_qwen3(64, 2, 4, 128, True),
        "head_dim": 16,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


def config_of(model: str, shape: str) -> dict:
    """The config of a folder or, where none is named, of a shape."""
    return json.loads((Path(model) / "config.json").read_text()) if model else SHAPES[shape]


def student_folder(model: str, shape: str, scratch: Path, device: str, dtype: str) -> Path:
    """The folder of a model, or one made of a shape."""
    return (
        Path(model)
        if model
        else random_folder(SHAPES[shape], scratch / f"student-{shape}", device, 0, dtype)
    )


def teacher_folder(student: Path, shape: str, scratch: Path, device: str, dtype: str) -> Path:
    """A folder made of a shape or, where none is named, of the student's weights and noise."""
    if shape:
        return random_folder(SHAPES[shape], scratch / f"teacher-{shape}", device, 1, dtype)
    return noisy_copy(student, scratch / "teacher", dtype)


def random_folder(config: dict, folder: Path, device: str, seed: int, dtype: str) -> Path:
    """A Hugging Face folder with seeded normal weights; an existing one is kept."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        settings = {key: value for key, value in config.items() if key != "architectures"}
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**settings), dtype=getattr(torch, dtype)
            )
        model.save_pretrained(folder)
        del model
        if device == "cuda":
            torch.cuda.empty_cache()  # the workers need it
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return folder


def noisy_copy(source: Path, folder: Path, dtype: str) -> Path:
    """The model of `source` with seeded noise in each matrix; an existing one is kept."""
    import torch
    from safetensors.torch import load_file, save_file

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for file in sorted(source.glob("*.safetensors")):
        tensors = {
            key: (value.float() + _noise(value, generator)).to(getattr(torch, dtype))
            for key, value in load_file(file).items()
        }
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    return folder


def _noise(value: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    import torch

    return (
        NOISE * value.float().std() * torch.randn(value.shape, generator=generator)
        if value.ndim > 1
        else 0.0
    )


def make_step(vocabulary: int, rows: int, tokens: int, prompt_tokens: int) -> Step:
    """One batch of `rows` sequences of `tokens`, all of them chain of thought after the prompt: no
    padding, no answer.
    """
    random = np.random.default_rng(0)
    drawn = random.integers(0, vocabulary, (rows, tokens)).astype(np.int32)
    everywhere = np.ones(tokens, bool)
    sequences = [
        TokenSequence(str(i), row, prompt_tokens, tokens, everywhere) for i, row in enumerate(drawn)
    ]
    batch = make_batch(sequences, ("cot",))
    return Step(0, (batch,), float(batch.weight.sum()), rows * tokens, len(batch.positions))


def labels_of(batch: Batch, ignored: int) -> np.ndarray:
    """int64[B, T]: labels[b, t] is what position t predicts, `ignored` where it carries no loss."""
    labels = np.full(batch.tokens.size, ignored, np.int64)
    labels[batch.positions] = np.where(batch.weight > 0, batch.targets, ignored)
    return labels.reshape(batch.tokens.shape)


def shape_of(config: dict) -> Shape:
    shape = Shape.of(config)
    if shape is None:
        raise ValueError(
            "the operations of this kind of model are not counted by mlx_distill.cost.flops"
        )
    return shape
