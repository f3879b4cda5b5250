"""Models split into trunk and head, adapted and refused, the same way in both frameworks: tiny
ones, of every kind of head.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS, TOKENS, Framework, Split, dtype_name, relative_error, student_of
from safetensors.numpy import load_file, save_file
from tiny import family_folder, llama_config, texts
from transformers import AutoConfig, AutoModelForCausalLM

from mlx_distill.errors import ModelError
from mlx_distill.recipe.tables import StudentTable

ROWS = 96


def decoder(family: str, **fields) -> dict:
    """A config that most families understand."""
    return (
        llama_config(width=64, vocabulary=ROWS)
        | {"model_type": family, "layer_norm_eps": 1e-5, "pad_token_id": 0}
        | fields
    )


FAMILIES = {
    "llama tied": decoder("llama"),
    "llama untied": decoder("llama", tie_word_embeddings=False),
    "qwen2": decoder("qwen2"),
    "qwen3": decoder("qwen3", tie_word_embeddings=False),
    "phi3": decoder("phi3", rope_theta=1e4, tie_word_embeddings=False),
    "phi, biased head": decoder(
        "phi",
        num_key_value_heads=4,
        partial_rotary_factor=0.5,
        hidden_act="gelu_new",
        tie_word_embeddings=False,
    ),
    "gemma2, capped": decoder(
        "gemma2",
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=16,
        sliding_window=4096,
    ),
    "cohere, scaled": decoder("cohere", logit_scale=0.0625),
    "granite, divided": decoder(
        "granite",
        logits_scaling=8.0,
        attention_multiplier=0.25,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_bias=False,
        mlp_bias=False,
    ),
}
FINISHED = {"phi", "gemma2", "cohere", "granite"}  # something comes after the matrix
OWN = {  # families whose folders the two libraries write differently
    "mlx": {
        "gpt2, wte": {
            "model_type": "gpt2",
            "n_ctx": 64,
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-5,
            "vocab_size": ROWS,
        },
        "mamba, backbone.embeddings": {
            "model_type": "mamba",
            "vocab_size": ROWS,
            "hidden_size": 64,
            "intermediate_size": 128,
            "state_size": 8,
            "num_hidden_layers": 2,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_rank": 4,
        },
        "gemma3, language_model": {
            "model_type": "gemma3",
            "vocab_size": ROWS,
            "text_config": decoder(
                "gemma3_text", sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=16
            ),
        },
    },
    "torch": {
        "gpt2, transformer": {
            "model_type": "gpt2",
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 64,
            "vocab_size": ROWS,
        },
        "mamba, backbone": {
            "model_type": "mamba",
            "vocab_size": ROWS,
            "hidden_size": 64,
            "intermediate_size": 128,
            "state_size": 8,
            "num_hidden_layers": 2,
            "conv_kernel": 4,
            "time_step_rank": 4,
        },
        "qwen3_moe": decoder(
            "qwen3_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64
        ),
        "gpt_neox, embed_out": {
            "model_type": "gpt_neox",
            "vocab_size": ROWS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "tie_word_embeddings": False,
        },
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family that both read, to be read only."""
    root = tmp_path_factory.mktemp("families")
    return {
        name: family_folder(root / str(number), config)
        for number, (name, config) in enumerate(FAMILIES.items())
    }


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


MEMBERS = [(framework, name) for framework, own in OWN.items() for name in (*FAMILIES, *own)]


@pytest.fixture(params=MEMBERS, ids=": ".join)
def member(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path
) -> tuple[Framework, Path]:
    """A framework and the folder of a family that it reads."""
    name, family = request.param
    if family in FAMILIES:
        return FRAMEWORKS[name], folders[family]
    return FRAMEWORKS[name], {"mlx": family_folder, "torch": saved_by_transformers}[name](
        tmp_path, OWN[name][family]
    )


def saved_by_transformers(folder: Path, config: dict) -> Path:
    torch.manual_seed(0)
    described = AutoConfig.for_model(**config)
    AutoModelForCausalLM.from_config(described).save_pretrained(folder)
    return folder


def large_hidden(framework: Framework, split: Split, rows: int = 5):
    """Hidden states so large that caps are felt."""
    width = framework.hidden(split).shape[-1]
    return framework.array(np.random.default_rng(7).normal(0, 10, (rows, width)).astype(np.float32))


# The split


def test_head_of_hidden_is_the_model(member: tuple[Framework, Path]):
    framework, family = member
    split = framework.load_teacher(family)
    hidden = framework.hidden(split)
    assert relative_error(framework.numpy(split.head(hidden)), framework.logits(split)) < 1e-6
    assert hidden.shape[:2] == TOKENS.shape
    assert split.head_rows() == ROWS


def test_both_libraries_read_the_same_model(family: Path):
    by_mlx_lm, by_transformers = (
        framework.logits(framework.load_teacher(family)) for framework in FRAMEWORKS.values()
    )
    assert relative_error(by_transformers, by_mlx_lm) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama tied", "gemma2, capped", "granite, divided"])
def test_half_precision_splits_too(framework: Framework, name: str, dtype: str, tmp_path: Path):
    split = framework.load_teacher(
        family_folder(tmp_path, FAMILIES[name] | {"torch_dtype": dtype}, dtype=dtype)
    )
    hidden = framework.hidden(split)
    assert dtype_name(hidden) == dtype
    assert relative_error(framework.numpy(split.head(hidden)), framework.logits(split)) < 1e-2
    head, large = split.loss_head(), large_hidden(framework, split)
    assert isinstance(head, framework.heads.MatrixHead) and dtype_name(head.weight) == dtype
    whole = framework.load_teacher(family_folder(tmp_path / "rounded", FAMILIES[name], dtype=dtype))
    framework.set_dtype(whole, "float32")  # the rounded matrix, and logits that are not rounded
    expected = framework.numpy(whole.head(large))
    assert (
        relative_error(framework.numpy(framework.loss_logits(head, large, ROWS)), expected) < 1e-5
    )


def test_loss_head_is_the_head(member: tuple[Framework, Path]):
    framework, family = member
    split = framework.load_teacher(family)
    head, hidden = split.loss_head(), large_hidden(framework, split)
    found = framework.loss_logits(head, hidden, ROWS)
    assert dtype_name(found) == "float32"
    assert relative_error(framework.numpy(found), framework.numpy(split.head(hidden))) < 1e-5
    assert isinstance(
        head, framework.heads.MatrixHead
    )  # a callable head would be copied whole to float32


def test_only_a_plain_matrix_is_a_head_matrix(member: tuple[Framework, Path]):
    framework, family = member
    split = framework.load_teacher(family)
    if json.loads((family / "config.json").read_text())["model_type"] in FINISHED:
        assert split.head_matrix() is None
    else:
        assert split.head_matrix() is framework.parameters(split)[split.head_path]


def test_a_small_cap_is_seen_through_small_weights(framework: Framework, tmp_path: Path):
    """Gemma's cap of 30 bends logits near 0 by less than any tolerance: the probe must be large."""
    folder = family_folder(tmp_path, FAMILIES["gemma2, capped"] | {"final_logit_softcapping": 30.0})
    edit(folder, lambda tensors: tensors["model.embed_tokens.weight"].__imul__(1e-3))
    split = framework.load_teacher(folder)
    assert split.head_matrix() is None and split.loss_head().finish is not None


def test_head_matrix_is_probed_once(
    framework: Framework, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    split = framework.load_teacher(folders["llama untied"])
    first = split.head_matrix()
    monkeypatch.setattr(
        framework.models.SplitModel,
        "_equals_head",
        lambda *args: pytest.fail("the loss asks at every batch"),
    )
    assert split.head_matrix() is first
    framework.set_dtype(split, "bfloat16")
    assert dtype_name(split.head_matrix()) == "bfloat16"  # and yet it is the matrix of now


# Refusals: one wording

NO_TRUNK = r"no trunk \(model, transformer or backbone\) in {}.*; please report it$"
NOT_SPLIT = (
    r"head\(hidden\(x\)\) (differs from|fails \(.*\) instead of giving) model\(x\), so this family \(.*\) cannot be distilled here yet; "
    r"please report it with the model's name$"
)


def edit(folder: Path, change) -> None:
    """Change the stored tensors of a folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def unknown_family(folder: Path) -> None:
    configure(folder, model_type="no_such_family")


NORM = "model.layers.1.input_layernorm.weight"


def without_a_tensor(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(NORM))


def with_a_tensor_more(folder: Path) -> None:
    edit(
        folder,
        lambda tensors: tensors.update(
            {"model.layers.1.self_attn.q_proj.bias": np.ones(64, np.float32)}
        ),
    )


def with_a_tensor_cut(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({NORM: tensors[NORM][:32].copy()}))


UNLOADABLE = [
    (
        no_weights,
        r"no weights to load in {folder} \(.*\); a model folder holds config\.json and model\*\.safetensors",
    ),
    (unknown_family, r"{library} cannot load {folder}: .*no_such_family"),
    (
        without_a_tensor,
        r"{library} cannot load {folder}: .*model\.layers\.1\.input_layernorm\.weight",
    ),
    (
        with_a_tensor_more,
        r"{library} cannot load {folder}: .*model\.layers\.1\.self_attn\.q_proj\.bias",
    ),
    (
        with_a_tensor_cut,
        r"{library} cannot load {folder}: .*model\.layers\.1\.input_layernorm\.weight",
    ),
]


def assert_refused(call, expected: str) -> None:
    """In one line, which names the model first."""
    with pytest.raises(ModelError, match=f"^m: {expected}") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil, expected", UNLOADABLE, ids=lambda value: getattr(value, "__name__", "")
)
@pytest.mark.parametrize("part", ["teacher", "student"])
def test_unloadable_folders_are_refused_in_one_line(
    framework: Framework, spoil, expected: str, part: str, tmp_path: Path
):
    """Whatever is missing is never drawn at random, whatever is too much is never dropped."""
    folder = family_folder(tmp_path / "model", FAMILIES["llama tied"])
    spoil(folder)
    load = framework.load_teacher if part == "teacher" else framework.load_student
    assert_refused(lambda: load(folder), expected.format(library=framework.library, folder=folder))


@pytest.mark.parametrize(
    "name", ["phi, biased head", "gemma2, capped", "cohere, scaled", "granite, divided"]
)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_finished_student_is_refused(
    framework: Framework, name: str, tuning: str, folders: dict[str, Path]
):
    table = StudentTable(tuning=tuning, lora_targets=["q_proj"])
    expected = (
        "a student's head must be one plain matrix, this family scales, caps or biases it; "
        "choose a Llama or Qwen$"
    )
    assert_refused(lambda: framework.load_student(folders[name], table), expected)


def test_quantising_twice_and_training_the_quantised_are_refused(
    framework: Framework, folders: dict[str, Path], tmp_path: Path
):
    model, config = mlx_lm.utils.load_model(folders["llama tied"])
    model, config = mlx_lm.utils.quantize_model(model, config, 64, 8)
    mlx_lm.utils.save_model(tmp_path, model)
    mlx_lm.utils.save_config(config, tmp_path / "config.json")
    expected = "quantize_bits = 4 asked, but it is already stored in 8 bits: set 0$"
    assert_refused(lambda: framework.load_teacher(tmp_path, 4), expected)
    expected = "its weights are quantised, so they cannot train: .* or name the original$"
    assert_refused(lambda: framework.load_student(tmp_path), expected)


def experts_apart(folder: Path) -> Path:
    """A qwen3_moe as it is published, an expert a tensor; both libraries stack them."""
    config = decoder(
        "qwen3_moe",
        num_experts=2,
        num_experts_per_tok=1,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    stacked = load_file(family_folder(folder, config) / "model.safetensors")
    tensors = {key: array for key, array in stacked.items() if ".switch_mlp." not in key}
    for key in stacked.keys() - tensors.keys():
        tensors |= {
            key.replace("switch_mlp", f"experts.{number}"): part
            for number, part in enumerate(stacked[key])
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_rewritten_student_is_refused(framework: Framework, tmp_path: Path):
    folder = experts_apart(tmp_path)
    framework.load_teacher(folder)
    assert_refused(
        lambda: framework.load_student(folder),
        rf"tensor model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight is renamed by {framework.library} on load, "
        r"so a student of this family would not open in transformers; choose a Llama, Qwen2 or Qwen3 student$",
    )


def test_a_head_that_would_be_dropped_is_refused(framework: Framework, tmp_path: Path):
    """The config ties the head, the file holds another one."""
    folder = family_folder(tmp_path, FAMILIES["llama untied"])
    configure(folder, tie_word_embeddings=True)
    expected = rf"tensor lm_head\.weight is changed by {framework.library} on load, so a student of this family would not open in"
    assert_refused(lambda: framework.load_student(folder), expected)
    edit(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    framework.load_student(folder)  # a tied head stored twice is no obstacle
    framework.load_teacher(folder)


def test_adapters_for_blocks_and_layers_that_are_not_there_are_refused(
    framework: Framework, folders: dict[str, Path]
):
    folder = folders["llama tied"]
    wrong = StudentTable(tuning="lora", lora_targets=("q_proj", "c_attn"))
    expected = (
        "lora_targets c_attn not found in its blocks; it has down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj$"
    )
    assert_refused(lambda: framework.load_student(folder, wrong), expected)
    expected = "lora_layers = 9 asked, but it has 2 blocks; 0 adapts all$"
    assert_refused(
        lambda: framework.load_student(folder, StudentTable(tuning="lora", lora_layers=9)), expected
    )


# Students


def test_full_students_train_in_float32_whatever_is_stored(framework: Framework, tmp_path: Path):
    split = framework.load_student(family_folder(tmp_path, FAMILIES["qwen3"], dtype="bfloat16"))
    trained = framework.parameters(split, trained=True)
    assert trained.keys() == set(mx.load(str(tmp_path / "model.safetensors")))
    assert {dtype_name(array) for array in trained.values()} == {"float32"}
    assert str(split.stored_dtype).endswith("bfloat16")


def test_teachers_do_not_train(framework: Framework, family: Path):
    assert not framework.parameters(framework.load_teacher(family), trained=True)


def adapters(framework: Framework, split: Split) -> dict[str, np.ndarray]:
    return {
        key: framework.numpy(array)
        for key, array in framework.parameters(split, trained=True).items()
    }


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_initial_matrices_are_a_function_of_seed_and_layer(
    framework: Framework, tuning: str, folders: dict[str, Path]
):
    table = StudentTable(tuning=tuning, rank=4)
    framework.seed(1)
    first = adapters(framework, framework.load_student(folders["llama tied"], table, 5))
    framework.seed(2)
    again, other = (
        adapters(framework, framework.load_student(folders["llama tied"], table, seed))
        for seed in (5, 6)
    )
    a = [key for key in first if key.endswith("lora_a")]
    assert len(a) == 2 * 7 and len({key.rpartition(".")[2] for key in first}) == (
        2 if tuning == "lora" else 3
    )
    assert {array.dtype for array in first.values()} == {np.dtype(np.float32)}
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert all(not np.array_equal(first[key], other[key]) for key in a)
    by_shape: dict[tuple[int, ...], list[bytes]] = {}
    for key in a:
        bound = 1 / np.sqrt(first[key].shape[0])
        assert (
            0.8 * bound < np.abs(first[key]).max() <= bound and abs(first[key].mean()) < bound / 4
        )
        by_shape.setdefault(first[key].shape, []).append(first[key].tobytes())
    assert all(len(set(drawn)) == len(drawn) for drawn in by_shape.values())  # no two layers alike
    assert all(not first[key].any() for key in first if key.endswith("lora_b"))


@pytest.mark.parametrize("tuning", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_frameworks_start_from_the_same_matrices(tuning: str, dtype: str, tmp_path: Path):
    """By the same names, in the same shapes, bit for bit; DoRA's magnitudes are norms, which each
    sums in its own order.
    """
    folder = family_folder(tmp_path, FAMILIES["qwen2"], dtype=dtype)
    table = StudentTable(tuning=tuning, rank=4, lora_layers=1, lora_targets=("q_proj", "down_proj"))
    one, other = (
        adapters(framework, framework.load_student(folder, table, 3))
        for framework in FRAMEWORKS.values()
    )
    assert one.keys() == other.keys() and len(one) == (4 if tuning == "lora" else 6)
    for key, array in one.items():
        assert array.shape == other[key].shape
        np.testing.assert_allclose(
            other[key], array, rtol=1e-6 if key.endswith(".m") else 0, atol=0, err_msg=key
        )


def test_layers_and_targets_are_honoured(framework: Framework, folders: dict[str, Path]):
    table = StudentTable(tuning="lora", lora_layers=1, lora_targets=("q_proj", "down_proj"), rank=2)
    names = {
        key.rpartition(".")[0]
        for key in adapters(framework, framework.load_student(folders["llama tied"], table))
    }
    assert names == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}


# Gradient checkpointing


def test_checkpointing_changes_no_other_model(framework: Framework, folders: dict[str, Path]):
    folder = folders["llama tied"]
    teacher, student = framework.load_teacher(folder), framework.load_student(folder)
    plain, kind = framework.logits(teacher), type(teacher.layers[0])
    call = kind.__call__
    framework.models.checkpoint_layers(student)
    assert {type(layer) for layer in teacher.layers} == {kind} and kind.__call__ is call
    assert all(isinstance(layer, kind) for layer in student.layers)
    assert not any("forward" in vars(layer) for layer in teacher.layers)
    assert np.array_equal(framework.logits(student), plain) and np.array_equal(
        framework.logits(teacher), plain
    )


def test_a_checkpointed_student_generates_the_same(framework: Framework, folders: dict[str, Path]):
    plain, frugal = (
        student_of(framework, folders["qwen3"], gradient_checkpointing=on) for on in (False, True)
    )
    prompts = [[1, 2, 3], [5], [9, 8, 7, 6]]
    first, second = (texts(model, prompts, 8, batch_size=2) for model in (plain, frugal))
    assert first == second and len(set(map(tuple, first))) > 1
