"""Which parts of a model stay, and the pruned base as the first stage of a run."""

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from tiny import model_folder

from mlx_distill import pipeline, stages
from mlx_distill.backends import choose_backend
from mlx_distill.backends.activations import Activations, Sums, averaged
from mlx_distill.errors import DistillError, RecipeError
from mlx_distill.machine import this_machine
from mlx_distill.models.hub import model_folder as model_folder_of
from mlx_distill.models.prune import Sizes
from mlx_distill.pruning.choice import chosen, refuse_larger
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.recipe.tables import PruneTable
from mlx_distill.terminal.plan import plan_of
from mlx_distill.view import View

SIZES = Sizes(layers=4, channels=5, kv_heads=2, queries_a_head=2, head_dim=8)
MEASURED = Activations(
    tokens=10,
    change=np.array([0.9, 0.1, 0.1, 0.5]),
    channels=np.array([[1, 5, 2, 4, 3], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [9, 8, 7, 6, 5]]),
    queries=np.array([[1, 1, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0], [5, 0, 2, 2]]),
)
TEXTS = [np.arange(5, 40), np.arange(100, 111)]


def test_the_most_active_parts_stay_in_their_order():
    table = PruneTable(layers=2, layers_by="change", channels=3, kv_heads=1)
    kept = chosen(table, SIZES, MEASURED)
    assert kept.layers == (0, 3)
    assert {layer: places.tolist() for layer, places in kept.channels.items()} == {
        0: [1, 3, 4],
        3: [0, 1, 2],
    }
    assert {layer: places.tolist() for layer, places in kept.kv_heads.items()} == {0: [1], 3: [0]}


def test_of_equal_blocks_the_first_stays():
    kept = chosen(PruneTable(layers=3, layers_by="change"), SIZES, MEASURED)
    assert kept.layers == (0, 1, 3)


def test_by_position_nothing_is_measured():
    assert chosen(PruneTable(layers=2), SIZES, None).layers == (0, 2)


@pytest.mark.parametrize("field", ["layers", "channels", "kv_heads"])
def test_more_than_there_is_cannot_stay(field: str):
    with pytest.raises(RecipeError, match=rf"\[prune\] {field} = 9 is more than m has, which is"):
        refuse_larger(PruneTable(**{field: 9}), SIZES, "m")


def test_means_are_over_all_tokens():
    texts = [
        Sums(1, [(0.5, np.array([1.0, 2.0]), None)]),
        Sums(3, [(0.1, np.array([3.0, 0.0]), None)]),
    ]
    found = averaged(texts)
    assert found.tokens == 4
    np.testing.assert_allclose(found.change, [0.15])
    np.testing.assert_allclose(found.channels, [[1.0, 0.5]])
    assert found.queries.shape == (1, 0)


# both backends


@pytest.fixture(scope="module")
def folder(bytes_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruning") / "model"
    return model_folder(path, bytes_tokenizer("qwen2_5"), seed=4, layers=3)


@torch.no_grad()
def by_definition(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From transformers' own hidden states and submodules, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    change, channels, heads = [], [], []
    for block in model.model.layers:
        seen: dict = {}
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.update(mlp=inputs[0][0])
        )
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.update(heads=inputs[0][0])
        )
        heads.append(seen)
    tokens = sum(map(len, TEXTS))
    count, width = model.config.num_attention_heads, model.config.head_dim
    totals: list = [0.0, 0.0, 0.0]
    for text in TEXTS:
        states = model.model(torch.from_numpy(text)[None], output_hidden_states=True).hidden_states
        change = [_turned(a[0], b[0]) for a, b in pairwise(states[:-1])]
        channels = torch.stack([seen["mlp"].abs().sum(0) for seen in heads])
        queries = torch.stack(
            [seen["heads"].reshape(-1, count, width).norm(dim=2).sum(0) for seen in heads]
        )
        found = np.array(change), channels.numpy(), queries.numpy()
        totals = [total + each for total, each in zip(totals, found, strict=True)]
    return tuple(total / tokens for total in totals)


def _turned(before: torch.Tensor, after: torch.Tensor) -> float:
    cosine = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
    return float((1 - cosine).sum())


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_activations_are_what_transformers_computes(backend: str, folder: Path):
    teacher = choose_backend(backend).load_teacher(folder, "m")
    width = transformers.AutoConfig.from_pretrained(folder).head_dim
    found = teacher.activations(TEXTS, width)
    change, channels, queries = by_definition(folder)
    # transformers' last hidden state is after the final norm
    np.testing.assert_allclose(found.change[:-1], change, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.channels, channels, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.queries, queries, rtol=1e-4, atol=1e-6)
    again = teacher.activations(TEXTS, width)  # nothing of the first watch is left
    np.testing.assert_array_equal(again.change, found.change)


def test_both_backends_measure_the_last_block_alike(folder: Path):
    width = transformers.AutoConfig.from_pretrained(folder).head_dim
    mlx, torched = (
        choose_backend(name).load_teacher(folder, "m").activations(TEXTS, width)
        for name in ("mlx", "torch")
    )
    np.testing.assert_allclose(mlx.change[-1], torched.change[-1], rtol=1e-4)


# in a run


def quiet() -> tuple[View, io.StringIO]:
    said = io.StringIO()
    return View(Console(file=said, width=200)), said


def of_teacher(tiny_recipe: Path, out: Path, *settings: str) -> Recipe:
    """The tiny recipe whose student is cut from its teacher."""
    text = tiny_recipe.read_text().splitlines()
    student = next(i for i, line in enumerate(text) if line.startswith("[student]"))
    model = next(i for i in range(student, len(text)) if text[i].startswith("model"))
    text[model] = "from_teacher = true"
    recipe = out / "from-teacher.toml"
    recipe.write_text("\n".join(text))
    sets = (f"prune.folder={out}/pruned", f"run.folder={out}/runs", "eval.task=", "optim.steps=1")
    return load_recipe(recipe, (*sets, "prune.channels=16", *settings))


def test_a_student_begins_as_its_teacher_cut(tiny_recipe: Path, tmp_path: Path):
    recipe = of_teacher(tiny_recipe, tmp_path)
    assert recipe.student.model == recipe.teacher.model
    view, said = quiet()
    [folder] = stages.prune([recipe], view)
    assert json.loads((folder / "pruned.json").read_text())["channels"] == 16
    assert "16 of " in said.getvalue() and "MLP channels" in said.getvalue()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    view, said = quiet()
    run = pipeline.run(recipe, view)
    assert "pruned base" in said.getvalue()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before  # it serves any number
    config = json.loads((run / "student" / "config.json").read_text())
    assert config["intermediate_size"] == 16
    assert not (run / "student" / "pruned.json").exists()
    # other texts choose anew; the choice of a position does not read them
    other = stages.prune([of_teacher(tiny_recipe, tmp_path, "prune.examples=1")], quiet()[0])
    assert other != [folder]


def test_a_base_whose_documents_changed_is_pruned_anew(tiny_recipe: Path, tmp_path: Path):
    """Its chat template is the student's; it is no part of a model's fingerprint."""
    recipe = load_recipe(tiny_recipe)
    base = Path(shutil.copytree(model_folder_of(recipe.student.model), tmp_path / "base"))
    sets = (f"student.model={base}", f"prune.folder={tmp_path}/pruned", "prune.layers=1")
    made = []
    for template in ("{{ messages }}", "{{ messages }} "):
        (base / "additional_chat_templates").mkdir(exist_ok=True)
        (base / "additional_chat_templates" / "rag.jinja").write_text(template)
        made += stages.prune([load_recipe(tiny_recipe, sets)], quiet()[0])
        kept = made[-1] / "additional_chat_templates" / "rag.jinja"
        assert kept.read_text() == template
    assert made[0] != made[1]


def test_a_recipe_that_cuts_nothing_has_nothing_to_prune(tiny_recipe: Path):
    with pytest.raises(RecipeError, match=r"\[prune\] cuts nothing"):
        stages.prune([load_recipe(tiny_recipe)], quiet()[0])


def test_a_teacher_without_a_cut_is_no_student(tiny_recipe: Path, tmp_path: Path):
    with pytest.raises(DistillError, match="distil a model into itself"):
        of_teacher(tiny_recipe, tmp_path, "prune.channels=0")


@pytest.mark.parametrize("model", ["other", ""])
def test_another_model_beside_from_teacher_is_refused(tiny_recipe, tmp_path: Path, model: str):
    with pytest.raises(DistillError, match=f'model = "{model}": remove one of the two'):
        of_teacher(tiny_recipe, tmp_path, f"student.model={model}")


@pytest.mark.parametrize(
    "asked, message",
    [
        (("prune.layers=9",), r"is more than .* has, which is"),
        (("prune.channels=9999", "prune.rounds=2"), r"is more than .* has, which is"),
        (("objective.hidden_weight=1.0", "objective.hidden_layers=[9]"), "asks for layer 9, but"),
    ],
)
def test_more_than_there_is_is_refused_before_anything_is_written(
    tiny_recipe: Path, tmp_path: Path, asked: tuple[str, ...], message: str
):
    texts = tmp_path / "texts"
    writes = "rollouts.by=teacher", "rollouts.max_new_tokens=5", f"rollouts.folder={texts}"
    recipe = load_recipe(tiny_recipe, ("truncation.span=cot", *writes, *asked))
    with pytest.raises(DistillError, match=message):
        plan_of(recipe, this_machine("mlx"))
    with pytest.raises(DistillError, match=message):
        pipeline.run(recipe, quiet()[0], "mlx")
    assert not texts.exists()
