"""What only models of mlx-lm have: quantised heads of every kind, heads that are functions, and
what mlx-lm does on load.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from frameworks import FRAMEWORKS, relative_error
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from test_model import (
    FAMILIES,
    NO_TRUNK,
    NOT_SPLIT,
    OWN,
    ROWS,
    assert_refused,
    decoder,
    edit,
    large_hidden,
)
from tiny import family_folder, llama_config, recipe_of

from mlx_distill.backends.mlx import loading
from mlx_distill.backends.mlx import model as models
from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.mlx.heads import CallableHead, QuantizedHead
from mlx_distill.backends.mlx.weights import parameter_count
from mlx_distill.data.batches import make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.objective import Objective

MLX = FRAMEWORKS["mlx"]
EVERY = FAMILIES | OWN["mlx"]


# The split


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", EVERY)
def test_quantised_heads_are_walked_block_by_block(name: str, bits: int, tmp_path: Path):
    split = MLX.load_teacher(family_folder(tmp_path, EVERY[name]), bits)
    head, hidden = split.loss_head(), large_hidden(MLX, split)
    blocks = [head.logits(hidden, start, stop) for start, stop in ((0, 1), (1, 40), (40, ROWS))]
    assert all(block.dtype == mx.float32 for block in blocks)
    assert (
        relative_error(np.array(mx.concatenate(blocks, axis=1)), MLX.numpy(split.head(hidden)))
        < 1e-5
    )
    assert isinstance(head, QuantizedHead)  # a callable head would be copied whole to float32
    if (matrix := split.head_matrix()) is not None:  # of a family without a cap or a scale
        assert relative_error(np.array(hidden @ matrix.T), MLX.numpy(split.head(hidden))) < 1e-5


def test_head_path_under_a_language_model():
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.language_model = inner

        def __call__(self, inputs: mx.array) -> mx.array:
            return self.language_model(inputs)

    for tied, path in ((True, "model.embed_tokens.weight"), (False, "lm_head.weight")):
        inner = llama.Model(llama.ModelArgs.from_dict(decoder("llama", tie_word_embeddings=tied)))
        assert models.SplitModel(Outer(inner), "m").head_path == f"language_model.{path}"


class Stub(llama.Model):
    """A llama to which subclasses do something after the head."""

    def __init__(self):
        mx.random.seed(0)
        super().__init__(llama.ModelArgs.from_dict(decoder("llama")))


class AddsInputs(Stub):
    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache) + 0.1 * inputs[..., :1].astype(mx.float32).mean()


class EmbedsInputs(Stub):
    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache) + 10 * self.model.embed_tokens(inputs).sum(
            axis=-1, keepdims=True
        )


class AddsByToken(Stub):
    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache) + 50 * mx.arange(ROWS)


@pytest.mark.parametrize("stub", [AddsInputs, EmbedsInputs])
def test_a_head_that_needs_more_than_hidden_states_is_refused(stub: type):
    assert_refused(lambda: models.SplitModel(stub(), "m"), NOT_SPLIT)


def test_a_head_that_is_not_blockwise_is_called_whole():
    split = models.SplitModel(AddsByToken(), "m")
    head, hidden = split.loss_head(), large_hidden(MLX, split)
    assert isinstance(head, CallableHead) and split.head_matrix() is None
    assert (
        relative_error(
            np.array(head.logits(hidden, 10, 30)), np.array(split.head(hidden)[:, 10:30])
        )
        < 1e-6
    )


def test_a_model_without_a_trunk_is_refused():
    assert_refused(lambda: models.SplitModel(nn.Linear(2, 2), "m"), NO_TRUNK.format("mlx.nn"))


# Teachers


def test_quantised_on_load(tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["qwen3"])
    exact = loading.load_teacher(folder, "m", 0)
    logits = MLX.logits(exact)
    errors = []
    for bits in (8, 6, 4):
        split = loading.load_teacher(folder, "m", bits)
        assert split.trunk.layers[0].mlp.up_proj.bits == bits == split.model.lm_head.bits
        assert not tree_flatten(split.model.trainable_parameters())
        assert parameter_count(split.model) == pytest.approx(parameter_count(exact.model), rel=0.01)
        errors.append(relative_error(MLX.logits(split), logits))
    assert 0 < errors[0] < errors[1] < errors[2] < 0.7


def test_quantising_the_narrow_is_refused(tmp_path: Path):
    narrow = family_folder(tmp_path, llama_config(width=32) | {"intermediate_size": 32})
    assert_refused(
        lambda: MLX.load_teacher(narrow, 4),
        "no layer is as wide as a multiple of 64.*: set quantize_bits = 0",
    )


def test_a_stored_quantised_head_stays_quantised(tmp_path: Path):
    model, config = mlx_lm.utils.load_model(
        family_folder(tmp_path / "wide", FAMILIES["llama tied"])
    )
    model, config = mlx_lm.utils.quantize_model(model, config, 64, 8)
    mlx_lm.utils.save_model(tmp_path / "stored", model)
    mlx_lm.utils.save_config(config, tmp_path / "stored" / "config.json")
    assert isinstance(loading.load_teacher(tmp_path / "stored", "m", 0).loss_head(), QuantizedHead)


# Students


def test_a_head_of_its_own_is_believed_where_the_config_says_nothing(tmp_path: Path):
    """Without `tie_word_embeddings` mlx-lm ties a llama, transformers does not."""
    folder = family_folder(tmp_path, FAMILIES["llama untied"])
    wanted = MLX.logits(MLX.load_teacher(folder))
    change_config(folder, lambda config: config.pop("tie_word_embeddings"))
    np.testing.assert_array_equal(MLX.logits(MLX.load_teacher(folder)), wanted)
    assert MLX.load_student(folder).head_path == "lm_head.weight"


def test_a_head_that_mlx_lm_would_drop_is_refused(tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["llama untied"])
    wanted = MLX.logits(MLX.load_teacher(folder))
    change_config(folder, lambda config: config.update(tie_word_embeddings=True))
    np.testing.assert_array_equal(
        MLX.logits(MLX.load_teacher(folder)), wanted
    )  # as transformers reads it
    assert_refused(
        lambda: MLX.load_student(folder), r"tensor lm_head\.weight is changed by mlx-lm on load"
    )
    edit(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    MLX.load_student(folder)  # a tied head stored twice is no obstacle


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Gradient checkpointing


def test_checkpointed_blocks_have_a_class_of_their_own(tmp_path: Path):
    student = MLX.load_student(family_folder(tmp_path, FAMILIES["llama tied"]))
    models.checkpoint_layers(student)
    assert {type(layer).__name__ for layer in student.layers} == {"CheckpointedTransformerBlock"}
    assert llama.TransformerBlock.__name__ == "TransformerBlock"


def test_a_tokens_gradient_is_summed_in_float32(tmp_path: Path):
    """One that occurs 512 times in a micro-batch gets what it gets from 64 micro-batches of 8."""
    family_folder(tmp_path / "student", llama_config(layers=1, tied=False))
    student = MlxBackend().load_student(
        tmp_path / "student", "student", recipe_of(student={"compute_dtype": "bfloat16"})
    )
    random, everywhere = np.random.default_rng(3), np.ones(16, bool)
    rows = [
        TokenSequence(
            f"s{i}", np.insert(random.integers(6, 200, 8), range(8), 5), 2, 14, everywhere
        )
        for i in range(64)
    ]
    found = []
    for size in (64, 1):
        student.gradients = None
        for start in range(0, 64, size):
            batch = make_batch(rows[start : start + size], ("cot", "answer"))
            student.accumulate(batch, None, Objective(kd_weight=0.0), 1.0)
        found.append(np.array(student.gradients["model"]["embed_tokens"]["weight"])[5])
    assert np.abs(found[0] - found[1]).max() <= 1e-4 * np.abs(found[1]).max()
    assert student.embedding.module.rounds_to is None
