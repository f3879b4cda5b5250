"""Channels and heads that go while a student trains: zeros until the export, as if cut at once."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.numpy import load_file
from tiny import model_folder, recipe_of

from mlx_distill import pipeline, stages
from mlx_distill.backends import choose_backend
from mlx_distill.backends.protocol import Student
from mlx_distill.data.batches import Batch
from mlx_distill.errors import DistillError, ModelError
from mlx_distill.models.prune import Kept, Sizes, prune
from mlx_distill.objective import Objective
from mlx_distill.recipe.load import load_recipe
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.training import loop
from mlx_distill.training.loop import Interrupted
from mlx_distill.view import View

BACKENDS = ("mlx", "torch")
KEPT = Kept(
    (0, 1),
    {0: np.array([0, 3, 7, 8, 20]), 1: np.array([1, 2, 9, 11, 30])},
    {0: np.array([1]), 1: np.array([0])},
)
TEXT_ALONE = Objective(kd_weight=0.0)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(bytes_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thinning") / "model"
    return model_folder(path, bytes_tokenizer("qwen2_5"), seed=4)


def load(backend: str, folder: Path, optimizer: str) -> Student:
    recipe = recipe_of(optim={"optimizer": optimizer, "learning_rate": 1e-3, "weight_decay": 0.1})
    return choose_backend(backend).load_student(folder, "m", recipe)


def sizes_of(folder: Path) -> Sizes:
    return Sizes.of(json.loads((folder / "config.json").read_text()), "m")


def steps(student: Student, count: int, seed: int) -> list[float]:
    """Cross-entropies of some steps on drawn tokens."""
    random, losses = np.random.default_rng(seed), []
    for _ in range(count):
        tokens = random.integers(1, 200, (2, 12)).astype(np.int32)
        batch = Batch(
            tokens=tokens,
            positions=np.arange(20, dtype=np.int32),
            targets=random.integers(1, 200, 20).astype(np.int32),
            segment=np.ones(20, np.int8),
            weight=np.ones(20, np.float32),
            lengths=np.full(2, 12, np.int32),
            ids=("a", "b"),
        )
        losses.append(student.accumulate(batch, None, TEXT_ALONE, 20.0).terms["ce"].sum())
        student.apply(1e-3)
    return losses


def weights(student: Student, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    student.save_state(folder)
    return load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "schedule_free_adamw"])
def test_what_went_stays_zero_and_the_rest_learns_on(
    backend: str, optimizer: str, folder: Path, tmp_path: Path
):
    """With momenta of steps before, which alone would move a weight without a gradient."""
    student = load(backend, folder, optimizer)
    steps(student, 3, seed=1)
    student.keep(KEPT, sizes_of(folder))
    before = weights(student, tmp_path / "before")
    steps(student, 3, seed=2)
    after = weights(student, tmp_path / "after")
    down = "model.layers.0.mlp.down_proj.weight"
    gone = np.setdiff1d(np.arange(before[down].shape[1]), KEPT.channels[0])
    assert not after[down][:, gone].any()
    assert not after["model.layers.0.mlp.up_proj.weight"][gone].any()
    keys = after["model.layers.1.self_attn.k_proj.weight"]
    assert not keys[len(keys) // 2 :].any() and keys[: len(keys) // 2].all()
    assert (after[down][:, KEPT.channels[0]] != before[down][:, KEPT.channels[0]]).all()
    assert after[down][:, KEPT.channels[0]].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_learn_what_a_cut_model_learns(backend: str, folder: Path, tmp_path: Path):
    """A folder cut before training, trained alike, is the folder cut after it."""
    prune(folder, tmp_path / "cut", KEPT, "m")
    zeros, cut = load(backend, folder, "adamw"), load(backend, tmp_path / "cut", "adamw")
    zeros.keep(KEPT, sizes_of(folder))
    assert steps(zeros, 4, seed=3) == pytest.approx(steps(cut, 4, seed=3), rel=1e-5)
    for name, student in (("zeros", zeros), ("small", cut)):
        (tmp_path / name).mkdir()
        student.export(tmp_path / name, [1])
    prune(tmp_path / "zeros", tmp_path / "after", KEPT, "m")
    found = logits(tmp_path / "after")
    assert np.abs(found - logits(tmp_path / "small")).max() < 1e-4 * found.std()
    whole = logits(tmp_path / "zeros")  # and nothing is lost when zeros go
    assert np.abs(found - whole).max() < 1e-4 * found.std()


@torch.no_grad()
def logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.arange(3, 60)[None]).logits.numpy()


# in a run

SETTINGS = ("prune.channels=8", "prune.kv_heads=1", "prune.rounds=2", "prune.until=0.7")


def recipe_in(recipe: Path, out: Path, *settings: str) -> Recipe:
    sets = ("eval.task=", "run.validate_every=2", "run.export=best", *SETTINGS, *settings)
    return load_recipe(recipe, (f"run.folder={out}", "run.keep_checkpoints=last_and_best", *sets))


def run(recipe: Recipe, backend: str) -> tuple[Path, str]:
    said = io.StringIO()
    return pipeline.run(recipe, View(Console(file=said, width=200)), backend), said.getvalue()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_was_not(
    backend: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    never, said = run(recipe_in(tiny_recipe, tmp_path / "never"), backend)
    assert "in 2 cuts, the last one after step 4" in said
    assert "after step 2 15 channels and 1 heads of each block stay" in said
    config = json.loads((never / "student" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (8, 1)
    files = {file.name for file in (never / "student").iterdir()}
    assert files >= {"model.safetensors", "tokenizer.json"} and not files & {"whole", "cut"}
    assert logits(never / "student").std() > 0

    again = recipe_in(tiny_recipe, tmp_path / "again", "run.checkpoint_every=1")
    save = RunFolder.save_checkpoint

    def stopping(self, state, write, keep):
        save(self, state, write, keep)
        raise Interrupted("stopped")

    for _ in range(5):  # at the step of a cut, before one, after one
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(RunFolder, "save_checkpoint", stopping)
            run(again, backend)
    stopped, _ = run(again, backend)
    ours, theirs = (load_file(one / "student" / "model.safetensors") for one in (never, stopped))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


def test_the_best_student_is_one_after_the_last_cut(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of steps 2, 4 and 6 only the last one, though each is made to look worse than the one before."""
    terms, worse = loop.validation_terms, itertools.count(1.0)
    monkeypatch.setattr(loop, "validation_terms", lambda *_: terms(*_) | {"loss": next(worse)})
    _, said = run(recipe_in(tiny_recipe, tmp_path), "torch")
    assert "(step 6)" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("prune.channels=0", "prune.kv_heads=0"), "but neither is set: set channels or kv_heads"),
        (("student.tuning=lora",), '[student] tuning = "lora": set rounds = 0'),
        (("student.quantize_aware_bits=4",), "quantize_aware_bits = 4: set rounds = 0"),
        (("prune.channels=1000",), "channels = 1000 is more than"),
    ],
)
def test_what_cannot_be_thinned_is_refused(tiny_recipe: Path, tmp_path: Path, settings, words):
    with pytest.raises(DistillError) as error:
        run(recipe_in(tiny_recipe, tmp_path, *settings), "torch")
    assert words in str(error.value)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_there_is_nothing_to_make_before(tiny_recipe: Path, tmp_path: Path):
    with pytest.raises(DistillError, match="rounds = 2 cuts while the student trains"):
        stages.prune([recipe_in(tiny_recipe, tmp_path)], View(Console(file=io.StringIO())))


def test_a_family_whose_parts_are_not_known_is_refused_before_training(
    bytes_tokenizer, tiny_recipe: Path, tmp_path: Path
):
    """Phi-3 has its gate and its up projection in one matrix."""
    config = transformers.Phi3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi3")
    bytes_tokenizer("qwen2_5").save_pretrained(tmp_path / "phi3")
    recipe = recipe_in(
        tiny_recipe, tmp_path / "runs", f"student.model={tmp_path}/phi3", "prune.kv_heads=0"
    )
    with pytest.raises(ModelError, match="is not of a gated MLP or an attention with separate"):
        run(recipe, "torch")
    assert not list((tmp_path / "runs").rglob("checkpoints/*"))
