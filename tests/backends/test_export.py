"""Students written out, by either backend: the folder opens in mlx-lm and in transformers, its
adapters in mlx-lm and in peft.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from frameworks import TOKENS, Framework, dtype_name, perturb, relative_error, state_of, student_of
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from tiny import family_folder, llama_config, model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlx_distill.backends import export
from mlx_distill.errors import ModelError


def stored(folder: Path) -> dict[str, mx.array]:
    """MLX's arrays: they have bfloat16."""
    return {
        key: array
        for file in sorted(folder.glob("*.safetensors"))
        for key, array in mx.load(str(file)).items()
    }


def wide(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def mlx_lm_logits(folder: Path, adapters: Path | None = None) -> np.ndarray:
    model, *_ = mlx_lm.load(str(folder), adapter_path=adapters and str(adapters))
    return wide(model(mx.array(TOKENS)))


def transformers_logits(folder: Path, adapters: Path | None = None) -> np.ndarray:
    """By transformers alone, or with adapters by peft; every tensor of the folder has its place."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    model = PeftModel.from_pretrained(model, adapters) if adapters else model
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.fixture
def base(tmp_path: Path, bytes_tokenizer) -> Path:
    """A tied llama with a tokenizer."""
    return model_folder(tmp_path / "base", bytes_tokenizer())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tuning", ["full", "lora", "dora"])
def test_an_untrained_student_is_its_base(
    framework: Framework, family: str, tuning: str, tmp_path: Path, bytes_tokenizer
):
    """Bit for bit but for DoRA, whose magnitudes are divided by their own norms."""
    base = model_folder(tmp_path / "base", bytes_tokenizer(), family=family, tied=family != "qwen3")
    student_of(framework, base, tuning=tuning).export(tmp_path / "out", [1])
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert after[key].dtype == array.dtype
        assert relative_error(wide(after[key]), wide(array)) <= (1e-6 if tuning == "dora" else 0), (
            key
        )


@pytest.mark.parametrize(
    "tuning, family, tied",
    [
        ("full", "llama", True),
        ("full", "llama", False),
        ("lora", "qwen3", False),
        ("dora", "qwen2", True),
    ],
)
def test_an_export_opens_everywhere(
    framework: Framework, tuning: str, family: str, tied: bool, tmp_path: Path, bytes_tokenizer
):
    tokenizer = bytes_tokenizer()
    base = model_folder(tmp_path / "base", tokenizer, family=family, tied=tied)
    student = student_of(framework, base, tuning=tuning)
    perturb(student)
    student.export(tmp_path / "out", [1, 2])
    expected = framework.logits(student.split)
    np.testing.assert_allclose(mlx_lm_logits(tmp_path / "out"), expected, atol=1e-4)
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), expected, atol=1e-4)
    _, reloaded = mlx_lm.load(str(tmp_path / "out"))
    assert reloaded.encode("ab <think>") == tokenizer.encode("ab <think>")
    assert reloaded.eos_token_ids == {1, 2}
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [1, 2]
    for name in ("adapters", "adapters-peft"):
        assert (tmp_path / "out" / name).is_dir() == (tuning != "full")


def everything(framework: Framework, student) -> dict[str, np.ndarray]:
    """All arrays of the model as it lies in memory, and of its checkpoint."""
    with state_of(student) as folder:
        kept = load_file(folder / "weights.safetensors")
    return kept | {
        f"live {key}": framework.numpy(array).copy()
        for key, array in framework.parameters(student.split).items()
    }


@pytest.mark.parametrize("tuning", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_weights_do_what_the_adapters_do(
    framework: Framework, tuning: str, family: str, tmp_path: Path, bytes_tokenizer
):
    """And the student keeps its adapters: what is exported is a copy."""
    base = model_folder(tmp_path / "base", bytes_tokenizer(), family=family)
    student = student_of(framework, base, tuning=tuning, rank=4)
    plain = framework.logits(student.split)
    perturb(student)
    before = everything(framework, student)
    student.export(tmp_path / "out", [1])
    fused = mlx_lm_logits(tmp_path / "out")
    assert np.abs(fused - plain).max() > 0.1
    np.testing.assert_allclose(fused, framework.logits(student.split), atol=1e-4)
    after = everything(framework, student)
    assert before.keys() == after.keys() and all(
        np.array_equal(before[key], after[key]) for key in before
    )


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_fused_in_float32_though_frozen_in_bfloat16(
    framework: Framework, tuning: str, base: Path, tmp_path: Path
):
    """The base's float32 matrix plus adapters is their sum, not a rounding of it, though the
    student computes in bfloat16.
    """
    student = student_of(
        framework,
        base,
        tuning=tuning,
        rank=4,
        alpha=6.0,
        compute_dtype="bfloat16",
        save_dtype="float32",
    )
    perturb(student)
    student.export(tmp_path / "out", [1])
    path = "model.layers.0.self_attn.q_proj"
    parts = load_file(tmp_path / "out" / "adapters" / "adapters.safetensors")
    a, b = (parts[f"{path}.{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
    weight = wide(stored(base)[f"{path}.weight"]).astype(np.float64) + 6 / 4 * (a @ b).T
    if tuning == "dora":
        weight *= (parts[f"{path}.m"].astype(np.float64) / np.linalg.norm(weight, axis=1))[:, None]
    np.testing.assert_allclose(
        wide(stored(tmp_path / "out")[f"{path}.weight"]), weight, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_an_adapted_export_keeps_the_base_as_it_is_stored(
    framework: Framework, tuning: str, base: Path, tmp_path: Path
):
    """A student that computes in bfloat16 must not round the tensors it never trained."""
    student_of(
        framework, base, tuning=tuning, compute_dtype="bfloat16", save_dtype="float32"
    ).export(tmp_path / "out", [1])
    before, exported = stored(base), stored(tmp_path / "out")
    untouched = [key for key in before if "_proj" not in key]
    assert len(untouched) > 4 and all(
        mx.array_equal(before[key], exported[key]).item() for key in untouched
    )
    for key in before.keys() - set(
        untouched
    ):  # lora_b is zero: nothing changed yet, but for DoRA's division by a norm
        np.testing.assert_allclose(
            wide(exported[key]), wide(before[key]), atol=1e-2 if tuning == "dora" else 0
        )


@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_kept_adapters_are_mlx_lms_and_pefts(
    framework: Framework, tuning: str, base: Path, tmp_path: Path
):
    student = student_of(
        framework,
        base,
        tuning=tuning,
        lora_layers=1,
        lora_targets=["q_proj", "up_proj"],
        rank=4,
        alpha=6.0,
    )
    perturb(student)
    student.export(tmp_path / "out", [1])
    fused = mlx_lm_logits(tmp_path / "out")
    assert np.abs(fused - mlx_lm_logits(base)).max() > 0.01
    np.testing.assert_allclose(mlx_lm_logits(base, tmp_path / "out" / "adapters"), fused, atol=1e-4)
    np.testing.assert_allclose(
        transformers_logits(base, tmp_path / "out" / "adapters-peft"), fused, atol=1e-4
    )
    adapted, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "out" / "adapters"))
    names = {path for path, module in adapted.named_modules() if "lora_a" in module}
    assert names == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }  # none that was never trained


def test_export_keeps_a_generation_config_and_needs_none(
    framework: Framework, base: Path, tmp_path: Path
):
    """And stops where the base's configs, one id or a list, and the tokenizer say."""
    student = student_of(framework, base)
    student.export(tmp_path / "none", [4])
    assert json.loads((tmp_path / "none" / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 4]
    }
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [9, -1, 10**9, True], "temperature": 0.6})
    )
    student.export(tmp_path / "out", [4])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 4, 9],
        "temperature": 0.6,
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [1, 4, 9]


LEFT_OVERS = {
    "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "org/other"}',
    "trainer_state.json": "{}",
    "quantize_config.json": "{}",
    "training_args.bin": "",
    "modeling_own.py": "raise SystemExit",
    "README.md": "of the base",
    "requirements.txt": "evil",
    "hf_quant_config.json": "null",
    "notes.txt": "mine",
    "optimizer.safetensors": "",
}


def test_an_export_is_a_known_list_of_files(framework: Framework, base: Path, tmp_path: Path):
    """Nothing that names code, another disk, an adapter or a quantisation; named templates are a
    tokenizer's.
    """
    (base / "hf_quant_config.json").unlink(missing_ok=True)
    student = student_of(framework, base)
    for name, text in LEFT_OVERS.items():
        (base / name).write_text(text)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    own = {
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"},
        "_name_or_path": "/home/someone/model",
        "quantization_config": None,
    }
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(document | own))
    student.export(tmp_path / "out", [1])
    names = {
        str(file.relative_to(tmp_path / "out"))
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    assert names <= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }
    assert {"model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= names
    for name in ("config.json", "tokenizer_config.json"):
        before, after = (
            json.loads((folder / name).read_text()) for folder in (base, tmp_path / "out")
        )
        assert not own.keys() & after.keys()
        assert (
            before.keys() - own.keys() - {"torch_dtype", "is_local", "local_files_only"}
            <= after.keys()
        )
    np.testing.assert_allclose(
        transformers_logits(tmp_path / "out"), mlx_lm_logits(tmp_path / "out"), atol=1e-4
    )


def test_a_generation_config_that_cannot_be_read_is_told_before_training(
    framework: Framework, base: Path
):
    (base / "generation_config.json").write_text("[]")
    with pytest.raises(
        ModelError, match=r"^m: \S+generation_config\.json is not a JSON object but list"
    ):
        framework.load_student(base)


def test_an_exported_tokenizer_gives_the_ids_of_its_file_to_all(
    framework: Framework, tmp_path: Path
):
    """A base of the class GPT2Tokenizer, which loses the file's Digits in transformers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from test_model_tokenizer import file_ids, tokenizer_folder

    base = family_folder(tmp_path / "base", llama_config(width=64, vocabulary=280))
    tokenizer_folder(base)
    assert AutoTokenizer.from_pretrained(base).encode("12 1") != file_ids(base, "12 1")
    student_of(framework, base).export(tmp_path / "out", [1])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("12 1") == file_ids(base, "12 1")
    assert mlx_lm.load(str(tmp_path / "out"))[1].encode("12 1") == file_ids(base, "12 1")


def test_a_student_that_mlx_lm_cannot_open_is_torchs_alone(base: Path):
    assert export.not_for_mlx_lm(base) == ""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "xglm"}))
    assert "xglm" in export.not_for_mlx_lm(base)
    tensors = load_file(base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    save_file(
        tensors | {"model.layers.0.self_attn.q_proj.more": np.ones(3, np.float32)},
        base / "model.safetensors",
    )
    reason = export.not_for_mlx_lm(base)
    assert "self_attn.q_proj.more" in reason and "\n" not in reason


def test_a_machine_without_mlx_lm_says_nothing_of_it(base: Path, monkeypatch):
    """A run that a GPU's machine began is exported for mlx-lm on a Mac."""
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    assert export.not_for_mlx_lm(base) == ""


@pytest.mark.parametrize(
    "base_dtype, save_dtype, expected",
    [
        ("float32", "base", "float32"),
        ("bfloat16", "base", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_save_dtype_is_honoured(
    framework: Framework,
    tuning: str,
    base_dtype: str,
    save_dtype: str,
    expected: str,
    tmp_path: Path,
):
    """Whatever the base's config claims (here float32) of what its file holds."""
    base = family_folder(tmp_path / "base", llama_config(width=64, vocabulary=96), dtype=base_dtype)
    student = student_of(framework, base, tuning=tuning, save_dtype=save_dtype)
    student.export(tmp_path / "out", [1])
    assert {dtype_name(array) for array in stored(tmp_path / "out").values()} == {expected}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == expected and "torch_dtype" not in config
    written = sum(file.stat().st_size for file in tmp_path.glob("out/**/*.safetensors"))
    assert 0.9 * written < student.export_bytes() + 4096 and student.export_bytes() < 1.1 * written


def test_sharded_export(
    framework: Framework, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(export, "SHARD_BYTES", 2**15)
    student_of(framework, base).export(tmp_path / "out", [1])
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(base)) and set(
        index["weight_map"].values()
    ) == set(files)
    for key, file in index["weight_map"].items():
        assert key in mx.load(str(tmp_path / "out" / file))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored(base).values())
    expected = mlx_lm_logits(base)
    np.testing.assert_array_equal(mlx_lm_logits(tmp_path / "out"), expected)
    np.testing.assert_allclose(transformers_logits(tmp_path / "out"), expected, atol=1e-4)


def test_a_sharded_base_is_read_whole(
    framework: Framework, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What one export wrote in shards, a next student starts from."""
    monkeypatch.setattr(export, "SHARD_BYTES", 2**15)
    student_of(framework, base).export(tmp_path / "sharded", [1])
    monkeypatch.setattr(export, "SHARD_BYTES", 2**30)
    student_of(framework, tmp_path / "sharded", tuning="lora").export(tmp_path / "out", [1])
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys() and all(
        mx.array_equal(before[key], after[key]).item() for key in before
    )
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
