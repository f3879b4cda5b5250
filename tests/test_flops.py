"""Operations of a step, against counts done by hand and torch's own."""

import numpy as np
import pytest
import torch
from tiny import llama_config, model_folder, recipe_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mlx_distill.backends.torch.backend import TorchBackend
from mlx_distill.cost.flops import Adapters, Shape, step_flops, total_flops, training_flops
from mlx_distill.data.batches import Step, make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.models.folder import read_config
from mlx_distill.objective import Objective
from mlx_distill.recipe.tables import StudentTable

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "intermediate_size": 16,
    "vocab_size": 50,
}
SHAPE = Shape(8, 3, 4, 2, 5, 16, 50)
MATRICES = 3 * (
    2 * 8 * 20 + 2 * 8 * 10 + 3 * 8 * 16
)  # q and o, k and v, the three of the MLP: 2,592 weights
ATTENTION = 3 * 4 * 5 * 2  # a layer's heads · head_dim · (QKᵀ and PV), times 2 · T²/2


def step(lengths: list[int], multiple: int = 8) -> Step:
    """Every token but the first carries loss; two micro-batches."""
    sequences = [
        TokenSequence(str(n), np.ones(n, np.int32), 0, n, np.ones(n, bool)) for n in lengths
    ]
    batches = tuple(make_batch(part, ("cot",), multiple) for part in (sequences[:1], sequences[1:]))
    positions = sum(lengths) - len(lengths)
    return Step(0, batches, float(positions), sum(lengths), positions)


def test_shape_of_a_config():
    assert Shape.of(CONFIG) == SHAPE
    plain = {
        key: value
        for key, value in CONFIG.items()
        if key not in ("num_key_value_heads", "head_dim")
    }
    assert Shape.of(plain) == Shape(8, 3, 4, 4, 2, 16, 50)
    assert (
        Shape.of(CONFIG | {"num_experts": 8}) is None
        and Shape.of(CONFIG | {"num_local_experts": 8}) is None
    )
    for key in plain:
        assert Shape.of({name: value for name, value in CONFIG.items() if name != key}) is None


def test_a_full_step_by_hand():
    trunk = 2 * MATRICES * (6 + 4 + 10) + ATTENTION * (36 + 16 + 100)
    head = 2 * 8 * 50 * (5 + 3 + 9)
    assert step_flops(step([6, 4, 10]), None, SHAPE, full=True) == {
        "student": 3 * trunk,
        "head": 3 * head,
        "loss": 7 * 50 * 17,
    }
    teacher = Shape(16, 1, 2, 2, 8, 32, 50)
    teacher_trunk = 2 * (4 * 16 * 16 + 3 * 16 * 32) * 20 + 1 * 2 * 8 * 2 * 152
    assert step_flops(step([6, 4, 10]), teacher, SHAPE, full=True) == {
        "teacher": teacher_trunk,
        "student": 3 * trunk,
        "head": 3 * head + 2 * 16 * 50 * 17,
        "loss": 16 * 50 * 17,
    }


def test_frozen_matrices_have_no_gradient_of_their_own_but_attention_has():
    matrices, attention, head = 2 * MATRICES * 20, ATTENTION * 152, 2 * 8 * 50 * 17
    full, lora = (step_flops(step([6, 4, 10]), None, SHAPE, full=on) for on in (True, False))
    assert lora == {"student": 2 * matrices + 3 * attention, "head": 2 * head, "loss": 7 * 50 * 17}
    assert 2 / 3 < lora["student"] / full["student"] < 1 and lora["head"] / full[
        "head"
    ] == pytest.approx(2 / 3)


def test_checkpointing_computes_a_block_again_without_its_last_matrix():
    plain, again = (
        step_flops(step([6, 4, 10]), None, SHAPE, True, checkpointing=on)["student"]
        for on in (False, True)
    )
    assert again - plain == 2 * (MATRICES - 3 * 16 * 8) * 20 + ATTENTION * 152


def test_adapters_on_the_last_block_leave_the_others_a_forward_pass():
    """Rank 4 on q (8 in, 20 out) and down (16 in, 8 out) of one block of three; two matrix passes
    and three of attention there.
    """
    table = StudentTable(tuning="lora", rank=4, lora_layers=1, lora_targets=("q_proj", "down_proj"))
    adapters = Adapters.of(table, SHAPE)
    assert (
        adapters == Adapters(1, 4 * (8 + 20 + 16 + 8))
        and Adapters.of(StudentTable(), SHAPE) is None
    )
    matrices, attention, low_rank = 2 * MATRICES * 20, ATTENTION * 152, 2 * 208 * 20
    found = training_flops([6, 4, 10], 17, None, SHAPE, False, False, adapters)["student"]
    assert found == pytest.approx(
        (2 * matrices + 3 * attention) / 3 + 2 * (matrices + attention) / 3 + 3 * low_rank
    )
    again = training_flops([6, 4, 10], 17, None, SHAPE, False, True, adapters)["student"]
    assert again - found == pytest.approx((matrices + attention) / 3 + low_rank)
    everywhere = Adapters.of(
        StudentTable(tuning="lora", rank=4, lora_targets=("q_proj", "no_such")), SHAPE
    )
    assert everywhere == Adapters(3, 3 * 4 * 28)


def test_six_n_d():
    """A real shape at a short length costs about 6 operations per weight and token."""
    shape = Shape(1024, 28, 16, 8, 128, 3072, 151_936)
    weights = 28 * (1024 * 128 * (2 * 16 + 2 * 8) + 3 * 1024 * 3072) + 1024 * 151_936
    parts = step_flops(step([256, 256]), None, shape, full=True)
    assert sum(parts.values()) == pytest.approx(6 * weights * 512, rel=0.05)


def test_half_the_length_costs_a_little_less_than_half():
    """The paper counts 0.47 to 0.48 at 4k tokens for an 8B teacher and a 4B student."""
    teacher, student = (
        Shape(4096, 36, 32, 8, 128, 12288, 151_936),
        Shape(2560, 36, 32, 8, 128, 9728, 151_936),
    )
    whole, half = (
        sum(step_flops(step([n, n]), teacher, student, full=True).values()) for n in (4096, 2048)
    )
    assert 0.46 < half / whole < 0.49


def test_padding_is_not_counted():
    assert step([6, 4, 10]).batches[1].tokens.shape == (2, 16)
    shape = Shape.of(llama_config())
    assert shape == Shape(32, 2, 4, 2, 8, 64, 288)
    alone = step_flops(step([5, 3]), None, shape, full=True)
    assert alone["student"] == 3 * (shape.trunk([5]) + shape.trunk([3]))


def test_totals():
    steps = [{"student": 1.0, "head": 2.0}, {}, {"student": 3.0, "teacher": 4.0}]
    assert total_flops(steps) == {"student": 4.0, "head": 2.0, "teacher": 4.0, "total": 10.0}
    assert total_flops([{}, {}]) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's kernels")
@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 0.001), ({"gradient_checkpointing": True}, 0.001), ({"tuning": "lora"}, 0.04)],
    ids=["full", "checkpointing", "lora"],
)
def test_products_are_those_that_torch_counts(settings, most, tmp_path, bytes_tokenizer):
    """A step of both models; torch counts attention's masked half too, which is taken off, and the
    loss's elementwise passes are no products.
    """
    configs = {"teacher": {"layers": 3, "width": 32}, "student": {"layers": 2, "width": 64}}
    folders = {
        part: model_folder(tmp_path / part, bytes_tokenizer(), **config)
        for part, config in configs.items()
    }
    recipe = recipe_of(student=settings)
    backend = TorchBackend()
    student = backend.load_student(folders["student"], "student", recipe)
    teacher = backend.load_teacher(folders["teacher"], "teacher")
    one = step([60, 60, 60], multiple=1)

    def in_place(total: list[int], left: list[int], right: list[int], **_) -> int:
        return 2 * left[0] * left[1] * right[1]

    unknown = {torch.ops.aten.addmm_: in_place}
    with (
        FlopCounterMode(display=False, custom_mapping=unknown) as counter,
        sdpa_kernel(SDPBackend.MATH),  # its products are ordinary ones: bmm
    ):
        for batch in one.batches:
            student.accumulate(batch, teacher.targets(batch), Objective(), one.loss_tokens)
    counted = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    attention = counted["aten.bmm"]
    shapes = [Shape.of(read_config(folders[part])) for part in ("teacher", "student")]
    table = recipe.student
    planned = step_flops(
        one,
        *shapes,
        table.tuning == "full",
        table.gradient_checkpointing,
        Adapters.of(table, shapes[1]),
    )
    assert sum(planned.values()) - planned["loss"] == pytest.approx(
        sum(counted.values()) - attention / 2, rel=most
    )
