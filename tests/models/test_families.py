"""A model folder computes on MLX, and on torch as we split it, what transformers computes from
it."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, TOKENS, Family, transformers_logits

from mlx_distill.backends.mlx import arithmetic, rotary
from mlx_distill.backends.mlx import loading as mlx_loading
from mlx_distill.backends.torch import loading as torch_loading
from mlx_distill.errors import ModelError
from mlx_distill.models import hub
from mlx_distill.models.config import TESTED, Meaning
from mlx_distill.models.reading import reading_of
from mlx_distill.models.translation import for_mlx, portable
from mlx_distill.recipe.tables import StudentTable

README = Path(__file__).parents[2] / "docs" / "backends.md"
TOLERANCE = 1e-3  # of the logits' standard deviation
PLAINLY_WRONG = 0.1
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Name of a family → its folder, made once."""
    root = tmp_path_factory.mktemp("families")

    def made(name: str) -> Path:
        return root / name if (root / name).exists() else FAMILIES[name].save(root / name)

    return made


def mlx_logits(folder: Path) -> np.ndarray:
    split = mlx_loading.load_teacher(folder, "m", 0)
    return np.array(split.head(split.hidden(mx.array(TOKENS))))


def plain_logits(folder: Path) -> np.ndarray:
    """By mlx-lm, without a word of ours."""
    model, _ = mlx_lm.utils.load_model(folder)
    return np.array(model(mx.array(TOKENS)))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in units of the wanted ones' standard deviation."""
    return np.abs(found - wanted).max() / wanted.std()


def changed(folder: Path, place: Path, **keys) -> Path:
    """A copy with other keys in config.json; a value of None removes the key."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text()) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_and_torch_compute_what_transformers_computes(name: str, folder):
    path = folder(name)
    wanted = transformers_logits(path)
    assert distance(mlx_logits(path), wanted) < TOLERANCE
    split = torch_loading.load_teacher(path, "m", 0, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        found = split.head(split.hidden(torch.from_numpy(TOKENS))).numpy()
    assert distance(found, wanted) < TOLERANCE


def readme_table() -> dict[str, bool]:
    """Family → whether README calls it a student."""
    table = README.read_text().partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]
    return {row[0]: row[3] == "yes" for row in rows[3:] if len(row) == 4}


def test_every_family_that_is_called_tested_is():
    assert {family.type for family in FAMILIES.values()} == set(TESTED) == set(readme_table())


@pytest.mark.parametrize("name", [name for name in FAMILIES if "-" not in name])
def test_the_families_that_readme_calls_students_are(name: str, folder):
    table, cpu = StudentTable(model="s"), torch.device("cpu")
    for load in (
        lambda: mlx_loading.load_student(folder(name), "s", table, 0),
        lambda: torch_loading.load_student(folder(name), "s", table, 0, cpu, torch.float32),
    ):
        if readme_table()[FAMILIES[name].type]:
            load()
        else:
            with pytest.raises(ModelError, match=r"^s: a student's head must be one plain matrix"):
                load()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-yarn",
        "mistral-window",
        "qwen2-window",
        "gemma2-window",
        "phi3-longrope",
        "smollm3",
    ],
)
def test_the_test_sees_what_mlx_lm_alone_does_not_read(name: str, folder):
    assert distance(plain_logits(folder(name)), transformers_logits(folder(name))) > PLAINLY_WRONG


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-llama3",
        "llama-yarn-attention",
        "qwen2",
        "olmo2",
        "phi",
        "granite",
        "glm4",
        "olmo3",
    ],
)
def test_the_exported_config_is_read_right_by_all(name: str, folder, tmp_path: Path):
    """transformers, this program, and mlx-lm without a word of ours."""
    wanted = transformers_logits(folder(name))
    path = changed(folder(name), tmp_path / "portable", **portable(Meaning(folder(name), "m")))
    for found in (transformers_logits(path), mlx_logits(path), plain_logits(path)):
        assert distance(found, wanted) < TOLERANCE
    again = portable(Meaning(path, "m"))
    assert again == json.loads((path / "config.json").read_text())


OLD_FORM = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "yarn": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    },
    "nothing": {},
}


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("form", OLD_FORM)
def test_a_config_of_transformers_4_is_read_as_transformers_reads_it(
    name: str, form: str, folder, tmp_path: Path
):
    path = changed(folder(name), tmp_path / "old", rope_parameters=None, **OLD_FORM[form])
    assert distance(mlx_logits(path), transformers_logits(path)) < TOLERANCE


@pytest.mark.parametrize(
    "name, keys",
    [
        ("gemma2-window", {"layer_types": None}),
        ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 6}),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 4}),
        ("olmo3", {"layer_types": None}),
        ("llama", {"tie_word_embeddings": None}),
        ("llama", {"head_dim": None}),
        (
            "mistral",  # which transformers reads as a Ministral
            {"sliding_window": 12, "layer_types": ["full_attention", "sliding_attention"] * 2},
        ),
        (
            "llama",
            {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        ("granite", {"tie_word_embeddings": None}),
    ],
)
def test_keys_that_are_missing_have_transformers_defaults(
    name: str, keys: dict, folder, tmp_path: Path
):
    path = changed(folder(name), tmp_path / "changed", **keys)
    assert distance(mlx_logits(path), transformers_logits(path)) < TOLERANCE


REFUSED = {
    "two bases": (
        "llama",
        {"rope_theta": 1e4},
        r"rope_theta is 10000\.0, but inside rope_parameters it is 500000",
    ),
    "two scalings": (
        "llama-linear",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling has factor = 2.0, but rope_para",
    ),
    "two types": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling has rope_type = linear, but rope_param",
    ),
    "two lists of factors": (
        "phi3-longrope",
        {"rope_scaling": {"type": "su", "short_factor": [9.0] * 8}},
        r"rope_scaling has short_factor = \[9\.0, .*, but rope_parameters has \[1\.0, ",
    ),
    "activation": (
        "llama",
        {"hidden_act": "gelu"},
        "hidden_act is gelu: mlx-lm computes silu; use --backend torch",
    ),
    "partial": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e5,
                "partial_rotary_factor": 0.5,
            }
        },
        r"partial_rotary_factor is 0\.5: a llama rotates whole heads",
    ),
    "unknown type": (
        "llama",
        {"rope_parameters": {"rope_type": "su", "rope_theta": 5e5}},
        "rope_type is 'su': known here: default, ",
    ),
    "no factor": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5}},
        "cannot be read by transformers: .*factor",
    ),
    "a factor of text": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": "4"}},
        "factor is '4': a number",
    ),
    "a base of text": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": "500000"}},
        "rope_theta is '500000': a number",
    ),
    "a base of nothing": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope_theta is 0: a number",
    ),
    "no head": (
        "gemma",
        {"tie_word_embeddings": False},
        r"tie_word_embeddings is false, but there is no lm_head\.weight",
    ),
    "nothing said of no head": (
        "llama-tied",
        {"tie_word_embeddings": None},
        r"tie_word_embeddings is absent, which means false for this family, but there is no",
    ),
    "a part that it has not": ("llama", {"text_config": {}}, "text_config is there, which a llama"),
    "odd": ("llama", {"head_dim": 15}, "cannot be read by transformers: .*even rotary"),
    "traditional": (
        "llama",
        {"rope_traditional": True},
        "rope_traditional is True: mlx-lm obeys it and transformers does not",
    ),
    "not periodic": (
        "gemma3_text",
        {"layer_types": ["full_attention", *["sliding_attention"] * 4, "full_attention"]},
        "layer_types is .*--backend torch",
    ),
    "no cap": ("gemma2", {"attn_logit_softcapping": None}, ""),
    "both ways": (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True: mlx-lm does not read it",
    ),
    "a cap": (
        "gemma3_text",
        {"final_logit_softcapping": 30.0},
        r"final_logit_softcapping is 30\.0: mlx-lm does not read it",
    ),
    "qk norms": ("phi", {"qk_layernorm": True}, "qk_layernorm is True: mlx-lm does not read it"),
    "no window": ("mistral-window", {"sliding_window": 0}, "sliding_window is 0: write how many"),
}


@pytest.mark.parametrize("case", [case for case in REFUSED if case != "no cap"])
def test_what_mlx_lm_would_not_compute_is_refused_in_one_line(case: str, folder, tmp_path: Path):
    name, keys, expected = REFUSED[case]
    path = changed(folder(name), tmp_path / "changed", **keys)
    with pytest.raises(ModelError, match=f"^m: .*{expected}") as caught:
        mlx_loading.load_teacher(path, "m", 0)
    assert "\n" not in str(caught.value)


IMPOSSIBLE = {
    "a base too large": ({"rope_theta": 1e300}, "rope_theta is 1e.300: a number from 1 to 1e.15"),
    "a base that is true": ({"rope_theta": True}, "rope_theta is True: a number"),
    "a base of 0": ({"rope_theta": 0}, "rope_theta is 0: a number"),
    "a base below 0": ({"rope_theta": -5.0}, r"rope_theta is -5\.0: a number"),
    "a base of null": ({"rope_theta": "NULL"}, "rope_theta is null: a number"),
    "a base of NaN": ({"rope_theta": float("nan")}, "rope_theta is null: a number"),
    "a base that is a list": ({"rope_theta": [1e4]}, r"rope_theta is \[10000\.0\]: a number"),
    "a factor of 0": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 0}},
        "factor is 0: a number",
    ),
    "no epsilon": ({"rope_theta": 1e4, "rms_norm_eps": "NULL"}, "rms_norm_eps"),
    "an epsilon of 1e300": ({"rope_theta": 1e4, "rms_norm_eps": 1e300}, "rms_norm_eps is 1e"),
    "an activation of nobody": ({"rope_theta": 1e4, "hidden_act": "foo"}, "hidden_act is '?foo"),
    "no head": ({"rope_theta": 1e4, "head_dim": 0}, "head_dim is 0: a whole number"),
    "a head of true": ({"rope_theta": 1e4, "head_dim": True}, "head_dim is True: a whole number"),
    "shared unevenly": (
        {"rope_theta": 1e4, "num_key_value_heads": 3},
        "num_key_value_heads is 3, which does not divide num_attention_heads, 4",
    ),
    "no layers": ({"rope_theta": 1e4, "num_hidden_layers": 0}, "num_hidden_layers is 0: a whole"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_numbers_that_no_model_has_are_one_line_on_both_backends(case: str, folder, tmp_path: Path):
    keys, expected = IMPOSSIBLE[case]
    path = changed(folder("llama"), tmp_path / "changed", rope_parameters=None, **keys)
    file = path / "config.json"
    file.write_text(file.read_text().replace('"NULL"', "null"))
    for load in (
        lambda: mlx_loading.load_teacher(path, "m", 0),
        lambda: torch_loading.load_teacher(path, "m", 0, torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(ModelError, match=f"^m: .*{expected}") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_logits_that_are_no_numbers_are_refused_on_both_backends(folder, tmp_path: Path):
    path = changed(folder("granite"), tmp_path / "changed", embedding_multiplier=1e39)
    for load in (
        lambda: mlx_loading.load_teacher(path, "m", 0),
        lambda: torch_loading.load_teacher(path, "m", 0, torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(ModelError, match=r"^m: its logits are not finite, though"):
            load()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_mlx_lm_alone_computes_otherwise_is_known_from_the_config(name: str, folder):
    """The mark by which caches and runs of older versions, which had no translation, are told."""
    try:
        same = np.array_equal(plain_logits(folder(name)), mlx_logits(folder(name)))
    except Exception:  # mlx-lm alone does not even load it
        same = False
    assert same or reading_of(folder(name)) == "1"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("form", OLD_FORM)
def test_folders_that_mlx_lm_alone_reads_right_have_no_mark(
    name: str, form: str, folder, tmp_path: Path
):
    path = changed(folder(name), tmp_path / "old", rope_parameters=None, **OLD_FORM[form])
    same = np.array_equal(plain_logits(path), mlx_logits(path))
    assert same or reading_of(path) == "1"
    if form in ("default", "linear"):
        assert same and reading_of(path) == ""


def test_the_embedded_models_and_a_qwen3_of_today_have_no_mark(folder):
    known = [hub.model_folder(f"embedded:{which}") for which in ("teacher", "student")]
    assert {reading_of(path) for path in (*known, folder("qwen3"))} == {""}
    assert reading_of(folder("qwen3-window")) == reading_of(folder("llama")) == "1"


def test_a_cap_that_is_null_is_refused(folder, tmp_path: Path):
    path = changed(folder("gemma2"), tmp_path / "changed")
    config = json.loads((path / "config.json").read_text()) | {"attn_logit_softcapping": None}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match="attn_logit_softcapping is null: mlx-lm's gemma2 needs a number"
    ):
        mlx_loading.load_teacher(path, "m", 0)


def test_a_family_that_was_not_compared_is_said(tmp_path: Path):
    family = Family("helium", {"head_dim": 16})
    notes = mlx_loading.load_teacher(family.save(tmp_path / "helium"), "m", 0).notes
    assert len(notes) == 1 and notes[0].startswith(
        "m: mlx-lm's helium was not compared with transformers"
    )


# The check at load


@pytest.mark.parametrize(
    "attribute, value, expected",
    [
        (
            "base",
            10_000.0,
            "rope_parameters asks for default with rope_theta 500000.0: mlx-lm computes",
        ),
        ("dims", 8, "rope_parameters asks for default"),
        ("traditional", True, "rope_parameters asks for default"),
        ("scale", 0.5, "rope_parameters asks for default"),
    ],
)
def test_the_check_sees_a_wrong_rotation(attribute: str, value, expected: str, folder, monkeypatch):
    model, _ = mlx_lm.utils.load_model(
        folder("llama"), model_config=for_mlx(Meaning(folder("llama"), "m"))
    )
    monkeypatch.setattr(
        rotary, "GivenRotary", lambda rotary: model.layers[2].self_attn.rope
    )  # nothing to replace it by
    assert arithmetic.settle(model, Meaning(folder("llama"), "m")) == ()
    setattr(model.layers[2].self_attn.rope, attribute, value)
    with pytest.raises(ModelError, match=f"^m: .*{expected}"):
        arithmetic.settle(model, Meaning(folder("llama"), "m"))


@pytest.mark.parametrize(
    "name, path, value, expected",
    [
        (
            "llama",
            "self_attn.scale",
            0.3,
            "attention scale asks for 0.25: mlx-lm computes 0.3 in model.layers.1.self_attn",
        ),
        (
            "llama",
            "input_layernorm.eps",
            1e-3,
            "rms_norm_eps asks for 1e-06: mlx-lm computes 0.001 in model.layers.1.input",
        ),
        (
            "granite",
            "residual_multiplier",
            1.0,
            "residual_multiplier asks for 0.7: mlx-lm computes 1 in model.layers.1",
        ),
        ("gemma2", "self_attn.attn_logit_softcapping", 5.0, "attn_logit_softcapping asks for 50"),
    ],
)
def test_the_check_sees_a_wrong_number(name: str, path: str, value: float, expected: str, folder):
    model, _ = mlx_lm.utils.load_model(
        folder(name), model_config=for_mlx(Meaning(folder(name), "m"))
    )
    arithmetic.settle(model, Meaning(folder(name), "m"))
    owner, _, attribute = path.rpartition(".")
    part = model.layers[1]
    for step in owner.split(".") if owner else ():
        part = getattr(part, step)
    setattr(part, attribute, value)
    with pytest.raises(ModelError, match=f"^m: .*{expected}"):
        arithmetic.settle(model, Meaning(folder(name), "m"))


# Keys of families that were not compared


def test_what_the_code_of_an_untested_family_reads_and_mlx_lm_does_not_is_refused(tmp_path: Path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    plain = Family("olmoe", experts).save(tmp_path / "plain")
    wanted = transformers_logits(plain)
    assert distance(mlx_logits(plain), wanted) < TOLERANCE
    clipped = changed(plain, tmp_path / "clipped", clip_qkv=0.5)
    assert distance(transformers_logits(clipped), wanted) > PLAINLY_WRONG
    assert distance(plain_logits(clipped), wanted) < TOLERANCE  # mlx-lm does not clip
    with pytest.raises(ModelError, match=r"^m: .*clip_qkv is 0\.5: mlx-lm does not read it"):
        mlx_loading.load_teacher(clipped, "m", 0)


UNREAD = {
    "qwen2_moe": {"norm_topk_prob": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "nanochat": {"final_logit_softcapping": 30.0},
    "deepseek_v3": {"rope_interleave": False},
}


@pytest.mark.parametrize("family", UNREAD)
def test_each_such_key_is_known_from_transformers_code(family: str, tmp_path: Path):
    ((key, value),) = UNREAD[family].items()
    for said in ({}, {key: value}):
        config = transformers.AutoConfig.for_model(family, **said)
        config.save_pretrained(tmp_path)
        assert Meaning(tmp_path, "m").asks_for(key) == bool(said)


def test_a_key_whose_value_follows_from_the_others_asks_for_nothing(tmp_path: Path):
    config = transformers.AutoConfig.for_model("llama4_text", num_hidden_layers=4)
    config.save_pretrained(tmp_path)
    meaning = Meaning(tmp_path, "m")
    assert meaning.declared["moe_layers"] and not meaning.asks_for("moe_layers")


def test_a_width_of_its_own_is_no_reason_to_refuse(tmp_path: Path):
    family = Family("gpt_neox", {"intermediate_size": 256})
    assert mlx_loading.load_teacher(family.save(tmp_path / "neox"), "m", 0).notes
