"""A `.gguf` written from a folder, opened by llama.cpp: the same token ids, prompts, distributions
and greedy text as transformers gives of the folder, and the same tensors by our own reader.

llama.cpp keeps keys and values in float32 here; by default it keeps them in float16, which moves
log-probabilities by about 0.01.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from llamacpp import LlamaCpp
from safetensors.numpy import load_file, save_file
from test_gguf import sample_texts
from tiny import model_folder as tiny_folder
from transformers import AutoModelForCausalLM

from mlx_distill.backends.stops import stops_of
from mlx_distill.errors import ModelError
from mlx_distill.models import hub
from mlx_distill.models.gguf.convert import convert
from mlx_distill.models.gguf.writer import AS_STORED, Written, write_gguf
from mlx_distill.models.tokenizer import load_tokenizer

PROMPT = [9, 40, 77, 200, 31, 8, 8, 120, 66, 5]
TEXTS = (
    "O9603",
    "<|im_start|>user\nO9603<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\n7",
    "héllo 漢字 \u00bd \n\n5 1234\t<b>",
)


def written(folder: Path, kind: str = AS_STORED) -> Written:
    ends = stops_of(folder, load_tokenizer(folder))
    path = folder.with_name(f"{folder.name}-{kind.replace(' ', '-')}.gguf")
    return write_gguf(folder, path, "a name", ends, kind)


def changed(folder: Path, **keys: object) -> Path:
    """The folder with other keys in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


def log_probs(folder: Path, prompt: list[int]) -> np.ndarray:
    """By transformers in float32, of what may follow the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1).numpy()


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


SCALINGS = {
    "plain": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize(
    "family, tied, scaling",
    [
        *((family, tied, "plain") for family in ("llama", "qwen2", "qwen3") for tied in (0, 1)),
        *(("llama", True, scaling) for scaling in ("linear", "yarn", "llama3")),
        ("qwen3", True, "yarn"),
    ],
)
def test_llama_cpp_computes_what_transformers_does(
    family: str, tied: bool, scaling: str, tmp_path: Path, bytes_tokenizer: Callable
) -> None:
    folder = tiny_folder(tmp_path / "model", bytes_tokenizer(), family=family, tied=bool(tied))
    changed(folder, **SCALINGS[scaling])
    llama = LlamaCpp(written(folder).path)
    prompt = PROMPT * 9  # longer than the lengths that are stretched
    expected = log_probs(folder, prompt)
    assert worst(llama.log_probs(prompt, len(expected)), expected) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_our_reader_gives_the_tensors_back(
    family: str, dtype: str, tmp_path: Path, bytes_tokenizer: Callable
) -> None:
    """To the bit, whatever they are stored as."""
    folder = tiny_folder(tmp_path / "model", bytes_tokenizer(), family=family, tied=False)
    stored = {
        name: torch.from_numpy(array).to(getattr(torch, dtype))
        for name, array in load_file(folder / "model.safetensors").items()
    }
    from safetensors.torch import save_file as save_torch

    save_torch(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = written(folder).path
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1}
    assert kinds == {{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]}
    convert(path, tmp_path / "back", "float32")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(back[name], tensor.float().numpy(), err_msg=name)


@pytest.fixture(scope="module")
def embedded() -> Path:
    return hub.model_folder("embedded:student")


def embedded_file(embedded: Path, folder: Path, kind: str = AS_STORED) -> Written:
    ends = stops_of(embedded, load_tokenizer(embedded))
    return write_gguf(embedded, folder / "m.gguf", "embedded", ends, kind)


def test_a_tokenizer_without_merges_gives_equal_ids(embedded: Path, tmp_path: Path) -> None:
    """The embedded student's: a token a byte. Prompts by its template are equal, too, and so is
    what it writes.
    """
    tokenizer, written = load_tokenizer(embedded), embedded_file(embedded, tmp_path)
    llama = LlamaCpp(written.path)
    for text in (*TEXTS, *sample_texts()[:40]):
        assert llama.ids(text) == tokenizer.encode(text, add_special_tokens=False), text
    turns = (("system", "Be brief."), ("user", "O9603"), ("assistant", "7"), ("user", "A1"))
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert llama.prompt(*turns) == rendered
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "O9603"}], add_generation_prompt=True, return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    wrote = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0]
    assert llama.greedy(prompt, 40) == wrote[len(prompt) :].tolist()
    # what differs is said: these three are words of their own to tokenizer.json alone
    assert "'user', 'assistant' inside of words" in written.notes[0]
    assert llama.ids("superuser") != tokenizer.encode("superuser")


def test_it_stops_where_the_folder_says(tmp_path: Path, bytes_tokenizer: Callable) -> None:
    folder = changed(tiny_folder(tmp_path / "model", bytes_tokenizer()), eos_token_id=[1, 2, 77])
    fields = gguf.GGUFReader(written(folder).path).fields
    named = [fields[f"tokenizer.ggml.{end}_token_id"].contents() for end in ("eos", "eot", "eom")]
    assert named == [1, 2, 77]
    four = changed(folder, eos_token_id=[1, 2, 77, 78])
    (folder.parent / "model-as-stored.gguf").unlink()
    assert any("names 3 ids that end a text" in note for note in written(four).notes)


@pytest.mark.parametrize("kind, within", [("q8_0", 0.05), ("q4_0", 0.5)])
def test_what_blocks_do_not_divide_stays_as_stored(
    kind: str, within: float, embedded: Path, tmp_path: Path
) -> None:
    """336 is no multiple of 32. And llama.cpp computes with the numbers that our reader finds in
    the file, but for its own rounding of activations to 8 bits.
    """
    found = embedded_file(embedded, tmp_path, kind)
    left = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]
    assert found.not_divided == left and found.matrices == 15
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(found.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F32" and types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.ffn_up.weight"] == kind.upper() and types["token_embd.weight"] == "Q8_0"
    convert(found.path, tmp_path / "back", "float32")
    prompt = load_tokenizer(embedded).encode("<|im_start|>user\nO9603<|im_end|>\n")
    read = log_probs(tmp_path / "back", prompt)
    llama = LlamaCpp(found.path).log_probs(prompt, len(read))
    likely = read > -8
    assert worst(llama[likely], read[likely]) < 0.1
    assert worst(read[likely], log_probs(embedded, prompt)[likely]) > 1e-3  # they are quantised


REFUSED = {
    "family": ({"model_type": "phi3"}, "its family 'phi3' cannot be written as GGUF"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
        "sliding_window is 8",
    ),
    "scaling": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope_type is 'dynamic'",
    ),
    "yarn": (
        {"rope_scaling": SCALINGS["yarn"]["rope_scaling"] | {"attention_factor": 2.0}},
        "yarn's attention factor is 2",
    ),
    "betas": (
        {"rope_scaling": SCALINGS["yarn"]["rope_scaling"] | {"beta_fast": 16.0}},
        "yarn's beta_fast is 16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    what: str, tmp_path: Path, bytes_tokenizer: Callable
) -> None:
    keys, expected = REFUSED[what]
    folder = changed(tiny_folder(tmp_path / "model", bytes_tokenizer()), **keys)
    if what == "window":
        changed(folder, max_window_layers=0)
    with pytest.raises(ModelError, match=expected) as error:
        written(folder)
    assert "export --to hf" in str(error.value) and not list(tmp_path.glob("*.gguf"))


def test_a_tensor_that_the_family_has_not(tmp_path: Path, bytes_tokenizer: Callable) -> None:
    folder = tiny_folder(tmp_path / "model", bytes_tokenizer())
    arrays = load_file(folder / "model.safetensors")
    arrays["model.layers.0.self_attn.o_proj.bias"] = np.zeros(32, np.float32)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"o_proj\.bias is none that a llama has"):
        written(folder)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda core: setattr(core, "normalizer", _lower()), "normalises"),
        (lambda core: setattr(core, "pre_tokenizer", _spaces()), "pre-tokenizer is none"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not(
    change: Callable, expected: str, tmp_path: Path, bytes_tokenizer: Callable
) -> None:
    tokenizer = bytes_tokenizer(merges=(("t", "h"),))
    change(tokenizer.backend_tokenizer)
    folder = tiny_folder(tmp_path / "model", tokenizer)
    with pytest.raises(ModelError, match=expected):
        written(folder)


def _lower():
    from tokenizers import normalizers

    return normalizers.Lowercase()


def _spaces():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@pytest.mark.network
@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_real_vocabularies_give_equal_ids(
    name: str, tokenizer_folder: Callable, tmp_path: Path
) -> None:
    """NFC apart, which llama.cpp does not do, and of which a note says so."""
    tokenizer = load_tokenizer(tokenizer_folder(name))
    rows = max(tokenizer.get_vocab().values()) + 1
    folder = tiny_folder(tmp_path / "model", tokenizer, vocabulary=rows, width=8, layers=1)
    found = written(folder)
    llama = LlamaCpp(found.path)
    texts = [text for text in sample_texts() if "e\u0301" not in text]
    for text in texts[:150]:
        assert llama.ids(text) == tokenizer.encode(text, add_special_tokens=False), text
    assert any("does not normalise" in note for note in found.notes) == (name == "qwen3")


@pytest.mark.network
def test_real_smollm2_writes_the_same_text(smollm2_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_folder)
    ends = stops_of(smollm2_folder, tokenizer)
    found = write_gguf(smollm2_folder, tmp_path / "m.gguf", "SmolLM2", ends)
    llama = LlamaCpp(found.path)
    for text in sample_texts()[:100]:
        assert llama.ids(text) == tokenizer.encode(text, add_special_tokens=False), text
    turns = (("user", "What is 12 + 30? Think step by step."),)
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert llama.prompt(*turns) == rendered
    prompt = tokenizer.encode(rendered, add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    wrote = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0]
    assert llama.greedy(prompt, 12) == wrote[len(prompt) :].tolist()
