"""Models of mlx-lm split into trunk and head, quantised, adapted, exported: tiny ones, of every kind of head."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny import family_folder, llama_config, model_folder

from mlx_distill.backends import export
from mlx_distill.backends.mlx import model as models
from mlx_distill.backends.mlx.backend import MlxBackend, MlxStudent
from mlx_distill.backends.mlx.loss import CallableHead, MatrixHead, QuantizedHead
from mlx_distill.errors import ModelError
from mlx_distill.recipe import Recipe, StudentTable

ROWS = 96
TOKENS = np.array([[3, 14, 15, 92, 65, 35, 89, 79], [1, 2, 4, 8, 16, 32, 64, 5]], np.int32)


def decoder(family: str, **fields) -> dict:
    """A config that most families understand."""
    return llama_config(width=64, vocabulary=ROWS) | {"model_type": family, "layer_norm_eps": 1e-5} | fields


FAMILIES = {
    "llama tied": decoder("llama"),
    "llama untied": decoder("llama", tie_word_embeddings=False),
    "qwen2": decoder("qwen2"),
    "qwen3": decoder("qwen3", tie_word_embeddings=False),
    "phi3": decoder("phi3", rope_theta=1e4, tie_word_embeddings=False),
    "phi, biased head": decoder("phi", num_key_value_heads=4, partial_rotary_factor=0.5),
    "gemma2, capped": decoder("gemma2", final_logit_softcapping=3.0, query_pre_attn_scalar=16),
    "cohere, scaled": decoder("cohere", logit_scale=0.0625),
    "granite, divided": decoder(
        "granite", logits_scaling=8.0, attention_multiplier=0.25, embedding_multiplier=2.0, residual_multiplier=0.5,
        attention_bias=False, mlp_bias=False,
    ),
    "gpt2, wte": {"model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64,
                  "layer_norm_epsilon": 1e-5, "vocab_size": ROWS},
    "mamba, backbone.embeddings": {
        "model_type": "mamba", "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 128, "state_size": 8,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
    },
    "gemma3, language_model": {
        "model_type": "gemma3", "vocab_size": ROWS,
        "text_config": decoder("gemma3_text", sliding_window=16, sliding_window_pattern=2, query_pre_attn_scalar=16),
    },
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path: Path) -> Path:
    return family_folder(tmp_path / "model", FAMILIES[request.param])


def error(found: mx.array, expected: mx.array) -> float:
    """Largest difference relative to the largest expected number."""
    found, expected = np.array(found.astype(mx.float32)), np.array(expected.astype(mx.float32))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def hidden_states(split: models.SplitModel, rows: int = 5) -> mx.array:
    """Large ones, so that caps are felt."""
    width = split.hidden(mx.array(TOKENS)).shape[-1]
    return mx.array(np.random.default_rng(7).normal(0, 10, (rows, width)).astype(np.float32))


# The split


def test_head_of_hidden_is_the_model(family: Path):
    split = models.load_teacher(family, "m", 0)
    tokens = mx.array(TOKENS)
    assert error(split.head(split.hidden(tokens)), split.model(tokens)) < 1e-6
    assert split.hidden(tokens).shape[:2] == TOKENS.shape
    assert split.head_rows() == ROWS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama tied", "gemma2, capped", "granite, divided"])
def test_half_precision_splits_too(name: str, dtype: str, tmp_path: Path):
    split = models.load_teacher(family_folder(tmp_path, FAMILIES[name], dtype=dtype), "m", 0)
    tokens = mx.array(TOKENS)
    assert split.model(tokens).dtype == getattr(mx, dtype)
    assert error(split.head(split.hidden(tokens)), split.model(tokens)) < 1e-2
    head, hidden = split.loss_head(), hidden_states(split)
    assert isinstance(head, MatrixHead) and head.weight.dtype == getattr(mx, dtype)
    assert error(head.logits(hidden, 0, ROWS), split.head(hidden)) < 1e-5


@pytest.mark.parametrize("bits", [0, 4, 6, 8])
def test_loss_head_is_the_head_block_by_block(family: Path, bits: int):
    split = models.load_teacher(family, "m", bits)
    head, hidden = split.loss_head(), hidden_states(split)
    blocks = [head.logits(hidden, start, stop) for start, stop in ((0, 1), (1, 40), (40, ROWS))]
    assert all(block.dtype == mx.float32 for block in blocks)
    assert error(mx.concatenate(blocks, axis=1), split.head(hidden)) < 1e-5
    assert isinstance(head, QuantizedHead if bits else MatrixHead)  # a callable head would be copied whole to float32


def test_only_a_plain_matrix_is_a_head_matrix(family: Path):
    split = models.load_teacher(family, "m", 0)
    named = dict(tree_flatten(split.model.parameters()))
    finished = {"gemma2", "cohere", "granite", "phi"}
    if json.loads((family / "config.json").read_text())["model_type"] in finished:
        assert split.head_matrix() is None
    else:
        assert split.head_matrix() is named[split.head_path]
    assert models.load_teacher(family, "m", 8).head_matrix() is None


def test_a_small_cap_is_seen_through_small_weights(tmp_path: Path):
    """Gemma's cap of 30 bends logits near 0 by less than any tolerance: the probe must be large."""
    folder = family_folder(tmp_path, decoder("gemma2", final_logit_softcapping=30.0))
    model, _ = mlx_lm.utils.load_model(folder)
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 1e-3
    split = models.SplitModel(model, "m")
    assert split.head_matrix() is None and split.loss_head().finish is not None


def test_head_matrix_is_probed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split = models.load_teacher(family_folder(tmp_path, FAMILIES["llama untied"]), "m", 0)
    first = split.head_matrix()
    monkeypatch.setattr(models.SplitModel, "_equals_head", lambda *args: pytest.fail("the loss asks at every batch"))
    assert split.head_matrix() is first
    split.model.update(models.cast(split.model.parameters(), mx.bfloat16))
    assert split.head_matrix().dtype == mx.bfloat16  # and yet it is the matrix of now


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
        return super().__call__(inputs, cache) + 10 * self.model.embed_tokens(inputs).sum(axis=-1, keepdims=True)


class AddsByToken(Stub):
    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache) + 50 * mx.arange(ROWS)


@pytest.mark.parametrize("stub", [AddsInputs, EmbedsInputs])
def test_a_head_that_needs_more_than_hidden_states_is_refused(stub: type):
    with pytest.raises(ModelError, match=r"^odd: head\(hidden\(x\)\) .* model\(x\), so this family .* cannot be distilled here") as caught:
        models.SplitModel(stub(), "odd")
    assert "\n" not in str(caught.value)


def test_a_head_that_is_not_blockwise_is_called_whole():
    split = models.SplitModel(AddsByToken(), "m")
    head, hidden = split.loss_head(), hidden_states(split)
    assert isinstance(head, CallableHead) and split.head_matrix() is None
    assert error(head.logits(hidden, 10, 30), split.head(hidden)[:, 10:30]) < 1e-6


def test_a_model_without_a_trunk_is_refused():
    with pytest.raises(ModelError, match=r"^odd: no trunk \(model, transformer or backbone\) in mlx.nn"):
        models.SplitModel(nn.Linear(2, 2), "odd")


# Teachers


def test_quantised_on_load(tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["qwen3"])
    exact = models.load_teacher(folder, "m", 0)
    logits = exact.model(mx.array(TOKENS))
    errors = []
    for bits in (8, 6, 4):
        split = models.load_teacher(folder, "m", bits)
        assert split.trunk.layers[0].mlp.up_proj.bits == bits == split.model.lm_head.bits
        assert not tree_flatten(split.model.trainable_parameters())
        assert models.parameter_count(split.model) == pytest.approx(models.parameter_count(exact.model), rel=0.01)
        errors.append(error(split.model(mx.array(TOKENS)), logits))
    assert 0 < errors[0] < errors[1] < errors[2] < 0.7


def test_quantising_twice_and_quantising_the_narrow_are_refused(tmp_path: Path):
    folder = family_folder(tmp_path / "wide", FAMILIES["llama tied"])
    model, config = mlx_lm.utils.load_model(folder)
    model, config = mlx_lm.utils.quantize_model(model, config, 64, 8)
    mlx_lm.utils.save_model(tmp_path / "stored", model)
    mlx_lm.utils.save_config(config, tmp_path / "stored" / "config.json")
    assert isinstance(models.load_teacher(tmp_path / "stored", "m", 0).loss_head(), QuantizedHead)
    with pytest.raises(ModelError, match=r"^m: quantize_bits = 4 asked, but it is already stored in 8 bits: set 0"):
        models.load_teacher(tmp_path / "stored", "m", 4)
    with pytest.raises(ModelError, match=r"^m: a student must not be quantised"):
        models.load_student(tmp_path / "stored", "m", StudentTable(), 0)
    narrow = family_folder(tmp_path / "narrow", llama_config(width=32) | {"intermediate_size": 32})
    with pytest.raises(ModelError, match=r"^m: no layer is as wide as a multiple of 64.*: set quantize_bits = 0"):
        models.load_teacher(narrow, "m", 4)


def test_unloadable_folders_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(decoder("llama")))
    with pytest.raises(ModelError, match=r"^m: no weights to load in .*model\*.safetensors"):
        models.load_teacher(tmp_path, "m", 0)
    (tmp_path / "config.json").write_text(json.dumps(decoder("no_such_family")))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(2)})
    with pytest.raises(ModelError, match=r"^m: mlx-lm cannot load .*no_such_family not supported"):
        models.load_teacher(tmp_path, "m", 0)


# Students


def recipe(**student) -> Recipe:
    return Recipe.model_validate({"student": {"model": "m", **student}, "data": {"source": "rows.jsonl"}})


def load_student(folder: Path, **student) -> MlxStudent:
    return MlxBackend().load_student(folder, "m", recipe(**student))


def stored(folder: Path) -> dict[str, mx.array]:
    return {key: array for file in sorted(folder.glob("model*.safetensors")) for key, array in mx.load(str(file)).items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tuning", ["full", "lora", "dora"])
def test_an_untrained_student_is_its_base(family: str, tuning: str, tmp_path: Path, bytes_tokenizer):
    """Bit for bit but for DoRA, whose magnitudes are divided by their own norms."""
    base = model_folder(tmp_path / "base", bytes_tokenizer(), family=family, tied=family != "qwen3")
    load_student(base, tuning=tuning).export(tmp_path / "out", [1])
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype
        assert error(after[key], array) <= (1e-6 if tuning == "dora" else 0), key


def test_a_capped_student_is_refused(tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["gemma2, capped"])
    with pytest.raises(ModelError, match=r"^m: a student's head must be one plain matrix, .* choose a Llama or Qwen"):
        models.load_student(folder, "m", StudentTable(), 0)


def test_a_rewritten_student_is_refused(tmp_path: Path):
    """mlx-lm stacks the experts of qwen3_moe."""
    config = decoder(
        "qwen3_moe", num_experts=2, num_experts_per_tok=1, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    folder = family_folder(tmp_path, config)
    weights = {}
    for key, array in stored(folder).items():
        if ".switch_mlp." not in key:
            weights[key] = array
            continue
        for expert, part in enumerate(array):
            weights[key.replace("switch_mlp", f"experts.{expert}")] = part
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    models.load_teacher(folder, "m", 0)
    with pytest.raises(ModelError, match=r"^m: tensor model.layers.0.mlp.experts.0.down_proj.weight is renamed by mlx-lm on load.*choose"):
        models.load_student(folder, "m", StudentTable(), 0)


def test_a_head_that_mlx_lm_would_drop_is_refused(tmp_path: Path):
    """Without `tie_word_embeddings` mlx-lm ties a llama, transformers does not."""
    folder = family_folder(tmp_path, FAMILIES["llama untied"])
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^m: tensor lm_head.weight is changed by mlx-lm on load"):
        models.load_student(folder, "m", StudentTable(), 0)
    weights = stored(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    models.load_student(folder, "m", StudentTable(), 0)  # a tied head stored twice is no obstacle


def test_full_students_train_in_float32_whatever_is_stored(tmp_path: Path):
    split = models.load_student(family_folder(tmp_path, FAMILIES["qwen3"], dtype="bfloat16"), "m", StudentTable(), 0)
    assert {array.dtype for _, array in tree_flatten(split.model.trainable_parameters())} == {mx.float32}
    assert split.stored_dtype == mx.bfloat16


# LoRA and DoRA


def adapters(split: models.SplitModel) -> dict[str, np.ndarray]:
    return {key: np.array(array) for key, array in tree_flatten(split.model.trainable_parameters())}


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_initial_matrices_are_a_function_of_seed_and_layer(tuning: str, tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["llama tied"])
    table = StudentTable(tuning=tuning, rank=4)
    mx.random.seed(1)
    first = adapters(models.load_student(folder, "m", table, 5))
    mx.random.seed(2)
    again, other = adapters(models.load_student(folder, "m", table, 5)), adapters(models.load_student(folder, "m", table, 6))
    a = [key for key in first if key.endswith("lora_a")]
    assert len(a) == 2 * 7 and len({key.rpartition(".")[2] for key in first}) == (2 if tuning == "lora" else 3)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert all(not np.array_equal(first[key], other[key]) for key in a)
    by_shape = {}
    for key in a:
        bound = 1 / np.sqrt(first[key].shape[0])
        assert 0.8 * bound < np.abs(first[key]).max() <= bound and abs(first[key].mean()) < bound / 4
        by_shape.setdefault(first[key].shape, []).append(first[key].tobytes())
    assert all(len(set(drawn)) == len(drawn) for drawn in by_shape.values())  # no two layers alike
    assert all(not first[key].any() for key in first if key.endswith("lora_b"))


def test_layers_and_targets_are_honoured(tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["llama tied"])
    table = StudentTable(tuning="lora", lora_layers=1, lora_targets=("q_proj", "down_proj"), rank=2)
    names = {key.rpartition(".")[0] for key in adapters(models.load_student(folder, "m", table, 0))}
    assert names == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    wrong = StudentTable(tuning="lora", lora_targets=("q_proj", "c_attn"))
    with pytest.raises(ModelError, match=r"^m: lora_targets c_attn not found in its blocks; it has down_proj, gate_proj, k_proj, o_proj"):
        models.load_student(folder, "m", wrong, 0)


def perturb(student: MlxStudent, seed: int = 3) -> None:
    """As if it had trained: every trained array moves."""
    random = np.random.default_rng(seed)
    moved = [(key, array + 0.05 * random.normal(size=array.shape).astype(np.float32)) for key, array in tree_flatten(student.weights)]
    student.weights = models.tree_unflatten(moved)
    student.split.model.update(student.weights)


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


@pytest.mark.parametrize("tuning", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_weights_do_what_the_adapters_do(tuning: str, family: str, tmp_path: Path, bytes_tokenizer):
    base = model_folder(tmp_path / "base", bytes_tokenizer(), family=family)
    student = load_student(base, tuning=tuning, rank=4)
    plain = logits(student.split.model)
    perturb(student)
    before = {key: np.array(array) for key, array in tree_flatten(student.split.model.parameters())}
    fused, _ = mlx_lm.utils.load_model(base)
    fused.load_weights(list(models.fused_weights(student.split.model, student.base).items()))
    assert np.abs(logits(fused) - plain).max() > 0.1
    np.testing.assert_allclose(logits(fused), logits(student.split.model), atol=1e-4)
    after = dict(tree_flatten(student.split.model.parameters()))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_fused_in_float32_though_frozen_in_bfloat16(tuning: str, tmp_path: Path, bytes_tokenizer):
    """The base's float32 matrix plus adapters is their sum, not a rounding of it, though the student computes in bfloat16."""
    base = model_folder(tmp_path / "base", bytes_tokenizer())
    student = load_student(base, tuning=tuning, rank=4, compute_dtype="bfloat16", save_dtype="float32")
    perturb(student)
    student.export(tmp_path / "out", [1])
    module = student.split.layers[0].self_attn.q_proj
    weight = np.array(stored(base)["model.layers.0.self_attn.q_proj.weight"], np.float64)
    weight = weight + module.scale * (np.array(module.lora_a, np.float64) @ np.array(module.lora_b, np.float64)).T
    if tuning == "dora":
        weight *= (np.array(module.m, np.float64) / np.linalg.norm(weight, axis=1))[:, None]
    np.testing.assert_allclose(np.array(stored(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"]), weight, rtol=1e-5, atol=1e-6)


# Export


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("tuning, family, tied", [
    ("full", "llama", True), ("full", "llama", False), ("lora", "qwen3", False), ("dora", "qwen2", True),
])
def test_an_export_opens_everywhere(tuning: str, family: str, tied: bool, tmp_path: Path, bytes_tokenizer):
    tokenizer = bytes_tokenizer()
    base = model_folder(tmp_path / "base", tokenizer, family=family, tied=tied)
    student = load_student(base, tuning=tuning)
    perturb(student)
    student.export(tmp_path / "out", [1, 2])
    expected = logits(student.split.model)
    reloaded, reloaded_tokenizer = mlx_lm.load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(reloaded), expected, atol=1e-4)
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), expected, atol=1e-4)
    assert reloaded_tokenizer.encode("ab <think>") == tokenizer.encode("ab <think>")
    assert reloaded_tokenizer.eos_token_ids == {1, 2}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [1, 2]
    assert (tmp_path / "out" / "adapters").is_dir() == (tuning != "full")


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_an_adapted_export_keeps_the_base_as_it_is_stored(tuning: str, tmp_path: Path, bytes_tokenizer):
    """A student that computes in bfloat16 must not round the tensors it never trained."""
    base = model_folder(tmp_path / "base", bytes_tokenizer())
    load_student(base, tuning=tuning, compute_dtype="bfloat16", save_dtype="float32").export(tmp_path / "out", [1])
    stored, exported = (mx.load(str(folder / "model.safetensors")) for folder in (base, tmp_path / "out"))
    untouched = [key for key in stored if "_proj" not in key]
    assert len(untouched) > 4 and all(mx.array_equal(stored[key], exported[key]).item() for key in untouched)
    for key in stored.keys() - set(untouched):  # lora_b is zero: nothing changed yet, but for DoRA's division by a norm
        np.testing.assert_allclose(np.array(exported[key]), np.array(stored[key]), atol=1e-2 if tuning == "dora" else 0)


def test_more_adapted_blocks_than_there_are_is_refused(tmp_path: Path, bytes_tokenizer):
    base = model_folder(tmp_path / "base", bytes_tokenizer())
    with pytest.raises(ModelError, match="lora_layers = 9 asked, but it has 2 blocks"):
        load_student(base, tuning="lora", lora_layers=9)


def test_export_keeps_a_generation_config_and_needs_none(tmp_path: Path, bytes_tokenizer):
    base = model_folder(tmp_path / "base", bytes_tokenizer())
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "temperature": 0.6}))
    load_student(base).export(tmp_path / "out", [4])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [4], "temperature": 0.6}


@pytest.mark.parametrize("base_dtype, save_dtype, expected", [
    ("float32", "base", "float32"), ("bfloat16", "base", "bfloat16"), ("float32", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32"),
])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_save_dtype_is_honoured(tuning: str, base_dtype: str, save_dtype: str, expected: str, tmp_path: Path):
    base = family_folder(tmp_path / "base", FAMILIES["llama tied"], dtype=base_dtype)
    student = load_student(base, tuning=tuning, save_dtype=save_dtype)
    student.export(tmp_path / "out", [1])
    weights = stored(tmp_path / "out")
    assert {array.dtype for array in weights.values()} == {getattr(mx, expected)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == expected and "torch_dtype" not in config
    written = sum(file.stat().st_size for file in tmp_path.glob("out/**/*.safetensors"))
    assert 0.9 * written < student.export_bytes() + 4096 and student.export_bytes() < 1.1 * written


def test_sharded_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_tokenizer):
    base = model_folder(tmp_path / "base", bytes_tokenizer())
    monkeypatch.setattr(export, "SHARD_BYTES", 2**15)
    load_student(base).export(tmp_path / "out", [1])
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(base)) and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored(base).values())
    expected = logits(mlx_lm.utils.load_model(base)[0])
    np.testing.assert_array_equal(logits(mlx_lm.load(str(tmp_path / "out"))[0]), expected)
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), expected, atol=1e-4)


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_kept_adapters_are_mlx_lms(tuning: str, tmp_path: Path, bytes_tokenizer):
    base = model_folder(tmp_path / "base", bytes_tokenizer())
    student = load_student(base, tuning=tuning, lora_layers=1, lora_targets=["q_proj", "up_proj"], rank=4, alpha=6.0)
    perturb(student)
    student.export(tmp_path / "out", [1])
    adapted, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "out" / "adapters"))
    fused, _ = mlx_lm.load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(adapted), logits(fused), atol=1e-4)
    assert np.abs(logits(fused) - logits(mlx_lm.load(str(base))[0])).max() > 0.01
    names = {path for path, module in adapted.named_modules() if "lora_a" in module}
    assert names == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}  # none that was never trained


# Gradient checkpointing


def test_checkpointing_changes_no_other_model(tmp_path: Path):
    folder = family_folder(tmp_path, FAMILIES["llama tied"])
    teacher, student = models.load_teacher(folder, "t", 0), models.load_student(folder, "s", StudentTable(), 0)
    plain = teacher.model(mx.array(TOKENS))
    call = llama.TransformerBlock.__call__
    models.checkpoint_layers(student)
    assert {type(layer) for layer in teacher.layers} == {llama.TransformerBlock} and llama.TransformerBlock.__call__ is call
    assert {type(layer).__name__ for layer in student.layers} == {"CheckpointedTransformerBlock"}
    assert all(isinstance(layer, llama.TransformerBlock) for layer in student.layers)
    assert mx.array_equal(student.model(mx.array(TOKENS)), plain) and mx.array_equal(teacher.model(mx.array(TOKENS)), plain)
