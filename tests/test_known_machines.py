"""Plans for machines that one does not sit at."""

from pathlib import Path

import pytest

from mlx_distill.cost.known_machines import CARDS, MACS, documented, known_machine
from mlx_distill.errors import DistillError

DOCS = Path(__file__).resolve().parents[1] / "docs" / "backends.md"


def test_the_table_of_the_docs_is_the_one_that_plans():
    assert f"<!-- machines -->\n{documented()}\n<!-- /machines -->" in DOCS.read_text()


def test_names_are_read_as_people_write_them():
    assert known_machine("M4 Max 64GB") is known_machine("m4-max-64gb")
    assert known_machine("RTX_4090").machine.device == "cuda"
    names = [one.name for one in CARDS + MACS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("h100", "h100-80gb"),
        ("m4 max", "m4-max-36gb, m4-max-48gb"),
        ("rtx-4900", "rtx-4090"),
        ("m4-max-65gb", "m4-max-64gb"),
        ("abacus", "h100-80gb, m4-max-64gb"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str):
    with pytest.raises(DistillError, match=f"--for {name}: no machine of that name.*{near}"):
        known_machine(name)


def test_a_card_without_bfloat16_computes_in_float32():
    assert (
        known_machine("t4").machine.dtype == "float32" == known_machine("v100-32gb").machine.dtype
    )
    assert known_machine("a100-40gb").machine.dtype == "bfloat16"


def test_a_mac_lends_its_gpu_a_part_of_its_memory():
    """FACTS of users: 16 GB → 67 %, 64 GB → 75 %."""
    assert known_machine("m1-16gb").machine.memory_bytes == pytest.approx(0.667 * 2**34, rel=1e-3)
    assert known_machine("m1-max-64gb").machine.memory_bytes == 48 * 2**30


def test_a_plan_for_another_machine_needs_none_of_it(command_line):
    mac = command_line("plan", "cot50", "--for", "m1-16gb")
    assert mac.code == 0 and "mlx on metal, bfloat16; a GPU's usual 67% of 16 GB" in mac.out
    assert "at least" in mac.out and "2.6 TFLOP/s" in mac.out
    card = command_line("plan", "cot50", "--for", "t4")
    assert "torch on cuda, float32; 16 GB of GPU memory, as NVIDIA states it" in card.out
    unrated = command_line("plan", "cot50", "--for", "m4-max-64gb")
    assert "how long a run takes there is not known" in unrated.out
    refused = command_line("plan", "cot50", "--for", "t4", "--time")
    assert refused.code == 2 and "--for t4 plans elsewhere" in refused.err
