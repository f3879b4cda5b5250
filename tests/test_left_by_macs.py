"""What macOS puts into folders by itself (`.DS_Store`, and `._x` beside `x`) is nobody's file: it is
read as nothing, suggested as nothing, and no reason to refuse a folder.
"""

from pathlib import Path

import pytest
from tiny import left_by_a_mac, model_folder, recipe_file, rows_file

from mlx_distill.errors import DistillError
from mlx_distill.files import of_people
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.recipe.load import load_recipe
from mlx_distill.runs.run_folder import RunFolder
from mlx_distill.sweeps.queue import _refuse_foreign
from mlx_distill.sweeps.sweep import load_sweep
from mlx_distill.verify.tasks import load_task


def folder_of_a_mac(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("")
    left_by_a_mac(folder)
    return folder


def test_only_what_people_made_is_listed(tmp_path):
    folder_of_a_mac(tmp_path / "a", "one.toml", ".hidden.toml", "two.json")
    assert [path.name for path in of_people(tmp_path / "a", "*.toml")] == [
        ".hidden.toml",
        "one.toml",
    ]
    assert len(of_people(tmp_path / "a")) == 3 and of_people(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (lambda folder: load_recipe(folder / "rowz.toml"), "did you mean .*/rows.toml"),
        (
            lambda folder: load_task(f"jsonl:{folder}/rowz.jsonl", 1, 0),
            "did you mean .*/rows.jsonl",
        ),
    ],
)
def test_a_companion_is_not_suggested(tmp_path, asked, wanted):
    """`._rows.jsonl` is as near to `._rowz.jsonl` as any name."""
    folder = folder_of_a_mac(tmp_path, "rows.toml", "rows.jsonl")
    with pytest.raises(DistillError, match=wanted):
        asked(folder)
    for name in ("rows.toml", "rows.jsonl"):
        (folder / name).unlink()
    with pytest.raises(DistillError) as found:
        asked(folder)
    assert "._" not in str(found.value)


def test_a_data_folder_holds_no_companions(tmp_path):
    from mlx_distill.data.sources import rows_of
    from mlx_distill.recipe.tables import DataTable

    folder = folder_of_a_mac(tmp_path, "rows.jsonl", "more.csv")
    with pytest.raises(DistillError, match=r"holds more\.csv, rows\.jsonl\)"):
        list(rows_of(DataTable(source=str(folder))))


def test_a_tokenizer_beside_companions_of_its_templates(bytes_tokenizer, tmp_path):
    """transformers takes every `*.jinja` of that folder for a template, `._rag.jinja` too."""
    plain = model_folder(tmp_path / "model", bytes_tokenizer("qwen2_5"))
    templates = plain / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    expected = load_tokenizer(plain)
    for folder in (plain, templates):
        left_by_a_mac(folder)
    found = load_tokenizer(plain)
    assert found.chat_template == expected.chat_template and "rag" in found.chat_template
    assert found.get_vocab() == expected.get_vocab()


def test_a_sweep_and_a_run_begin_in_folders_that_a_mac_showed(bytes_tokenizer, tmp_path):
    recipe = recipe_file(tmp_path, bytes_tokenizer("qwen2_5"))
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'recipe = "{recipe}"\nseeds = [1]\nfolder = "{tmp_path}/sweep"\n[axes]\nobjective.kd_weight = [0.5]\n'
    )
    loaded = load_sweep(sweep, ())
    folder_of_a_mac(loaded.folder / "recipes")
    _refuse_foreign(loaded)
    run = tmp_path / "runs" / "tiny"
    folder_of_a_mac(run / "checkpoints")
    folder_of_a_mac(run)
    assert RunFolder.open(load_recipe(recipe)).path == run


def test_rows_and_runs_beside_companions_are_read_as_before(
    bytes_tokenizer, tmp_path, tiny_recipe, command_line
):
    """A whole run whose every input lies in folders that a Mac showed."""
    recipe = recipe_file(tmp_path, bytes_tokenizer("qwen2_5"))
    rows_file(tmp_path / "rows.jsonl")
    for folder in (tmp_path, tmp_path / "teacher", tmp_path / "student"):
        left_by_a_mac(folder)
    sets = ("optim.steps=2", "run.checkpoint_every=1", "teacher.cache=top_k")
    sets += (
        f"teacher.cache_folder={tmp_path / 'cache'}",
        "eval.examples=2",
        "run.validate_every=0",
    )
    words = ("run", recipe, *(word for one in sets for word in ("--set", one)))
    drawn = {"mlx_distill.reporting.drawing:drawn": "<svg></svg>"}
    first = command_line(
        *words, returns=drawn, at="mlx_distill.backends.mlx.student:MlxStudent.apply", call=2
    )
    assert first.code == -9
    for folder in (tmp_path / "runs", tmp_path / "cache"):
        for path in sorted(path for path in (folder, *folder.rglob("*")) if path.is_dir()):
            left_by_a_mac(path)
    again = command_line(*words, returns=drawn)
    assert again.code == 0, again.err
    assert "going on" not in again.err and "._" not in again.out + again.err
