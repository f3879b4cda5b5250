"""Our definition of rotary embeddings gives transformers' angles, type by type."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_distill.models.rotary import TYPES, Rotary

STRETCHED = {"rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 512}
FACTORS = {
    "short_factor": [1 + i / 40 for i in range(32)],
    "long_factor": [1 + i for i in range(32)],
}
CASES = {
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_theta": 1e4, "factor": 4.0},
    "llama3": STRETCHED | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": STRETCHED,
    "yarn, whole pairs": STRETCHED | {"truncate": False},
    "yarn, other turns": STRETCHED | {"beta_fast": 16, "beta_slow": 2},
    "yarn, attention": STRETCHED | {"attention_factor": 1.3},
    "yarn, two scales": STRETCHED | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, one scale": STRETCHED | {"mscale": 0.7},
    "yarn, no factor": STRETCHED | {"factor": None},
    "longrope": STRETCHED | FACTORS | {"factor": None},
    "longrope, factor": STRETCHED | FACTORS,
    "longrope, attention": STRETCHED | FACTORS | {"attention_factor": 1.1},
}


@pytest.mark.parametrize("length", [2, 512, 513, 4096, 4097, 9000])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_angles_are_those_of_transformers(case: str, length: int):
    kind = case.partition(",")[0]
    parameters = CASES[case] | {"rope_type": kind}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    wanted, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    found, ours = Rotary(64, 4096, parameters=parameters).angles(length)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-6)
    assert ours == pytest.approx(scale, rel=1e-9)


def test_every_type_is_compared():
    assert {case.partition(",")[0] for case in CASES} | {"default"} == set(TYPES)


def test_the_default_is_the_definition():
    found, scale = Rotary(8, 64, parameters={"rope_theta": 1e4}).angles(2)
    np.testing.assert_allclose(found, [1, 0.1, 0.01, 0.001])
    assert scale == 1


def test_a_pair_is_turned_by_position_times_angle():
    rotary = Rotary(2, 64, parameters={"rope_theta": 1e4})
    first, second = rotary.rotated(np.ones(1), np.zeros(1), length=4)
    np.testing.assert_allclose([first[0], second[0]], [np.cos(3), np.sin(3)])
