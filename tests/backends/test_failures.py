"""What MLX says of a GPU that could not, met in every call of the protocol: one line that names the
call and what to lower, never a traceback.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from tiny import family_folder, llama_config, recipe_of

from mlx_distill.backends.mlx.backend import MlxBackend
from mlx_distill.backends.protocol import Sampling
from mlx_distill.data.batches import make_batch
from mlx_distill.data.sequences import TokenSequence
from mlx_distill.errors import DeviceStopped, DistillError, OutOfMemory
from mlx_distill.objective import Objective

METAL = "[METAL] Command buffer execution failed: "
# as `mlx/backend/metal` writes them
SAID = {
    f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).": (
        OutOfMemory
    ),
    "[metal::malloc] Attempting to allocate 40000000000 bytes which is greater than the maximum "
    "allowed buffer size of 20000000000 bytes.": OutOfMemory,
    "[metal::malloc] Resource limit (499000) exceeded.": OutOfMemory,
    "[malloc] Unable to allocate 40000000000 bytes.": OutOfMemory,
    f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).": (
        DeviceStopped
    ),
    f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteracti"
    "vity).": DeviceStopped,
}
WORDS = {
    "accumulate": ("a training step", "batch.micro_batch_size"),
    "score": ("validation", "data.longest_tokens"),
    "apply": ("an optimizer step", "batch.micro_batch_size"),
    "save_state": ("a checkpoint", "batch.micro_batch_size"),
    "export": ("the student's export", "batch.micro_batch_size"),
    "states": ("the teacher's forward pass", "batch.micro_batch_size"),
    "top_k": ("the teacher's forward pass", "batch.micro_batch_size"),
    "activations": ("reading texts", "data.longest_tokens"),
    "generate": ("generating", "eval.batch_size"),
    "load_teacher": ("loading the teacher", "batch.micro_batch_size"),
    "load_student": ("loading the student", "batch.micro_batch_size"),
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> dict:
    """Each call of the protocol, ready to be made."""
    folder = tmp_path_factory.mktemp("model") / "model"
    family_folder(folder, llama_config(layers=1))
    backend, recipe = MlxBackend(), recipe_of(objective={"chunk_tokens": 4})
    teacher = backend.load_teacher(folder, "the teacher")
    student = backend.load_student(folder, "the student", recipe)
    tokens = np.arange(1, 8, dtype=np.int32)
    sequence = TokenSequence("a", tokens, 2, 5, np.ones(7, bool))
    batch = make_batch([sequence], ("cot", "answer"))
    targets, objective = teacher.targets(batch), Objective(kd_weight=0.5)
    student.accumulate(batch, targets, objective, 5.0)
    out, held = folder.parent, student.gradients

    def apply():
        student.gradients = held
        student.apply(1e-3)

    return {
        "accumulate": lambda: student.accumulate(batch, targets, objective, 5.0),
        "score": lambda: student.score(batch, targets, objective),
        "apply": apply,
        "save_state": lambda: student.save_state(out),
        "export": lambda: student.export(out / "student", [2]),
        "states": lambda: teacher.states(batch),
        "top_k": lambda: teacher.top_k(batch, 4, 8),
        "activations": lambda: teacher.activations([tokens], 8),
        "generate": lambda: list(teacher.generate([[1, 2]], Sampling(2))),
        "load_teacher": lambda: backend.load_teacher(folder, "the teacher"),
        "load_student": lambda: backend.load_student(folder, "the student", recipe),
    }


@pytest.mark.parametrize("call", WORDS)
@pytest.mark.parametrize("said", SAID, ids=lambda said: said[-40:-20])
def test_a_failure_of_the_gpu_is_one_line(calls, call, said, monkeypatch):
    def failing(*arrays, **rest):
        raise RuntimeError(said)

    # where arrays are computed: in these calls, in mlx-lm's loading, and as they are written
    monkeypatch.setattr(mx, "eval", failing)
    monkeypatch.setattr(mx, "save_safetensors", failing)
    monkeypatch.setattr("mlx_distill.backends.mlx.teacher.to_bits", failing)
    monkeypatch.setattr("mlx_distill.backends.mlx.teacher._top_k", failing)
    monkeypatch.setattr(BatchGenerator, "next_generated", failing)
    what, lower = WORDS[call]
    with pytest.raises(DistillError) as found:
        calls[call]()
    assert type(found.value) is SAID[said]
    line = str(found.value)
    assert what in line and said.rstrip(".") in line and "\n" not in line and "disk" not in line
    if SAID[said] is DeviceStopped or call == "generate":
        assert lower in line
