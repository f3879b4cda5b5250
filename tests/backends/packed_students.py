"""What the tests of students on a packed base share: a short text, and steps on it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from frameworks import Framework, relative_error, state_of
from safetensors.numpy import load_file
from tiny import recipe_of

from mlx_distill.backends import choose_backend
from mlx_distill.data.batches import make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.objective import Objective

ROWS = 96
TOKENS = np.random.default_rng(0).integers(1, ROWS, 24).astype(np.int32)
BATCH = make_batch([TokenSequence("a", TOKENS, 4, 20, np.ones(24, bool))], ("cot", "answer"))
ALONE = Objective(kd_weight=0.0)


def student(framework: Framework, folder: Path, tuning: str = "lora", bits: int | str = 0, **table):
    asked = {"model": "s", "tuning": tuning, "quantize_bits": bits, "save_dtype": "float32"}
    recipe = recipe_of(student=asked | table)
    return choose_backend(framework.name).load_student(folder, "org/base", recipe)


def trained(one, steps: int = 3) -> list[float]:
    """The losses of some steps."""
    losses = []
    for _ in range(steps):
        losses.append(one.accumulate(BATCH, None, ALONE, 20.0).terms["ce"].sum() / 20)
        one.apply(1e-2)
    return losses


def kept(one) -> dict[str, np.ndarray]:
    """What a checkpoint holds: adapters, and the means of their gradients."""
    with state_of(one) as folder:
        return load_file(folder / "weights.safetensors") | load_file(
            folder / "optimizer.safetensors"
        )


def assert_equal_students(packed, plain) -> None:
    """The one on a packed base learns as the one on its numbers written out: counts, the means of
    the first gradients, and the losses of some steps.
    """
    assert packed.parameters == plain.parameters and packed.trainable == plain.trainable
    for one in (packed, plain):
        one.accumulate(BATCH, None, ALONE, 20.0)
        one.apply(0.0)  # the means of the gradients alone
    one, other = kept(packed), kept(plain)
    assert one.keys() == other.keys()
    moments = [key for key in one if key.endswith((".lora_b.m", ".m.m"))]
    assert len(moments) >= 14
    for key in moments:
        assert relative_error(one[key], other[key]) < 1e-4
    assert trained(packed) == pytest.approx(trained(plain), rel=1e-4)


def logits_of(folder: Path) -> np.ndarray:
    """By transformers, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS[None]).long()).logits.numpy()
