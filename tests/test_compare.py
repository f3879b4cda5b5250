"""`mlx-distill doctor --model`: MLX beside transformers."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_distill.backends.mlx import arithmetic
from mlx_distill.cli import app
from mlx_distill.errors import DistillError, ModelError
from mlx_distill.terminal.compare import Comparison, compare, probe

sys.path.insert(0, str(Path(__file__).parent / "models"))
from families import FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"].save(tmp_path_factory.mktemp("compared") / "llama")


def test_a_model_that_is_computed_right_is_said_to_be(folder: Path):
    result = CliRunner().invoke(app, ["doctor", "--model", str(folder)])
    assert result.exit_code == 0, result.output
    line = result.output.splitlines()[-1]
    assert line.startswith(f"model        {folder}: over 256 tokens the largest difference is ")
    assert "argmax agreement 100.00%" in line and "nats a token: ok" in line


def test_a_rotary_base_that_is_not_read_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What was silent: mlx-lm's own reading of the folder."""
    told = lambda meaning, tied: {"tie_word_embeddings": tied}  # noqa: E731
    monkeypatch.setattr("mlx_distill.backends.mlx.loading.for_mlx", told)
    monkeypatch.setattr(arithmetic, "settle", lambda model, meaning: ())
    result = CliRunner().invoke(app, ["doctor", "--model", str(folder)])
    assert result.exit_code == 1
    assert result.output.rstrip().endswith("WRONG")


def test_without_torch_a_line_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "torch" else real(name, *rest)  # noqa: E731
    monkeypatch.setattr("mlx_distill.terminal.compare.importlib.util.find_spec", absent)
    with pytest.raises(
        DistillError, match=r"are those of config\.json; comparing logits needs torch"
    ):
        compare(folder, "m")


def test_a_quantised_model_is_not_compared(folder: Path, tmp_path: Path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"^m: it is stored quantised"):
        compare(tmp_path, "m")


def test_the_probe_outlasts_a_window(tmp_path: Path):
    path = FAMILIES["mistral-window"].save(tmp_path / "m")
    config = json.loads((path / "config.json").read_text()) | {"sliding_window": 1000}
    (path / "config.json").write_text(json.dumps(config))
    assert len(probe(path, "m")) == 1128


def test_the_numbers_are_those_of_the_definitions():
    wanted = np.log([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    found = np.log([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    result = Comparison.of(found, wanted)
    assert result.largest == pytest.approx(np.log(2))
    assert result.agreement == 0.5
    assert result.kl == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2)
    assert not result.agrees and Comparison.of(wanted + 1e-5, wanted).agrees
    assert not Comparison.of(wanted * np.nan, wanted).agrees
