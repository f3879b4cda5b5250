"""Exports of finished runs, opened by what they are for: transformers, mlx-lm, peft and llama.cpp;
what a quantised one lost, held against sums in float64; the model card; the way to the hub.
"""

import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from hub_stand_in import hub
from huggingface_hub import ModelCard
from jinja2 import Environment
from llamacpp import LlamaCpp
from peft import PeftModel
from rich.console import Console
from tiny import model_folder as tiny_folder
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mlx_distill.backends.pair import Pair
from mlx_distill.data.template import prompt_text
from mlx_distill.errors import DistillError
from mlx_distill.exporting import card as exporting_card
from mlx_distill.exporting import layouts
from mlx_distill.exporting.card import model_card, write_card
from mlx_distill.exporting.export import export
from mlx_distill.exporting.modelfile import pieces_of, write_modelfile
from mlx_distill.models.gguf.convert import convert
from mlx_distill.models.hub import model_folder
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.recipe.recipe import TABLES, with_values
from mlx_distill.runs.digests import all_files, digests
from mlx_distill.runs.manifest import Manifest
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.scoring.task_scores import TaskScores
from mlx_distill.view import View
from mlx_distill.writing.of_recipe import known_sequences

TOKENS = np.array([[9, 40, 77, 200, 31, 8, 8, 120, 66, 5]])


def exported(run: Path, to: str, out: Path, **options) -> tuple[Path, str]:
    """The folder of an export, and what was said."""
    said = io.StringIO()
    with View(Console(file=said, width=400)) as view:
        export(str(run), to, view, out, backend_name="mlx", **options)
    return out, said.getvalue()


def transformers_logits(folder: Path, tokens: np.ndarray = TOKENS) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def mlx_logits(folder: Path, tokens: np.ndarray = TOKENS, **options) -> np.ndarray:
    model, _ = mlx_lm.load(str(folder), **options)
    return np.array(model(mx.array(tokens)).astype(mx.float32))


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A finished run of one's own."""
    return Path(shutil.copytree(whole_run("full"), tmp_path / "tiny"))


@pytest.fixture(scope="module")
def wide(whole_run, tmp_path_factory, bytes_tokenizer) -> Path:
    """A finished run whose student is wide enough for mlx-lm's groups of 64, but for one matrix."""
    folder = tmp_path_factory.mktemp("wide") / "tiny"
    shutil.copytree(whole_run("full"), folder)
    run = RunFolder(folder)
    shutil.rmtree(run.student)
    tiny_folder(run.student, bytes_tokenizer("qwen2_5"), seed=5, width=64)
    config = json.loads((run.student / "config.json").read_text())
    (run.student / "config.json").write_text(json.dumps(config | {"eos_token_id": [1]}))
    run.update(Manifest, student_files=digests(run.student, all_files(run.student)), card="")
    return folder


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_whole_students_open_in_both(to: str, run: Path, tmp_path: Path) -> None:
    folder, said = exported(run, to, tmp_path / "out")
    expected = transformers_logits(run / "student")
    np.testing.assert_allclose(transformers_logits(folder), expected, atol=1e-5)
    np.testing.assert_allclose(mlx_logits(folder), expected, atol=1e-4)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(run / "student").get_vocab()
    assert f"{to} written to {folder}" in said


def test_the_mlx_lm_at_hand_is_asked_whether_it_opens_a_student(run: Path, tmp_path: Path) -> None:
    """Not the manifest, which another machine may have written."""
    folder, about = RunFolder(run), run / "student" / "config.json"
    folder.update(Manifest, not_for_mlx_lm="not tried")  # as older versions kept it
    exported(run, "mlx", tmp_path / "out")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"model_type": "xglm"}))
    folder.update(Manifest, student_files=digests(folder.student, all_files(folder.student)))
    with pytest.raises(DistillError, match=r"mlx-lm cannot open this student: .*xglm"):
        exported(run, "mlx", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def in_four_bits(base: Path, place: Path) -> tuple[Path, Path]:
    """A folder as `mlx_lm.convert -q` writes it, and its numbers written out by the same."""
    packed, written = place / "packed", place / "written"
    mlx_lm.convert(str(base), str(packed), quantize=True)
    mlx_lm.convert(str(packed), str(written), dequantize=True)
    return packed, written


def test_adapters_do_on_their_base_what_the_student_does(
    whole_run, tiny_recipe: Path, tmp_path: Path
) -> None:
    base, run = tiny_recipe.parent / "student", whole_run("lora")
    packed, written = in_four_bits(base, tmp_path)
    expected = transformers_logits(run / "student")
    assert np.abs(expected - transformers_logits(written)).max() > 1e-3
    peft, said = exported(run, "peft", tmp_path / "peft")
    assert "trained on its base in 4 bits, and belongs on that" in said
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(model, peft)(torch.from_numpy(TOKENS).long()).logits
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    ours, _ = exported(run, "mlx-adapters", tmp_path / "ours")
    np.testing.assert_allclose(mlx_logits(packed, adapter_path=str(ours)), expected, atol=1e-4)
    whole, _ = exported(run, "hf", tmp_path / "hf")
    assert not list(whole.glob("adapters*"))


def test_adapters_on_nf4_do_in_peft_what_the_student_does(
    whole_run, tiny_recipe: Path, tmp_path: Path
) -> None:
    run = whole_run("torch nf4")
    assert "lora on its weights in bitsandbytes' NF4" in (run / "student" / "README.md").read_text()
    folder, said = exported(run, "peft", tmp_path / "peft")
    assert "trained on its base in bitsandbytes' NF4, and belongs on that" in said
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        tiny_recipe.parent / "student", dtype=torch.float32, quantization_config=chosen
    )
    model = PeftModel.from_pretrained(base, folder)
    model.train()  # without which bitsandbytes computes in bfloat16 on some CPUs
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS).long()).logits
    expected = transformers_logits(run / "student")
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert np.abs(expected - transformers_logits(tiny_recipe.parent / "student")).max() > 1e-3


def test_a_gguf_writes_what_the_student_writes(run: Path, command_line, tmp_path: Path) -> None:
    result = command_line("export", run, "--to", "gguf", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    llama = LlamaCpp(tmp_path / "out" / "tiny.gguf")
    tokenizer = load_tokenizer(run / "student")
    prompt = tokenizer.encode(prompt_text((("user", "#1 2+3?"),), tokenizer))
    model = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    wrote = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0]
    assert llama.greedy(prompt, 20) == wrote[len(prompt) :].tolist()
    assert "FROM ./tiny.gguf" in (tmp_path / "out" / "Modelfile").read_text()


def test_the_docs_ask_llama_cpp(tmp_path: Path, capsys) -> None:
    """The last step of the docs, word for word but for the path: the embedded student answers."""
    pytest.importorskip("xllamacpp", reason="pip install 'mlx-distill[llamacpp]'")
    student = model_folder("embedded:student")
    layouts.LAYOUTS["gguf-q8_0"](student, tmp_path, "cot50")
    page = (Path(__file__).parents[1] / "docs" / "exports.md").read_text()
    code = re.search(r"<!-- ask-llama-cpp -->\n```python\n(.*?)```", page, re.S)[1]
    path = "runs/cot50/exports/gguf-q8_0/cot50-q8_0.gguf"
    assert path in code
    exec(code.replace(path, str(tmp_path / "cot50-q8_0.gguf")), {})
    lines = capsys.readouterr().out.split()
    assert len(lines) > 10 and re.fullmatch(r"\w+", lines[-1])


def divergence(run: Path, logits: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """KL from the student's distribution to another one and how often both choose alike, in
    float64, over the reasoning and the answers that the run holds out.
    """
    recipe = RunFolder(run).recipe()
    tokenizer = load_tokenizer(run / "student")
    pair = Pair(recipe, run / "student", None, tokenizer, None)
    kl, alike = [], []
    for sequence in known_sequences(pair, "").validation:
        tokens = sequence.tokens[None]
        u, v = (
            torch.log_softmax(torch.from_numpy(found[0, sequence.prompt_end - 1 : -1]).double(), -1)
            for found in (transformers_logits(run / "student", tokens), logits(tokens))
        )
        kl.append((u.exp() * (u - v)).sum(-1))
        alike.append((u.argmax(-1) == v.argmax(-1)).double())
    return float(torch.cat(kl).mean()), float(torch.cat(alike).mean())


@pytest.mark.parametrize("to", ["mlx-4bit", "mlx-8bit", "gguf-q8_0", "gguf-q4_0"])
def test_a_quantised_export_says_what_it_lost(to: str, wide: Path, tmp_path: Path) -> None:
    folder, said = exported(wide, to, tmp_path / "out")
    kept = json.loads((folder / "export.json").read_text())["fidelity"]
    if to.startswith("gguf"):
        file = folder / f"tiny-{to.removeprefix('gguf-')}.gguf"
        convert(file, tmp_path / "back", "float32")
        kl, alike = divergence(wide, lambda tokens: transformers_logits(tmp_path / "back", tokens))
        assert len(LlamaCpp(file).greedy([9, 40, 77], 5)) > 0
    else:
        kl, alike = divergence(wide, lambda tokens: mlx_logits(folder, tokens))
    assert kept["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-6) and kl > 0
    assert kept["agreement"] == pytest.approx(alike, abs=0.02)
    scores = RunFolder(wide).readable(TaskScores).whole["student"]
    assert kept["accuracy_difference"] == kept["accuracy"] - scores.accuracy
    assert "KL to the unquantised student" in said and "problems (95\u00a0% interval" in said
    card = (folder / "README.md").read_text()
    assert "KL to the unquantised student" in card and "accuracy" in card


def test_what_a_student_lost_that_learned_rounded_is_said_of_it_as_it_lies_there(
    wide: Path, tmp_path: Path
) -> None:
    """Rounded once more it is the export itself, at no distance."""
    run = RunFolder(Path(shutil.copytree(wide, tmp_path / "tiny")))
    run.write_text("recipe.toml", with_values(run.recipe(), eval={"task": ""}).toml())
    lost = []
    for bits in (0, 4):
        recipe = with_values(run.recipe(), student={"quantize_aware_bits": bits})
        run.write_text("recipe.toml", recipe.toml())
        folder, _ = exported(run.path, "mlx-4bit", tmp_path / str(bits))
        lost.append(json.loads((folder / "export.json").read_text())["fidelity"])
    assert lost[0] == lost[1] and lost[0]["kl"] > 1e-4


def test_what_groups_do_not_divide_is_said(run: Path, tmp_path: Path, bytes_tokenizer) -> None:
    _, said = exported(run, "mlx-4bit", tmp_path / "out", measure=False)
    assert "13 matrices stay unquantised, for a group of 64 does not divide their rows" in said
    narrow = tiny_folder(tmp_path / "narrow", bytes_tokenizer(), width=16)
    (tmp_path / "none").mkdir()
    with pytest.raises(DistillError, match="no matrix has rows of a multiple of 64"):
        layouts.LAYOUTS["mlx-8bit"](narrow, tmp_path / "none", "narrow")
    assert layouts.not_divided(["a", "b", "c"], 32, "block") == [
        "3 matrices stay unquantised, for a block of 32 does not divide their rows: a, b and 1 more"
    ]


def test_an_export_replaces_an_export_and_nothing_else(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    exported(run, "hf", out)
    exported(run, "gguf", out)
    assert not (out / "config.json").exists() and (out / "tiny.gguf").exists()

    def fails(student: Path, folder: Path, name: str) -> list[str]:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(layouts.LAYOUTS, "hf", fails)
    with pytest.raises(DistillError, match="No space left"):
        exported(run, "hf", out)
    assert (out / "tiny.gguf").exists() and not list(tmp_path.glob(".out*"))
    (out / "Modelfile").write_text("mine")
    with pytest.raises(DistillError, match="holds Modelfile, which no export made as it is now"):
        exported(run, "gguf", out)
    assert (out / "Modelfile").read_text() == "mine"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(DistillError, match=r"holds a\.txt"):
        exported(run, "hf", tmp_path / "notes")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    with pytest.raises(DistillError, match="is a link"):
        exported(run, "hf", tmp_path / "link")


def test_refusals(run: Path, tmp_path: Path) -> None:
    for name, to, expected in (
        (run, "onnx", "--to should be one of hf, mlx, .* found 'onnx'"),
        (run / "student", "hf", "is no run"),
        (run, "peft", "trained all weights and has no adapters"),
    ):
        with pytest.raises(DistillError, match=expected):
            exported(name, to, tmp_path / "out")
    with pytest.raises(DistillError, match="--push should be an id org/name"):
        exported(run, "hf", tmp_path / "out", push="not an id")
    config = run / "student" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(DistillError, match=r"config\.json is damaged"):
        exported(run, "hf", tmp_path / "out")
    shutil.rmtree(run / "student")
    with pytest.raises(DistillError, match="without a finished student"):
        exported(run, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# the model card


def test_the_card_says_what_the_run_did(run: Path, tiny_recipe: Path) -> None:
    card = ModelCard.load(run / "student" / "README.md")
    assert card.data.tags == ["distillation", "mlx-distill"] and card.data.base_model is None
    score = RunFolder(run).readable(TaskScores).whole["student"]
    assert card.data.eval_results[0].metric_value == round(score.accuracy, 4)
    manifest = RunFolder(run).readable(Manifest)
    for part in (
        "teacher: `teacher`",
        "the first half of the whole sequence, chain of thought, forward KL, with the teacher",
        f"{100 * score.low:.1f}\u00a0% to {100 * score.high:.1f}\u00a0%",
        "training time:",
        "base model `student`: not known",
        "of its answers on the task did not finish",
        f"mlx: {manifest.versions['mlx']}",
        "fraction = 0.5",
    ):
        assert part in card.text, part
    assert str(tiny_recipe.parent) not in card.content


@pytest.mark.parametrize(
    ("truncation", "said"),
    [
        (
            {},
            "(the first half of the whole sequence); what comes after the cut it knows from its base",
        ),
        (
            {"spread": 0.6, "whole_share": 0.25},
            "(the first half of the whole sequence, each cut at its own fraction, ± 60\u00a0%, a "
            "quarter of the examples whole); what comes after the cut it learned from the whole "
            "texts alone",
        ),
        ({"ending": "answer"}, "the cut it learned from the answers that follow it alone"),
        (
            {"ending": "answer", "whole_share": 0.5},
            "the cut it learned from the whole texts and the answers that follow it alone",
        ),
        ({"whole_share": 1.0}, ""),
    ],
)
def test_the_card_says_what_a_student_saw_after_the_cut(run: Path, monkeypatch, truncation, said):
    read = exporting_card.read_run

    def changed(folder: Path):
        found = read(folder)
        return replace(found, recipe=with_values(found.recipe, truncation=truncation))

    monkeypatch.setattr(exporting_card, "read_run", changed)
    card = model_card(run)
    assert said in card and ("It learned from cut texts" in card) == bool(said)
    assert ("each cut at its own fraction" in card.partition("## Scores")[0]) == (
        "spread" in truncation
    )


def test_the_card_shows_no_folder_of_this_machine(
    run: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever field names it: each folder, and the tasks asked beside the first one."""
    here, read = "/home/me/secret", exporting_card.read_run

    def elsewhere(folder: Path):
        found = read(folder)
        named = {
            table: {name: here for name in kind.model_fields if name.endswith("folder")}
            for table, kind in TABLES.items()
        }
        named["eval"]["also"] = (f"gsm8k:{here}/test.jsonl",)
        return replace(found, recipe=with_values(found.recipe, **named))

    monkeypatch.setattr(exporting_card, "read_run", elsewhere)
    card = model_card(run)
    assert here not in card and "gsm8k:test.jsonl" in card


def test_licences_are_those_of_cards_beside(run: Path, tiny_recipe: Path, monkeypatch) -> None:
    teacher = tiny_recipe.parent / "teacher" / "README.md"
    teacher.write_text("---\nlicense: apache-2.0\n---\nmine\n")
    try:
        assert "- teacher `teacher`: apache-2.0" in model_card(run)
        teacher.write_text("---\nlicense: [\n---\n")
        assert "- teacher `teacher`: not known" in model_card(run)
    finally:
        teacher.unlink()


def test_a_card_that_a_person_wrote_stays(run: Path) -> None:
    folder, card = RunFolder(run), run / "student" / "README.md"
    assert write_card(folder) == "" and not folder.exported.foreign()
    card.write_text("mine")
    assert "is left as it is" in write_card(folder) and card.read_text() == "mine"
    assert not folder.exported.damage()  # the student itself is whole
    folder.update(Manifest, card="")
    card.write_text(model_card(run))  # killed before it was kept whose it is
    assert write_card(folder) == ""
    card.write_text("mine")
    assert folder.exported.foreign() == [card]  # and --fresh names it


# the Modelfile


def in_python(template: str) -> str:
    """The few words of Go's templates that we write, as Jinja has them."""
    for go, jinja in (
        (r"\{\{ range \.Messages \}\}", "{% for m in messages %}"),
        (r"\{\{ if eq \.Role (\"\w+\") \}\}", r"{% if m.role == \1 %}"),
        (r"\{\{ else if eq \.Role (\"\w+\") \}\}", r"{% elif m.role == \1 %}"),
        (r"\{\{ \.Content \}\}", "{{ m.content }}"),
        (r"\{\{ end \}\}\{\{ end \}\}", "{% endif %}{% endfor %}"),
    ):
        template = re.sub(go, jinja, template)
    return template


CHATML = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TEMPLATES = {
    "a system message of its own": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    + CHATML
    + "{% endfor %}"
    + ANSWER,
    "a token before all turns": "{{ bos_token }}{% for m in messages %}"
    + CHATML
    + "{% endfor %}"
    + ANSWER,
}


@pytest.mark.parametrize("name", ["qwen2_5", "embedded", *TEMPLATES])
def test_ollama_is_told_the_same_prompts(name: str, bytes_tokenizer, tmp_path: Path) -> None:
    if name == "embedded":
        tokenizer = load_tokenizer(model_folder("embedded:student"))
    else:
        tokenizer = bytes_tokenizer("qwen2_5")
        tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    pieces = pieces_of(tokenizer)
    assert pieces is not None
    write_modelfile(tmp_path, "m.gguf", tokenizer, [1])
    text = (tmp_path / "Modelfile").read_text()
    template = in_python(re.search(r'TEMPLATE """(.*?)"""\n', text, re.S)[1])
    talk = [("user", "a?"), ("assistant", "b."), ("user", "c\n?")]
    for turns in (talk[:1], talk, [("system", "s"), *talk]):
        told = turns
        if pieces.system and turns[0][0] != "system":  # Ollama puts it there
            told = [("system", re.search(r'SYSTEM """(.*?)"""', text, re.S)[1]), *turns]
        messages = [{"role": role, "content": content} for role, content in told]
        rendered = Environment().from_string(template).render(messages=messages)
        assert rendered == prompt_text(tuple(turns), tokenizer)


def test_a_template_that_does_more_is_left_to_ollama(bytes_tokenizer, tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer("qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ loop.index }}>{{ m.role }} {{ m.content }}{% endfor %}#"
    )
    assert pieces_of(tokenizer) is None
    assert "has no TEMPLATE" in write_modelfile(tmp_path, "m.gguf", tokenizer, [1])[0]
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\nPARAMETER stop")


# the hub


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_push_puts_the_whole_export_there(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # not on loopback
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setattr("hub_stand_in.SMALL", 10_000)
    with hub("right") as there:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", there.address)
        folder, said = exported(run, "hf", tmp_path / "out", push="me/a-student")
        assert f"pushed to {there.address}/me/a-student (a new private repository)" in said
        held = there.repositories["me/a-student"]
        assert held == {name: (folder / name).read_bytes() for name in all_files(folder)}
        assert there.large and there.made["me/a-student"]["visibility"] == "private"
        there.repositories["me/a-student"]["kept.txt"] = b"theirs"
        _, said = exported(run, "hf", tmp_path / "out", push="me/a-student")
        assert "private" not in said and held["kept.txt"] == b"theirs"
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(DistillError, match=r"out is whole: log in with `hf auth login`"):
            exported(run, "hf", tmp_path / "out", push="me/a-student")
    with pytest.raises(DistillError, match="try again when the hub can be reached") as error:
        exported(run, "hf", tmp_path / "out", push="me/a-student")
    assert "\n" not in str(error.value)


def test_without_a_network_a_push_does_not_wait_for_the_hubs_client(run, tmp_path, monkeypatch):
    def unknown(*asked):
        raise OSError("Name or service not known")

    monkeypatch.setattr("mlx_distill.models.reach.socket.getaddrinfo", unknown)
    monkeypatch.setattr("mlx_distill.models.reach.getproxies", dict)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_exists", lambda *asked: pytest.fail("asked"))
    with pytest.raises(
        DistillError, match=r"its host is not known here\); .*out is whole: try again"
    ):
        exported(run, "hf", tmp_path / "out", push="me/a-student")
    assert (tmp_path / "out" / "config.json").exists()
