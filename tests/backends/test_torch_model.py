"""What only models of transformers have: quantising on CUDA alone, folders that mean something
else, dropout, checkpointed blocks.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from frameworks import CPU, FRAMEWORKS, TOKENS, relative_error, student_of
from safetensors.torch import save_file
from test_model import (
    FAMILIES,
    NO_TRUNK,
    NOT_SPLIT,
    OWN,
    ROWS,
    assert_refused,
    configure,
    decoder,
    edit,
    large_hidden,
    saved_by_transformers,
)
from tiny import family_folder, texts
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from mlx_distill.backends.torch import loading
from mlx_distill.backends.torch import model as models
from mlx_distill.backends.torch.adapters import (
    adapted_modules,
    fused_weights,
    parameter_count,
)
from mlx_distill.backends.torch.heads import CallableHead, MatrixHead
from mlx_distill.backends.torch.weights import stored_weights
from mlx_distill.recipe.tables import StudentTable

TORCH = FRAMEWORKS["torch"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a tied llama."""
    return family_folder(tmp_path / "model", FAMILIES["llama tied"])


# The split


class Stub(LlamaForCausalLM):
    """A llama to which subclasses do something after the head."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(LlamaConfig(**decoder("llama", initializer_range=0.1)))

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(
            logits=super().forward(input_ids, **kwargs).logits + self.extra(input_ids)
        )


class AddsInputs(Stub):
    def extra(self, inputs):
        return 0.1 * inputs[..., :1].float().mean()


class EmbedsInputs(Stub):
    def extra(self, inputs):
        return 10 * self.model.embed_tokens(inputs).sum(axis=-1, keepdims=True)


class AddsByToken(Stub):
    def extra(self, inputs):
        return 50 * torch.arange(ROWS)


class NoTrunk(Stub):
    base_model_prefix = "elsewhere"


@pytest.mark.parametrize("stub", [AddsInputs, EmbedsInputs])
def test_a_head_that_needs_more_than_hidden_states_is_refused(stub: type):
    assert_refused(lambda: models.SplitModel(stub(), "m"), NOT_SPLIT)


def test_a_model_without_a_trunk_is_refused():
    assert_refused(lambda: models.SplitModel(NoTrunk(), "m"), NO_TRUNK.format("test_torch_model"))


def test_a_head_that_cannot_be_cut_is_called_whole():
    """What is added depends on the token: as a function of the first logits alone it would fail."""
    split = models.SplitModel(AddsByToken(), "m")
    head, hidden = split.loss_head(), large_hidden(TORCH, split)
    assert isinstance(head, CallableHead) and split.head_matrix() is None
    assert (
        relative_error(
            TORCH.numpy(head.logits(hidden, 30)), TORCH.numpy(split.head(hidden)[:, :30])
        )
        < 1e-6
    )


def test_a_head_is_cut_to_the_ids_that_are_asked_for(tmp_path: Path):
    for number, name in enumerate(("llama untied", "phi, biased head", "gemma2, capped")):
        split = TORCH.load_teacher(family_folder(tmp_path / str(number), FAMILIES[name]))
        head, hidden = split.loss_head(), large_hidden(TORCH, split)
        assert isinstance(head, MatrixHead)
        assert (
            relative_error(
                TORCH.numpy(head.logits(hidden, 30)), TORCH.numpy(split.head(hidden)[:, :30])
            )
            < 1e-6
        )


def test_attention_is_the_fastest_that_the_family_has(folder: Path, tmp_path: Path):
    capped = family_folder(tmp_path / "capped", FAMILIES["gemma2, capped"])
    kinds = [
        TORCH.load_teacher(path).model.config._attn_implementation for path in (folder, capped)
    ]
    assert kinds == ["sdpa", "eager"]  # sdpa has no cap


@pytest.mark.parametrize(
    "config",
    [FAMILIES["llama tied"] | {"attention_dropout": 0.5}, OWN["torch"]["gpt2, transformer"]],
)
def test_nothing_is_dropped_out(config: dict, tmp_path: Path):
    split = models.SplitModel(
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        ).train(),
        "m",
    )
    first, second = TORCH.hidden(split), TORCH.hidden(split)
    assert first.requires_grad and torch.equal(first, second)


# Teachers


def test_a_teacher_quantised_by_others_is_not_quantised_again(folder: Path):
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert_refused(
        lambda: TORCH.load_teacher(folder, 8),
        "quantize_bits = 8 asked, but it is already stored in 4 bits: set 0$",
    )


def test_pickled_weights_are_no_weights(folder: Path):
    """A pickle runs code."""
    torch.save(TORCH.load_teacher(folder).model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(lambda: TORCH.load_teacher(folder), "no weights to load in ")


def test_loading_is_silent_and_leaves_transformers_as_talkative_as_it_was(
    folder: Path, capfd: pytest.CaptureFixture
):
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    before = transformers.utils.logging.get_verbosity()
    assert_refused(
        lambda: TORCH.load_teacher(folder), ".*1 tensors are missing, model.norm.weight among them$"
    )
    assert transformers.utils.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


def test_gpt2_teaches_and_does_not_learn(tmp_path: Path):
    folder = saved_by_transformers(tmp_path, OWN["torch"]["gpt2, transformer"])
    assert TORCH.load_teacher(folder).head_matrix() is not None
    table = StudentTable(
        tuning="lora", lora_targets=["c_attn"]
    )  # its layers are Conv1D, transposed
    assert_refused(
        lambda: TORCH.load_student(folder, table),
        "lora_targets c_attn not found in its blocks; it has ",
    )


# Students


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_what_is_frozen_is_in_the_compute_dtype_and_what_trains_in_float32(
    folder: Path, tuning: str
):
    split = loading.load_student(folder, "m", StudentTable(tuning=tuning), 0, CPU, torch.bfloat16)
    dtypes = {
        trains: {p.dtype for p in split.model.parameters() if p.requires_grad == trains}
        for trains in (True, False)
    }
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert split.stored_dtype == torch.float32


@pytest.mark.parametrize("part", ["float32", "bfloat16"])
def test_adapters_compute_in_the_compute_dtype(part: str, folder: Path):
    """peft casts their inputs to the adapters' float32, a copy that each one keeps."""
    seen = set()

    def watch(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen.update({inputs[0].dtype, output.dtype})

    student = student_of(TORCH, folder, tuning="lora", compute_dtype=part)
    for module in adapted_modules(student.split.model).values():
        module.lora_A.default.register_forward_hook(watch)
    with student.precision():
        student.gather(TOKENS, np.array([0, 1]))
    assert seen == {getattr(torch, part)}


@pytest.mark.parametrize("tuning", ["full", "lora", "dora"])
@pytest.mark.parametrize("name", ["llama tied", "llama untied"])
def test_adapters_are_not_counted_and_a_tied_head_is_counted_once(
    tuning: str, name: str, tmp_path: Path
):
    path = family_folder(tmp_path, FAMILIES[name])
    split = TORCH.load_student(path, StudentTable(tuning=tuning))
    assert parameter_count(split.model) == sum(
        tensor.numel() for tensor in stored_weights(path).values()
    )


@pytest.mark.parametrize("part, rows", [("float32", 0.0), ("bfloat16", 1e-2)])
def test_an_untrained_dora_student_is_its_base_in_either_dtype(
    part: str, rows: float, tmp_path: Path
):
    """Its magnitudes are the norms of the weights, not a rounding of them."""
    path = family_folder(tmp_path, FAMILIES["qwen2"] | {"torch_dtype": part}, dtype=part)
    split = TORCH.load_student(path, StudentTable(tuning="dora"))
    fused = fused_weights(split, path)
    for key, tensor in stored_weights(path).items():
        assert relative_error(TORCH.numpy(fused[key]), TORCH.numpy(tensor)) < 1e-6, key


def test_a_mixed_folder_keeps_each_type(folder: Path, tmp_path: Path):
    """Norms in float32 among matrices in bfloat16, whatever config.json says: nothing is rounded on
    the way in.
    """
    tensors = stored_weights(folder)
    mixed = {
        key: tensor if tensor.ndim == 1 else tensor.bfloat16() for key, tensor in tensors.items()
    }
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, torch_dtype="bfloat16")
    split = TORCH.load_student(folder)
    for key, parameter in split.model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(
            parameter.detach(), mixed[key].float()
        ), key


# Gradient checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_block_is_computed_again_for_the_backward_pass(checkpointing: bool, folder: Path):
    split = TORCH.load_student(folder)
    if checkpointing:
        models.checkpoint_layers(split)
    seen = []
    for layer in split.layers:
        layer.mlp.register_forward_pre_hook(lambda *args: seen.append(0))
    hidden = TORCH.hidden(split)
    assert len(seen) == 2
    hidden.sum().backward()
    assert len(seen) == (4 if checkpointing else 2)


def test_checkpointed_generation_computes_a_token_once(folder: Path):
    """With its cache: a block sees the prompt, then a token at a time."""
    student = student_of(TORCH, folder, gradient_checkpointing=True)
    widths = []
    student.split.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[1])
    )
    texts(student, [TOKENS[0].tolist()], 4)
    assert widths == [8, 1, 1, 1]
