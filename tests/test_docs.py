"""The pages for readers: links lead somewhere, and what they show of the program is true."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from mlx_distill.cli import app
from mlx_distill.data.detection import detected
from mlx_distill.data.formats import FORMATS
from mlx_distill.recipe.recipe import TABLES
from mlx_distill.recipe.shipped import shipped_names
from mlx_distill.recipe.tables import DataTable
from mlx_distill.recipe.values import Divergence

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPICS = [
    "recipes",
    "data",
    "methods",
    "teacher-cache",
    "sweeps",
    "scoring",
    "exports",
    "backends",
    "errors",
]


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub makes it."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match("https?:", link):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {link}"
        inside = [
            one for one in (there, *there.parents) if one.is_symlink() and ROOT in one.parents
        ]
        assert not inside, f"{page.name}: {link} goes through a link, which GitHub does not follow"
        assert not anchor or anchor in anchors(there), f"{page.name}: {link}"


def test_there_is_a_page_for_each_topic_and_readme_leads_to_it():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in TOPICS if f"(docs/{name}.md)" not in readme] == []


def test_readme_names_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"^\| `mlx-distill (\w+)", readme, re.MULTILINE))
    assert named == set(commands)


def test_the_rows_of_the_data_page_are_found_to_be_what_it_says(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = page.partition("<!-- rows -->\n```json\n")[2].partition("```")[0].splitlines()
    (listed,) = re.findall(r"In this order they are (.*?)\. Files", page, re.S)
    names = re.findall("`([a-z0-9]+)`", listed)
    assert {*names, "prompts"} == set(FORMATS)
    for name, row in zip(names, rows, strict=True):
        (tmp_path / "rows.jsonl").write_text(f"{json.dumps(json.loads(row))}\n")
        assert detected(DataTable(source=str(tmp_path / "rows.jsonl"))).format == name


def test_the_recipes_page_lists_what_comes_with_the_program():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    linked = {Path(one).stem for one in re.findall(r"\]\(([^)]*\.toml)\)", page)}
    assert set(shipped_names()) <= linked


def test_every_option_of_the_method_is_in_the_readmes_table():
    """Whoever adds a divergence, a rule or an optimizer adds its row (benchmarks/objectives.py)."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- options -->")[2].partition("<!-- /options -->")[0]
    words = [*get_args(Divergence), "hidden_weight", "hidden_distance"]
    words += ["spread", "whole_share", "ending"]
    selection = TABLES["selection"].model_fields
    words += [f'selection.by = "{word}"' for word in get_args(selection["by"].annotation)]
    words += ["selection.redraw", "kd_weight", "temperature", "token_share"]
    words += [word for word in get_args(selection["position_weight"].annotation) if word != "flat"]
    words += [
        "schedule_free_adamw",
        "rollouts.by",
        "rollouts.keep",
        "weigh",
        "refresh_every",
        "[prune]",
        "quantize_aware_bits",
    ]
    words += ["teacher.quantize_bits", "student.quantize_bits"]
    words += ["lora", "dora", "top_k", "sampled", "hidden"]
    missing = [word for word in words if word not in table]
    assert not missing
