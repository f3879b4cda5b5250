"""What a run will cost: sizes against real models, shapes against real batches, a peak against a
real step, and what is said.
"""

import contextlib
import gc
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from endings import arguments
from mlx.utils import tree_flatten
from rich.console import Console
from tiny import family_folder, llama_config, model_folder, random_weights, recipe_of

from mlx_distill import machine as machines
from mlx_distill import stages
from mlx_distill.backends import BACKENDS, chunks
from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.mlx.self_test import MlxSelfTest
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.backends.torch import loading
from mlx_distill.backends.torch import student as torch_student
from mlx_distill.backends.torch.backend import TorchBackend
from mlx_distill.backends.torch.nf4 import packed_layers
from mlx_distill.cli import main
from mlx_distill.cost import memory
from mlx_distill.cost import plan as plans
from mlx_distill.cost.dense import Dense, teacher_bytes
from mlx_distill.cost.flops import Shape, step_flops
from mlx_distill.cost.memory import Memory, Micro
from mlx_distill.cost.plan import make_plan
from mlx_distill.cost.work import Work
from mlx_distill.data.batches import Steps, make_batch, validation_batches
from mlx_distill.data.prepare import Prepared, prepare
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import ModelError, OutOfMemory
from mlx_distill.machine import Machine
from mlx_distill.models.folder import read_config
from mlx_distill.models.hub import load_tokenizer
from mlx_distill.objective import Objective
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import TeacherTable
from mlx_distill.terminal import plan as printing
from mlx_distill.terminal.plan import announce
from mlx_distill.view import silent

CPU = Machine("mlx", "cpu", "float32", 10**9, "physical memory")
GPU = replace(CPU, device="metal", dtype="bfloat16")
TORCH = replace(CPU, backend="torch")
CUDA = replace(TORCH, device="cuda", dtype="bfloat16")
CONFIG = llama_config(layers=3, width=64, vocabulary=512)


def recipe(**tables) -> Recipe:
    return recipe_of(**{"teacher": {"model": ""}, "objective": {"kd_weight": 0.0}} | tables)


def memory_of(
    tables: dict, config: dict = CONFIG, machine: Machine = CPU, teacher: dict | None = None
) -> Memory:
    dense = partial(Dense.of, name="a model")
    taught = dense(teacher) if teacher else None
    return Memory(recipe(**tables), taught, dense(config), machine)


def sequences(lengths: list[int]) -> tuple[TokenSequence, ...]:
    """All but the first token of each carry loss."""
    return tuple(
        TokenSequence(str(i), np.ones(n, np.int32), 1, n, np.ones(n, bool))
        for i, n in enumerate(lengths)
    )


def prepared(lengths: list[int], validation: tuple[int, ...] = (8,)) -> Prepared:
    return Prepared(sequences(lengths), sequences(lengths), sequences(list(validation)), {}, {})


def plan_of(lengths: list[int], machine: Machine = CPU, config: dict = CONFIG, **tables):
    return make_plan(recipe(**tables), prepared(lengths), None, config, machine)


# sizes


def test_a_format_that_nobody_knows_is_counted_as_stored():
    """It is for the loader to refuse; a plan is not to end in a traceback."""
    odd = CONFIG | {"quantization_config": "gptq"}
    assert Dense.of(odd, "it") == Dense.of(CONFIG, "it")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_a_real_model(family, tied):
    config = llama_config(layers=3, family=family, tied=tied)
    assert Dense.of(config, "it").parameters == sum(
        array.size for array in random_weights(config, 0).values()
    )


@pytest.mark.parametrize("bits, width, ffn", [(8, 64, 128), (4, 64, 96), (4, 32, 64)])
@pytest.mark.parametrize("backend", [MlxBackend, TorchBackend])
def test_a_packed_base_is_counted_as_it_is_held(
    backend, bits, width, ffn, tmp_path, bytes_tokenizer
):
    """Quantised on load, but for matrices that are no whole groups; and as `mlx_lm.convert` stores
    it.
    """
    table = {"tuning": "lora", "rank": 3, "quantize_bits": bits}
    folder = family_folder(
        tmp_path / "s", llama_config(width=width) | {"intermediate_size": ffn}, seed=0
    )
    asked = recipe(student=table)
    if width == 32:  # where only what leads out of the MLP is wide enough
        asked = recipe(student=table | {"lora_targets": ["down_proj"]})
    real = backend().load_student(folder, "it", asked)
    found = Memory(asked, None, Dense.of(read_config(folder), "it"), CPU)
    assert found.student_bytes() == held_bytes(real.split.model)
    assert real.export_bytes() == 4 * found.student.parameters + 8 * found.trainable()

    model, config = mlx_lm.utils.load_model(folder)
    model, config = mlx_lm.utils.quantize_model(model, config, 64, bits)
    mlx_lm.utils.save_model(tmp_path, model)
    mlx_lm.utils.save_config(config, tmp_path / "config.json")
    stored = Dense.of(read_config(tmp_path), "it")
    as_stored = recipe(student=asked.student.model_dump() | {"quantize_bits": 0})
    assert Memory(as_stored, None, stored, CPU).student_bytes() == found.student_bytes()


def held_bytes(model) -> int:
    """Of a model on either backend, what it computes rotations from aside."""
    if isinstance(model, torch.nn.Module):
        buffers = [one for name, one in model.named_buffers() if "inv_freq" not in name]
        for layer in packed_layers(model).values():  # their tables aside
            state = layer.weight.quant_state
            buffers += [state.absmax, *([state.state2.absmax] if state.nested else [])]
        return sum(tensor.nbytes for tensor in [*model.parameters(), *buffers])
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("ffn", [128, 36])
def test_what_bitsandbytes_packs_is_counted_as_it_is_held(ffn, tmp_path):
    """A student's base and a teacher, packed on load; and as transformers stores it, the scales
    packed in turn.
    """
    described = llama_config(width=64, tied=False) | {"intermediate_size": ffn}
    folder = family_folder(tmp_path / "s", described, seed=0)
    asked = recipe(student={"tuning": "lora", "rank": 3, "quantize_bits": "nf4"})
    real = TorchBackend().load_student(folder, "it", asked)
    dense = Dense.of(read_config(folder), "it")
    found = Memory(asked, None, dense, TORCH)
    # 36 numbers a row leave a group that is not whole in one matrix of each block
    assert found.student_bytes() == pytest.approx(held_bytes(real.split.model), abs=2 * 4)
    assert found.trainable() == real.trainable and dense.parameters == real.parameters
    taught = TorchBackend().load_teacher(folder, "it", "nf4").split.model
    counted = teacher_bytes(dense, "nf4", "float32")
    assert counted == pytest.approx(held_bytes(taught), abs=2 * 4)
    assert found.student_unpacked_bytes() == 4 * 64 * max(64, ffn)
    assert not found.head_unpacked_bytes()

    chosen = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=chosen)
    opened.save_pretrained(tmp_path / "packed")
    as_stored = recipe(student=asked.student.model_dump() | {"quantize_bits": 0})
    packed = Dense.of(read_config(tmp_path / "packed"), "it")
    real = TorchBackend().load_student(tmp_path / "packed", "it", as_stored)
    held = held_bytes(real.split.model)
    found = Memory(as_stored, None, packed, TORCH).student_bytes()
    assert found == pytest.approx(held, abs=14 * 4)  # so few scales are no whole group


def test_what_a_packed_base_is_unpacked_to_is_counted():
    """On torch the largest matrix, on MLX those that DoRA adapts; the head for the loss on both."""
    packed = {"tuning": "dora", "quantize_bits": 4, "lora_targets": ["q_proj", "up_proj"]}
    on_mlx, on_torch = (memory_of({"student": packed}, machine=one) for one in (CPU, TORCH))
    plain = memory_of({"student": packed | {"quantize_bits": 0}}, machine=TORCH)
    assert on_mlx.head_unpacked_bytes() == on_torch.head_unpacked_bytes() == 4 * 512 * 64
    assert on_torch.student_unpacked_bytes() == 5 * 512 * 64
    assert on_mlx.unpacked_for_backward() == 4 * (64 * 64 + 64 * 128)
    assert not on_mlx.student_unpacked_bytes() and not on_torch.unpacked_for_backward()
    assert not plain.student_unpacked_bytes() and not plain.head_unpacked_bytes()


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "schedule_free_adamw"])
@pytest.mark.parametrize("tuning", ["full", "lora", "dora"])
def test_student_checkpoint_and_export_are_those_of_a_real_student(
    optimizer, tuning, tmp_path, bytes_tokenizer
):
    student = {"tuning": tuning} | (
        {}
        if tuning == "full"
        else {"rank": 3, "lora_layers": 2, "lora_targets": ["q_proj", "down_proj"]}
    )
    tables = {"student": student | {"save_dtype": "bfloat16"}, "optim": {"optimizer": optimizer}}
    folder = model_folder(tmp_path / "student", bytes_tokenizer(), layers=3, width=64)
    real = MlxBackend().load_student(folder, "it", recipe(**tables))
    found = memory_of(tables, read_config(folder))
    plan = plan_of([8] * 8, config=read_config(folder), **tables)
    # the optimizer's step and rate; the highest rate and the sum of what weighs the mean
    scalars = 20 if optimizer == "schedule_free_adamw" else 12
    assert found.trainable() == real.trainable
    assert plan.checkpoint_bytes == real.state_bytes() - scalars
    assert found.student_bytes() == sum(
        array.nbytes for _, array in tree_flatten(real.split.model.parameters())
    )
    assert plan.student_bytes == real.export_bytes()


def test_what_matches_hidden_states_is_counted(tmp_path, bytes_tokenizer):
    """The matrices that train beside the student, in memory, time and a checkpoint."""
    objective = {"hidden_weight": 0.5, "hidden_layers": [1, 2]}
    student = model_folder(tmp_path / "student", bytes_tokenizer(), layers=3, width=64)
    teacher = model_folder(tmp_path / "teacher", bytes_tokenizer(), layers=2, width=32)
    tables = {"teacher": {"model": "it"}, "objective": objective}
    backend, asked = MlxBackend(), recipe(**tables)
    real = backend.load_student(student, "it", asked)
    real.match_hidden(backend.load_teacher(teacher, "it"))
    configs = read_config(teacher), read_config(student), CPU
    rows = prepared([8] * 8)
    plan, plain = (
        make_plan(recipe(**tables | {"objective": one}), rows, *configs) for one in (objective, {})
    )
    assert plan.checkpoint_bytes == real.state_bytes() - 12
    assert plan.checkpoint_bytes - plain.checkpoint_bytes == 3 * 4 * 2 * 64 * 32
    assert plan.flops["hidden"] == 6 * plan.work.positions.sum() * 2 * 64 * 32
    assert plan.peak.total > plain.peak.total and "hidden" not in plain.flops


@pytest.mark.parametrize("bits, asked", [(0, "auto"), (4, "auto"), (8, "auto"), (0, "bfloat16")])
def test_teacher_bytes_are_those_of_a_real_teacher(bits, asked, tmp_path, bytes_tokenizer):
    folder = model_folder(tmp_path / "teacher", bytes_tokenizer(), layers=2, width=64)
    real = MlxBackend().load_teacher(folder, "it", bits, asked)
    dtype = MlxBackend().device().dtype
    assert teacher_bytes(Dense.of(read_config(folder), "it"), bits, dtype, asked) == sum(
        array.nbytes for _, array in tree_flatten(real.split.model.parameters())
    )


def test_bits_a_weight():
    """4, 6 and 8 bits are 4.5, 6.5 and 8.5 with a bfloat16 scale and bias for 64 weights, half a
    bit more in float32.
    """
    stored = Dense.of(llama_config(width=64) | {"dtype": "bfloat16"}, "it")
    for bits in (4, 6, 8):
        for dtype, size, extra in (("bfloat16", 2, 0.5), ("float32", 4, 1.0)):
            expected = stored.matrices * (bits + extra) / 8 + stored.vectors * size
            assert teacher_bytes(stored, bits, dtype) == expected
    assert (
        teacher_bytes(stored, 0, "bfloat16") == 2 * stored.parameters
        and teacher_bytes(stored, 0, "float32") == 4 * stored.parameters
    )
    packed = Dense.of(
        llama_config(width=64)
        | {"dtype": "bfloat16", "quantization": {"bits": 4, "group_size": 32}},
        "it",
    )
    assert teacher_bytes(packed, 0, "bfloat16") == packed.matrices * 5 / 8 + packed.vectors * 2


def test_a_gpu_keeps_a_copy_to_compute_with():
    weights = Dense.of(CONFIG, "it").parameters
    assert memory_of({}).student_bytes() == 4 * weights
    assert memory_of({}, machine=GPU).student_bytes() == 6 * weights
    assert (
        memory_of({"student": {"compute_dtype": "float32"}}, machine=GPU).student_bytes()
        == 4 * weights
    )
    lora = memory_of({"student": {"tuning": "lora"}}, machine=GPU)
    assert lora.student_bytes() == 2 * weights + 4 * lora.trainable()


# shapes


@pytest.mark.parametrize(("size", "multiple"), [(1, 1), (2, 8), (3, 5), (4, 32)])
def test_micro_batches_are_those_that_train(size, multiple):
    random = np.random.default_rng(size)
    rows = prepared(random.integers(2, 70, 23).tolist(), tuple(random.integers(2, 70, 7).tolist()))
    table = {"micro_batch_size": size, "global_batch_size": 5, "pad_multiple": multiple}
    asked = recipe(batch=table, optim={"epochs": 3})
    steps = Steps(rows.train, ("cot",), asked.batch, 42, 3)
    shapes = [
        Micro(*batch.tokens.shape, len(batch.positions)) for step in steps for batch in step.batches
    ]
    work = Work.of(asked, rows)
    assert work.steps == len(steps) == 14
    assert work.training == {shape: shapes.count(shape) for shape in shapes}
    held_out = [
        Micro(*batch.tokens.shape, len(batch.positions))
        for batch in validation_batches(rows.validation, asked.batch)
    ]
    assert work.validation == {shape: held_out.count(shape) for shape in held_out}


def test_flops_are_those_of_the_steps_and_of_their_padding():
    lengths = [5, 9, 16, 3, 12, 7]
    table = {"micro_batch_size": 2, "global_batch_size": 3, "pad_multiple": 4}
    teacher = llama_config(layers=2, width=32, vocabulary=512)
    asked = recipe(batch=table, teacher={"model": "it"}, objective={"kd_weight": 0.5})
    plan = make_plan(asked, prepared(lengths), teacher, CONFIG, CPU)
    steps = Steps(sequences(lengths), ("cot",), asked.batch, 42)
    shapes = Shape.of(teacher), Shape.of(CONFIG)
    parts = [step_flops(step, *shapes, full=True) for step in steps]
    for part in ("teacher", "student", "head", "loss"):
        assert plan.flops[part] == pytest.approx(sum(found[part] for found in parts))
    padded = 0.0
    for batch in (batch for step in steps for batch in step.batches):
        whole = make_batch(sequences([batch.tokens.shape[1]] * len(batch.tokens)), ("cot",))
        whole = replace(whole, weight=np.ones(len(batch.positions), np.float32))
        step = replace(steps.step(0), batches=(whole,), positions=len(batch.positions))
        padded += sum(step_flops(step, *shapes, full=True).values())
    assert plan.total_flops == pytest.approx(padded)
    assert plan.flops["padding"] > 0
    assert plan_of([9] * 8, batch={"pad_multiple": 1}).flops["padding"] == 0
    assert (plan.work.steps, plan.work.tokens_read, plan.work.loss_tokens) == (2, 52, 46)


def test_what_follows_a_cut_costs_the_student_alone():
    """The teacher's head is not asked there; by hand, at 3 tokens of each of 6 sequences."""
    lengths = [5, 9, 16, 3, 12, 7]
    table = {"micro_batch_size": 2, "global_batch_size": 3, "pad_multiple": 4}
    teacher = llama_config(layers=2, width=32, vocabulary=512)
    asked = recipe(batch=table, teacher={"model": "it"}, objective={"kd_weight": 0.5})
    rows = [replace(one, ending=min(3, len(one) - 1)) for one in sequences(lengths)]
    made = replace(prepared(lengths), train=tuple(rows))
    plan, plain = (make_plan(asked, one, teacher, CONFIG, CPU) for one in (made, prepared(lengths)))
    shapes = Shape.of(teacher), Shape.of(CONFIG)
    parts = [
        step_flops(step, *shapes, full=True) for step in Steps(rows, ("cot",), asked.batch, 42)
    ]
    for part in ("teacher", "student", "head", "loss"):
        assert plan.flops[part] == pytest.approx(sum(found[part] for found in parts))
    endings = 5 * 3 + 2
    assert plan.work.endings.sum() == endings
    assert plan.flops["teacher"] == plain.flops["teacher"]
    heads = 3 * shapes[1].head(plan.work.loss_tokens) + shapes[0].head(
        plan.work.loss_tokens - endings
    )
    assert plan.flops["head"] == pytest.approx(heads)
    said = "".join(str(part) for part in printing.render(plan, CPU, asked))
    assert f"{endings} of them follow a cut, and learn from the text alone" in said


# moments


def test_what_a_llama_block_keeps_for_its_backward_pass():
    """Width 64, four heads of 16, two of keys, 128 in the MLP: input, sum and each norm's two
    results; queries, keys, values and attention's result; the MLP's five; and the probabilities of
    attention.
    """
    kept = 6 * 64 + 64 + 2 * 32 + 64 + 5 * 128
    assert memory_of({})._kept_per_token() == kept
    micro = Micro(2, 10, 16)
    assert memory_of({})._kept_bytes(micro) == 3 * 4 * (20 * kept + 4 * 2 * 100)
    assert memory_of({}, machine=GPU)._kept_bytes(micro) == 3 * 2 * (20 * kept + 4 * 2 * 100)
    assert (
        memory_of({"student": {"gradient_checkpointing": True}})._kept_bytes(micro)
        == 3 * 4 * 20 * 64
    )
    assert memory_of({}, CONFIG | {"model_type": "qwen3"})._kept_per_token() == kept + 2 * (64 + 32)
    lora = {"student": {"tuning": "lora", "rank": 5}}
    assert memory_of(lora)._kept_per_token() == kept - 2 * 64 + 7 * 5
    last = {"student": {"tuning": "lora", "rank": 5, "lora_layers": 1, "lora_targets": ["q_proj"]}}
    assert memory_of(last)._kept_per_token() == kept - 3 * 64 - 64 - 128 + 5
    assert memory_of(last)._kept_bytes(micro) == 4 * (20 * memory_of(last)._kept_per_token() + 800)


def test_scores_are_counted_as_the_installed_mlx_keeps_them(monkeypatch):
    """Its fused backward pass, on Metal since 0.32.4, keeps none; a head of another width and other
    devices take the plain formula.
    """
    wide, micro = CONFIG | {"head_dim": 64}, Micro(2, 10, 16)
    scores = 3 * 2 * 4 * 2 * 100  # blocks, bytes, heads, and [T, T] of each sequence

    def kept(version: str, machine: Machine = GPU, config: dict = wide) -> float:
        monkeypatch.setattr(memory, "versions", lambda: {"mlx": version})
        model = memory_of({}, config, machine)
        return model._kept_bytes(micro) - 3 * 2 * 20 * model._kept_per_token()

    assert kept("0.32.4") == kept("0.33.0") == kept("1.0") == 0
    assert kept("0.32.2") == kept("0.32.4", config=CONFIG) == scores
    assert kept("0.32.4", replace(GPU, device="cuda")) == scores
    forward = [memory_of({}, config, GPU) for config in (wide, CONFIG | {"head_dim": 63})]
    fused, plain = (one._scores_kept(one.student, trains=False) for one in forward)
    assert (fused, plain) == (0, 1)


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 128, 1024])
@pytest.mark.parametrize("vocab", [2, 1000, 16_385, 151_936])
def test_the_plan_counts_the_blocks_that_the_loss_makes(rows: int, vocab: int):
    """Beside the loss's own edges, and what they are for."""
    from mlx_distill.backends.mlx.vocabulary import blocks_of

    edges = blocks_of(vocab, rows, splits=True)
    planned = memory_of({"objective": {"kd_weight": 0.0, "chunk_tokens": rows}})
    assert planned._chunk(Micro(1, 2 * rows, 2 * rows), vocab) == (rows, len(edges))
    sizes = [stop - start for start, stop in edges]
    assert sum(sizes) == vocab and min(sizes) > 0 and max(sizes) <= 2**14
    assert (max(sizes) - 1) * rows <= 2**20


def test_moments_by_hand(monkeypatch):
    """One micro-batch of 2 x 16 tokens, 30 of them loss tokens, with habits that are easy to add
    up.
    """
    habits = replace(memory.HABITS["mlx"], blocks_under_way=4)
    monkeypatch.setitem(memory.HABITS, "mlx", habits)
    monkeypatch.setitem(chunks.MLX_BLOCK_ELEMENTS, "cpu", 30 * 256)
    model = memory_of({"objective": {"kd_weight": 0.0, "chunk_tokens": 30}})
    weights, head, block = model.student.parameters, 4 * 512 * 64, 4 * (32 * 1216 + 4 * 512)
    hidden = 4 * 30 * 3 * 64
    for accumulates, held in ((False, 0), (True, 4 * weights)):
        moments = model.moments([Micro(2, 16, 30)], [], accumulates)
        found = {moment.name: moment for moment in moments}
        assert set(found) == {"loss", "backward begins", "backward ends", "update"}
        assert {moment.student for moment in moments} == {4 * weights}
        assert {moment.teacher for moment in moments} == {0}
        assert found["loss"].gradients == found["backward begins"].gradients == held
        assert found["loss"].loss == (2 + 4) * 4 * 30 * 256 + hidden + head
        assert found["loss"].activations == 3 * block
        assert found["backward begins"].activations == (3 + 1) * block
        assert found["backward begins"].loss == head
        assert found["backward ends"].activations == block
        # tied: the embedding has a gradient of its own
        assert found["backward ends"].gradients == held + 4 * weights + head
        assert (found["update"].gradients, found["update"].activations) == (4 * weights, 0)
        assert found["update"].optimizer == 8 * weights + min(4 * weights, head)
        assert found["loss"].optimizer == 8 * weights
    assert found["loss"].total == sum(getattr(found["loss"], part) for part in memory.PARTS)
    joined = replace(model, recipe=recipe(objective={"kd_weight": 0.0, "chunk_tokens": 1}))
    assert joined.moments([Micro(2, 16, 30)], [], False)[0].loss == 2 * head + hidden
    again = replace(model, recipe=recipe(student={"gradient_checkpointing": True}))
    begins = again.moments([Micro(2, 16, 30)], [], False)[1]
    assert begins.activations == 3 * 4 * 32 * 64 + habits.recomputing * block


def test_the_costliest_micro_batch_is_that_of_the_peak():
    """More tokens or more loss positions, whichever needs more; the optimizer's step sees none."""
    model = memory_of({})
    shapes = [Micro(2, 16, 30), Micro(2, 64, 30), Micro(1, 64, 30)]
    assert model.costliest(shapes) == Micro(2, 64, 30)
    assert model.costliest([Micro(1, 16, 16), Micro(1, 16, 128)]) == Micro(1, 16, 128)
    lengths = [9, 70, 33, 12]
    table = {"micro_batch_size": 1, "global_batch_size": 2, "pad_multiple": 1}
    plan = plan_of(lengths, batch=table)
    assert plan.costliest.training == Micro(1, 70, 69)
    assert plan.costliest.validation == Micro(1, 8, 7)
    assert plan.costliest.accumulates
    alone = plan_of(lengths, batch=table | {"global_batch_size": 1})
    assert not alone.costliest.accumulates


def test_more_costs_more_and_what_saves_saves():
    def peak(**tables) -> float:
        return plan_of([96] * 8, **tables).peak.total

    batch = {"global_batch_size": 8, "pad_multiple": 32}
    sizes = [peak(batch=batch | {"micro_batch_size": size}) for size in (1, 2, 4)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    whole = peak(batch=batch)
    assert peak(batch=batch, student={"gradient_checkpointing": True}) < whole
    assert peak(batch=batch, student={"tuning": "lora"}) < whole
    assert plan_of([48] * 8, batch=batch).peak.total < whole
    assert peak(batch=batch, optim={"optimizer": "adafactor"}) < whole


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"tuning": "lora"},
        {"tuning": "dora", "quantize_bits": 4},
    ],
)
def test_the_peak_of_a_real_step_is_planned_within_15_percent(settings, tmp_path, bytes_tokenizer):
    if MlxBackend().device().dtype != "float32":
        pytest.skip("calibrated on a CPU")
    folders = {
        part: model_folder(tmp_path / part, bytes_tokenizer(), layers=n, width=64, vocabulary=2048)
        for part, n in (("teacher", 2), ("student", 4))
    }
    tables = {
        "student": settings,
        "teacher": {"model": "it"},
        "objective": {"kd_weight": 0.5},
        "batch": {"micro_batch_size": 2, "global_batch_size": 4},
    }
    asked, rows = recipe(**tables), prepared([128] * 4)
    planned = make_plan(
        asked, rows, *(read_config(folders[part]) for part in ("teacher", "student")), CPU
    ).training_peak.total
    gc.collect()  # what earlier tests left would go in the middle of the step
    backend, before = MlxBackend(), mx.get_active_memory()
    student = backend.load_student(folders["student"], "student", asked)
    teacher = backend.load_teacher(folders["teacher"], "teacher")
    step = Steps(rows.train, ("cot",), asked.batch, 42).step(0)
    backend.reset_peak_memory()
    for batch in step.batches:
        student.accumulate(batch, teacher.targets(batch), Objective(), step.loss_tokens)
    student.apply(1e-4)
    assert planned == pytest.approx(backend.memory().peak_bytes - before, rel=0.15)


# torch


def saved_by_autograd(
    settings: dict, layers: int, folder: Path, tokens: torch.Tensor, family: str, tokenizer
) -> int:
    """Bytes of the distinct tensors that a forward pass keeps, parameters aside."""
    model_folder(folder, tokenizer, layers=layers, width=64, family=family)
    student = TorchBackend().load_student(folder, "it", recipe(student=settings))
    weights = {
        parameter.untyped_storage().data_ptr() for parameter in student.split.model.parameters()
    }
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(id(tensor), tensor), lambda tensor: tensor
    ):
        hidden = student.split.hidden(tokens)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in kept.values()
    }
    assert hidden.requires_grad
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the CPU's kernels keep")
@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({}, "llama"),
        ({}, "qwen3"),
        ({"tuning": "lora"}, "llama"),
        ({"tuning": "lora", "lora_targets": ["q_proj"]}, "llama"),
    ],
)
def test_a_torch_block_keeps_what_is_planned(settings, family, tmp_path, bytes_tokenizer):
    """Two blocks' tensors less one's, but for the norms' and attention's one number a row."""
    tokens = torch.ones((2, 96), dtype=torch.long)
    sizes = [
        saved_by_autograd(
            settings, layers, tmp_path / str(layers), tokens, family, bytes_tokenizer()
        )
        for layers in (2, 3)
    ]
    config = read_config(tmp_path / "2")
    planned = memory_of({"student": settings}, config, TORCH)._block_bytes(Micro(2, 96, 96))
    assert planned == pytest.approx(sizes[1] - sizes[0], rel=0.03)


def test_each_backend_is_planned_with_its_own_constants():
    assert set(memory.HABITS) == set(BACKENDS) - {"auto"} == set(plans.SECONDS_FACTOR)
    assert plan_of([96] * 8, TORCH).peak.total != plan_of([96] * 8).peak.total
    assert plan_of([96] * 8, TORCH).peak.allocator > 0 == plan_of([96] * 8).peak.allocator


@pytest.mark.parametrize(
    "machine, chunk", [(CPU, 128), (TORCH, 512), (replace(TORCH, device="cuda"), 1024)]
)
def test_a_chunk_nobody_asked_for_is_the_backends(machine: Machine, chunk: int):
    """4,096 positions: `backends/test_contract.py` has what the backends take."""
    walks = [
        memory_of(
            {"objective": {"kd_weight": 0.0, "chunk_tokens": asked}}, machine=machine
        )._walk_bytes(Micro(4, 1025, 4096), 1.0, None)
        for asked in (0, chunk, chunk // 2)
    ]
    assert walks[0] == walks[1] > walks[2]


def test_the_moments_of_an_eager_backend():
    """Its teacher meets nothing kept, the head's gradient is one piece, and a gradient is added to
    the held one in place.
    """
    objective = {"kd_weight": 0.5, "chunk_tokens": 30}
    teacher = {"teacher": {"model": "it"}, "objective": objective}
    model = memory_of(teacher, machine=TORCH, teacher=CONFIG)
    micro, weights, head = Micro(2, 16, 30), model.student.parameters, 4 * 512 * 64
    found = {moment.name: moment for moment in model.moments([micro], [], accumulates=True)}
    assert set(found) == {"teacher", "loss", "backward begins", "backward ends", "update"}
    assert found["teacher"].activations == model._forward_bytes(model.teacher, micro)
    few = 30  # all: so few ids of so few positions stay in the cache
    assert found["loss"].loss == (2 * 30 + few) * 4 * 512 + 4 * 30 * 4 * 64 + head
    assert found["backward ends"].gradients == 4 * weights + head
    assert found["update"].optimizer == 8 * weights
    other = {**teacher, "objective": objective | {"divergence": "jsd"}}
    walks = [
        made._walk_bytes(micro, 1.0, made.teacher)
        for made in (memory_of(it, machine=TORCH, teacher=CONFIG) for it in (teacher, other))
    ]
    assert walks[1] - walks[0] == 3 * 4 * few * 512


def test_what_torch_does_not_give_back():
    """Holes beside small kept tensors on a CPU; none beside large ones, under checkpointing, or
    where torch counts its own arrays.
    """
    micro = Micro(2, 100, 16)
    full = memory_of({}, machine=TORCH)
    assert full._holes_bytes(micro) == 0.3 * full._kept_bytes(micro)
    lora = memory_of({"student": {"tuning": "lora"}}, machine=TORCH)
    assert lora._holes_bytes(micro) == 1.1 * lora._kept_bytes(micro)
    assert lora._holes_bytes(Micro(2, 2**16 - 1, 16)) > 0  # a tensor of almost 32 MiB
    assert lora._holes_bytes(Micro(2, 2**16, 16)) == 0
    checkpointing = memory_of({"student": {"gradient_checkpointing": True}}, machine=TORCH)
    assert checkpointing._holes_bytes(micro) == 0
    for machine in (CPU, CUDA):
        moments = memory_of({}, machine=machine).moments([micro], [micro], True)
        assert {moment.allocator for moment in moments} == {0}


FREES = """
import numpy as np
from mlx_distill.backends.torch import resident
if {asked}: assert resident.return_freed_blocks()
np.ones(2**21)[0]  # freed at once: glibc's threshold rises above what follows
blocks = [np.ones(2**17) for _ in range(64)]
held = resident.memory().active_bytes
del blocks[::2]
print(held - resident.memory().active_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("asked", [True, False])
def test_freed_blocks_are_returned_where_that_is_asked_for(asked):
    answer = subprocess.run(
        [sys.executable, "-c", FREES.format(asked=asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(answer.stdout) > 24 * 2**20) == asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's allocator")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_asks_for_it(checkpointing, tmp_path, bytes_tokenizer, monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(torch_student.resident, "return_freed_blocks", lambda: asked.append(True))
    folder = model_folder(tmp_path / "student", bytes_tokenizer(), layers=1, width=64)
    TorchBackend().load_student(
        folder, "it", recipe(student={"gradient_checkpointing": checkpointing})
    )
    assert asked == [True] * checkpointing


@pytest.mark.parametrize("machine", [CPU, TORCH, GPU, CUDA])
def test_a_plan_says_whether_its_memory_was_measured(machine, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    said: list[str] = []
    announce(recipe(), prepared([96] * 8), tmp_path, None, machine, said.append)
    estimate = plan_of([96] * 8, machine)
    measured = estimate.with_measured(plans.Measured(7e6, 9e6))
    console = Console(file=io.StringIO(), width=80)
    console.print(*printing.render(estimate, machine, recipe()))
    printed = console.file.getvalue()
    assert "estimated from the configs; not measured on this device" in " ".join(printed.split())
    assert ("freed blocks" in printed) == (machine == TORCH)
    assert "estimated from the configs; not measured on this device" in said[1]
    assert "peak memory 9 MB (measured by one step), 1% of 1 GB: fits" in measured.verdict()
    assert estimate.with_measured(None) == estimate


def test_a_step_that_ran_is_not_refused_whatever_the_device_says_that_it_has():
    plan = tight(10**6)
    assert not plan.fits
    measured = plan.with_measured(plans.Measured(2e6, 0))
    assert measured.fits and measured.advice_lines() == []
    assert measured.verdict().endswith("200% of 1 MB: a step ran all the same")
    measured.check()


# what does not fit


def tight(bytes_: int, config: dict = CONFIG):
    """Eight examples of 96 tokens in two micro-batches on a machine with so little memory."""
    return plan_of(
        [96] * 8,
        replace(CPU, memory_bytes=bytes_),
        config,
        batch={"micro_batch_size": 4, "global_batch_size": 8},
    )


def test_what_fits_needs_no_advice():
    plan = tight(10**9)
    assert plan.fits and plan.advice_lines() == [] and plan.advice is None
    plan.check()
    unknown = tight(0)
    assert unknown.fits and "cannot be asked" in unknown.verdict()
    assert "fits, but tightly" in tight(
        int(plan.peak.total / 0.9)
    ).verdict() and plan.verdict().endswith("fits")


def test_advice_is_ordered_and_names_the_largest_micro_batch():
    wide = llama_config(layers=3, width=128, vocabulary=512)  # adapters are small beside it
    whole = tight(10**9, wide).peak.total
    plan = tight(int(whole * 0.75), wide)
    assert not plan.fits
    assert [change.peak_bytes for change in plan.advice.changes] == sorted(
        change.peak_bytes for change in plan.advice.changes
    )
    assert {change.what.split("=")[0] for change in plan.advice.changes} == {
        "student.tuning",
        "student.gradient_checkpointing",
        "batch.micro_batch_size",
        "truncation.max_tokens",
        "student.compute_dtype",
    }
    assert plan.advice_lines()[0].startswith(plan.advice.changes[0].what) and plan.advice_lines()[
        0
    ].endswith(", fits")
    sizes = {
        size: plan_of(
            [96] * 8, config=wide, batch={"micro_batch_size": size, "global_batch_size": 8}
        ).peak.total
        for size in (1, 2, 3, 4)
    }
    fitting = max(size for size, peak in sizes.items() if peak <= plan.memory_bytes)
    assert 1 <= fitting < 4 and plan.advice.largest.what == f"batch.micro_batch_size={fitting}"
    assert (
        plan.advice.largest.peak_bytes == sizes[fitting]
        and plan.advice.together[0] == plan.advice.changes[0]
    )


def test_the_largest_length_where_no_micro_batch_fits():
    one = plan_of([96] * 8, batch={"micro_batch_size": 1, "global_batch_size": 8}).peak.total
    plan = tight(int(one * 0.9))
    tokens = int(plan.advice.largest.what.split("=")[1].split()[0])
    assert (
        plan.advice.largest.what == f"truncation.max_tokens={tokens} at batch.micro_batch_size=1"
        and plan.advice.largest.fits
    )
    cut = {
        n: plan_of([n] * 8, batch={"micro_batch_size": 1, "global_batch_size": 8}).peak.total
        for n in (tokens, tokens + 1)
    }
    assert cut[tokens] <= plan.memory_bytes < cut[tokens + 1]


def test_a_quantised_teacher_is_advised_where_it_is_large():
    teacher = llama_config(layers=24, width=256, vocabulary=512)
    asked = recipe(teacher={"model": "it"}, objective={"kd_weight": 0.5})
    plan = make_plan(
        asked, prepared([16] * 8), teacher, CONFIG, replace(CPU, memory_bytes=60 * 10**6)
    )
    assert plan.advice.changes[0].what == "teacher.quantize_bits=4" and plan.advice.changes[0].fits
    kept = 8 * 256 * 4  # hidden states of the validation's 8 tokens
    assert plan.peak.teacher == 4 * Dense.of(teacher, "it").parameters + kept > 50 * 10**6
    small = replace(TORCH, memory_bytes=60 * 10**6)
    torchs = make_plan(asked, prepared([16] * 8), teacher, CONFIG, small)
    assert torchs.advice.changes[0].what == "teacher.quantize_bits=4"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_teacher_on_torch_is_counted_as_it_is(bits, tmp_path, bytes_tokenizer):
    """What it holds, and the one matrix that is made for a product."""
    folder = model_folder(tmp_path / "teacher", bytes_tokenizer(), layers=2, width=64)
    real = TorchBackend().load_teacher(folder, "it", bits).split.model
    held = [*real.parameters(), *real.buffers()]
    rotary = sum(b.nbytes for name, b in real.named_buffers() if "inv_freq" in name)
    config = read_config(folder)
    assert teacher_bytes(Dense.of(config, "it"), bits, "float32") == (
        sum(tensor.nbytes for tensor in held) - rotary
    )
    asked = {"teacher": {"model": "it", "quantize_bits": bits}, "objective": {"kd_weight": 0.5}}
    largest = max(
        module.matrix().numel() for module in real.modules() if hasattr(module, "packing")
    )
    on_torch, on_mlx = (memory_of(asked, config, one, config) for one in (TORCH, CPU))
    assert on_torch.unpacked_bytes() == (1 + 4) * largest and on_mlx.unpacked_bytes() == 0
    assert (
        memory_of(asked | {"teacher": {"model": "it"}}, config, TORCH, config).unpacked_bytes() == 0
    )


def test_writing_counts_keys_and_values_and_is_part_of_the_verdict():
    """Who writes once is alone with its texts; who writes as it learns has a run beside it."""
    rollouts = {"batch_size": 4, "max_new_tokens": 10_000}
    tables = {"rollouts": {"by": "student", "temperature": 1.0} | rollouts}
    asked, rows = recipe(**tables), replace(prepared([16] * 8), to_write=(3, 5) * 8)
    plan = make_plan(asked, rows, None, CONFIG, CPU)
    shape, writing = Dense.of(CONFIG, "it").shape, plan.moments[-1]
    a_token = 4 * 2 * shape.layers * shape.kv_heads * shape.head_dim
    assert writing.name == "writing" and plan.peak == writing
    assert 0 < writing.activations - a_token * 4 * (5 + 10_000) < 10**6  # and the prompts' pass
    assert writing.student == 4 * Dense.of(CONFIG, "it").parameters and writing.optimizer == 0
    assert plan.training_peak.name != "writing"
    again = recipe(rollouts=tables["rollouts"] | {"refresh_every": 2})
    beside = make_plan(again, rows, None, CONFIG, CPU).moments[-1]
    assert (beside.student, beside.optimizer) == (writing.student, 2 * writing.student)
    done = make_plan(asked, prepared([16] * 8), None, CONFIG, CPU)
    assert "writing" not in {moment.name for moment in done.moments}
    small = replace(CPU, memory_bytes=int(done.peak.total) * 2)
    measured = plans.Measured(done.peak.total, 0.0)
    tight = make_plan(asked, rows, None, CONFIG, small).with_measured(measured)
    assert not tight.fits and "of writing texts, estimated" in tight.verdict()
    assert make_plan(asked, prepared([16] * 8), None, CONFIG, small).with_measured(measured).fits


def test_nothing_fits():
    plan = tight(10**5)
    assert (
        plan.advice.largest is None
        and plan.advice.together == ()
        and "without another change" in plan.advice_lines()[-1]
    )


def test_a_run_that_cannot_fit_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    said: list[str] = []
    ask = partial(
        announce,
        recipe(),
        prepared([96] * 8),
        tmp_path,
        None,
        replace(CPU, memory_bytes=10**7),
        said.append,
    )
    with pytest.raises(
        OutOfMemory, match=r"10 MB: does not fit; batch\.micro_batch_size=2: saves "
    ) as error:
        ask()
    assert (
        "\n" not in str(error.value)
        and "--force" in str(error.value)
        and "the largest that fits: " in str(error.value)
    )
    assert len(said) == 2 and said[0].startswith(
        "plan: 1 steps of 8 examples, 768 tokens read, 760 carry loss, "
    )
    ask(force=True)
    ask(ranks=2)
    assert "2 ranks share" in said[-1]


def test_a_family_that_cannot_be_planned_is_no_reason_to_refuse(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"model_type": "mixtral", "num_local_experts": 8})
    )
    said: list[str] = []
    announce(recipe(), prepared([9] * 8), tmp_path, None, CPU, said.append)
    assert len(said) == 1 and "cannot be planned" in said[0] and "mixtral" in said[0]
    with pytest.raises(ModelError, match="mixtral"):
        make_plan(recipe(), prepared([9] * 8), None, read_config(tmp_path), CPU)


# what is printed


@pytest.fixture
def without_weights(tiny_recipe, tmp_path) -> Path:
    for part in ("teacher", "student"):
        shutil.copytree(
            tiny_recipe.parent / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns("*.safetensors"),
        )
    path = tmp_path / "tiny.toml"
    path.write_text(
        tiny_recipe.read_text()
        .replace(f'"{tiny_recipe.parent}/teacher"', f'"{tmp_path}/teacher"')
        .replace(f'"{tiny_recipe.parent}/student"', f'"{tmp_path}/student"')
    )
    return path


def printed(path: Path, *settings: str, **arguments) -> tuple[plans.Plan, str]:
    console = Console(file=io.StringIO(), width=80)
    made = printing.plan(load_recipe(path, settings), console, "mlx", **arguments)
    return made, console.file.getvalue()


def test_a_plan_is_printed_in_80_columns_and_needs_no_weights(without_weights):
    made, text = printed(without_weights)
    assert max(map(len, text.splitlines())) <= 80
    assert (
        "6 steps of 4 examples in micro-batches of 2" in text
        and f"{made.work.tokens_read:,} tokens are read" in text
    )
    for word in (
        "cot *",
        "teacher",
        "student",
        "head",
        "loss",
        "padding",
        "gradients",
        "activations",
        "disk: 3 checkpoints",
        ": fits",
    ):
        assert word in text, word
    tokens = prepare(
        load_recipe(without_weights), load_tokenizer(without_weights.parent / "student")
    )
    assert made.tokens_before == tuple(
        sum((s.segments() == kind).sum() for s in tokens.train_whole) for kind in range(3)
    )
    assert made.tokens_after == tuple(
        sum((s.segments() == kind).sum() for s in tokens.train) for kind in range(3)
    )
    assert made.lines()[0].startswith("plan: 6 steps of 4 examples, ") and len(made.lines()) == 2


def test_advice_is_printed_where_it_does_not_fit(without_weights, monkeypatch):
    monkeypatch.setattr(machines, "total_memory_bytes", lambda: 10**6)
    made, text = printed(without_weights)
    assert not made.fits and "does not fit" in text and "- batch.micro_batch_size=1: saves" in text


def test_time_is_an_estimate_from_a_measured_rate(without_weights, monkeypatch):
    monkeypatch.setattr(MlxSelfTest, "matmul_rate", lambda self: 5e6)
    made, text = printed(without_weights, timed=True)
    expected = plans.SECONDS_FACTOR["mlx"] * made.total_flops / 5e6
    assert made.seconds(5e6, "mlx") == expected
    assert f"about {printing.duration(expected)} of training: an estimate" in text
    assert "of training" not in printed(without_weights)[1]


# memory that runs out all the same


@pytest.mark.parametrize(
    "what, where, saved",
    [
        ("a training step", "TorchStudent.accumulate", "the checkpoint of step 3 is intact"),
        ("loading", "loading.load_teacher", "no checkpoint was written yet"),
    ],
)
def test_a_gpu_that_runs_out_of_memory_is_one_line_with_what_to_lower(
    what, where, saved, tiny_recipe, tmp_path, monkeypatch, capsys
):
    """torch's own words are shortened, and the plan's numbers say what to lower."""
    words = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB "
        "of which 5.00 GiB is free. Including non-PyTorch memory, this process has 134.72 GiB "
        "memory in use."
    )
    fails_at = {
        "TorchStudent.accumulate": (torch_student, "kd_loss", 7),
        "loading.load_teacher": (loading, "load_teacher", 0),
    }
    owner, name, call = fails_at[where]
    function, calls = getattr(owner, name), iter(range(100))

    def failing(*rest):
        if next(calls) >= call:
            raise torch.OutOfMemoryError(words)
        return function(*rest)

    monkeypatch.setattr(owner, name, failing)
    monkeypatch.setattr("sys.argv", ["mlx-distill", *arguments(tiny_recipe, tmp_path, "torch")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert (
        line.startswith(f"error: {what}")
        and "does not fit the GPU's memory (CUDA out of memory. Tried to allocate 20.00 GiB" in line
    )
    assert "non-PyTorch" not in line and saved in line
    assert "planned was peak memory about" in line and "batch.micro_batch_size=1 (saves" in line


@pytest.mark.parametrize("force", [False, True])
def test_run_refuses_what_cannot_fit_unless_forced(
    force, tiny_recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(machines, "total_memory_bytes", lambda: 10**6)
    monkeypatch.setattr(
        "sys.argv",
        ["mlx-distill", *arguments(tiny_recipe, tmp_path), *(["--force"] if force else [])],
    )
    if force:
        main_without_exit()
        assert (tmp_path / "tiny" / "student" / "config.json").exists()
        return
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "does not fit" in out
    assert err.startswith("error: peak memory about ") and err.count("\n") == 1 and "--force" in err
    assert not (tmp_path / "tiny" / "student").exists()


def main_without_exit() -> None:
    with contextlib.suppress(SystemExit):
        main()


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("top_k", ("teacher.cache_top_k=8",)),
        ("sampled", ("teacher.cache_samples=9",)),
        ("hidden", ()),
    ],
)
def test_a_teacher_cache_is_planned_and_spares_the_teacher(kind, settings, tiny_recipe, tmp_path):
    """On disk what `teach` writes (its headers aside; of draws at most); in memory no teacher but
    where its head is kept.
    """
    made = load_recipe(
        tiny_recipe, (f"teacher.cache={kind}", f"teacher.cache_folder={tmp_path}", *settings)
    )
    whole = prepare(made, load_tokenizer(tiny_recipe.parent / "student"))
    configs = [read_config(tiny_recipe.parent / part) for part in ("teacher", "student")]
    planned = make_plan(made, whole, *configs, CPU)
    live = make_plan(
        made.model_copy(update={"teacher": TeacherTable(model=made.teacher.model)}),
        whole,
        *configs,
        CPU,
    )
    assert (
        live.cache_bytes == 0 < planned.cache_bytes
        and planned.disk_bytes == live.disk_bytes + planned.cache_bytes
    )
    assert "teacher" in live.flops and "teacher" not in planned.flops
    assert (planned.peak.teacher == 0) == (
        kind != "hidden"
    ) and planned.peak.total <= live.peak.total
    stages.teach([made], silent(), "mlx")
    written = sum(file.stat().st_size - 128 for file in tmp_path.rglob("*.npy"))
    assert written <= planned.cache_bytes and (
        kind == "sampled" or written >= 0.97 * planned.cache_bytes
    )


@pytest.mark.parametrize(
    "where, said, expected",
    [
        (
            "save_state",
            "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
            ("a checkpoint does not fit the memory", "planned was", "batch.micro_batch_size=1"),
        ),
        (
            "accumulate",
            "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
            ("the system ended training on the GPU", "lower batch.micro_batch_size"),
        ),
    ],
)
def test_what_metal_could_not_do_is_one_line_that_says_what_to_lower(
    where, said, expected, tiny_recipe, tmp_path, monkeypatch, capsys
):
    """Wherever it comes up in a run, a checkpoint's writing included: it is never the disk."""

    def failing(*rest):
        raise RuntimeError(f"[METAL] Command buffer execution failed: {said}.")

    monkeypatch.setattr(MlxStudent, where, failing)
    monkeypatch.setattr("sys.argv", ["mlx-distill", *arguments(tiny_recipe, tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert all(words in line for words in (*expected, said, "no checkpoint was written yet"))
    assert "disk" not in line
