"""Where a model's files are: from the name in a recipe to a local Hugging Face folder.

In: `embedded:teacher`, a local folder, a `.gguf` file or a hub id `org/name`. Out: a folder with
`config.json`, tokenizer files and, when asked for, `model*.safetensors`; a digest that tells two
models apart. Decided here: in which order a name is tried, which files of a hub repository are
fetched, where a converted `.gguf` is kept. Only a hub id uses the network, and no code from a
model's folder is ever run.
"""

import hashlib
import re
from pathlib import Path

import mlx_distill
from mlx_distill.caches import kept_for_later
from mlx_distill.errors import ModelError, NotFound
from mlx_distill.files import of_people, sha256_of
from mlx_distill.models.folder import read_config
from mlx_distill.models.reach import hub_at_hand
from mlx_distill.models.shards import WEIGHT_FILES
from mlx_distill.models.tokenizer import TOKENIZER_FILES, load_tokenizer
from mlx_distill.models.weight_files import weight_files
from mlx_distill.models.weights import read_weights
from mlx_distill.readers import path_of

__all__ = ["load_tokenizer", "model_fingerprint", "model_folder"]

EMBEDDED_WEIGHTS = Path(mlx_distill.__file__).parent / "embedded" / "weights"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WHOLE_HASH_BYTES = 2 * 1024**3
SAMPLE_BYTES = 1024**2
SAMPLES = 64


def model_folder(name: str, revision: str = "main", weights: bool = True) -> Path:
    """The local folder of a model named in a recipe, downloaded or converted first where needed.

    `revision` is a hub branch, tag or commit and means nothing for other names. With
    `weights=False` a hub download leaves the weights out and a local folder need not have any.
    Raises `NotFound` (no such folder, repository or revision, hub not reachable) or `ModelError`
    (not a model folder, gated, a `.gguf` that cannot be converted).
    """
    if name.startswith("embedded:"):
        return _checked(_embedded(name), name, weights)
    path = path_of(name, f"model {_shown(name)}", ModelError)
    if path.is_file():
        return _checked(_converted(path), name, weights)
    if name and path.is_dir():
        return _checked(path, name, weights)
    if _looks_like_path(name):
        raise NotFound(
            f"model {name!r}: no such file or folder in {_place(path)}; check the path, or give a "
            "hub id org/name"
        )
    if not HUB_ID.fullmatch(name):
        raise NotFound(
            f"model {name!r}: not a folder here and not a hub id; give a folder, a .gguf file or "
            "org/name"
        )
    return _checked(_downloaded(name, revision, weights), name, weights)


def model_fingerprint(folder: Path) -> str:
    """A hex digest of `config.json` and the weights (the files that are loaded), equal for equal
    models wherever they lie.

    Weights of at most 2 GB are hashed whole (SHA-256); of larger ones the sizes, the safetensors
    headers and 64 evenly spaced megabytes of each file are. Tokenizer files do not count.
    """
    files = weight_files(folder, str(folder))
    whole = sum(file.stat().st_size for file in files) <= WHOLE_HASH_BYTES
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        content = sha256_of(file) if whole else _hash_sampled(file)
        digest.update(f"{file.name} {file.stat().st_size} {content}\n".encode())
    return digest.hexdigest()


def _embedded(name: str) -> Path:
    known = ("embedded:teacher", "embedded:student")
    if name not in known:
        raise NotFound(
            f"model {_shown(name)}: no such embedded model; there are {' and '.join(known)}"
        )
    folder = EMBEDDED_WEIGHTS / name.removeprefix("embedded:")
    if not folder.is_dir():
        raise NotFound(
            f"model {name!r}: its weights are not installed; in a clone, make them: python "
            "benchmarks/make_embedded.py"
        )
    return folder


def _checked(folder: Path, name: str, weights: bool) -> Path:
    """The folder, whose config can be read and whose weights (if asked for) are whole by their
    headers.
    """
    named = f"model {_shown(name)}"
    if not (folder / "config.json").is_file():
        raise ModelError(f"{named}: the folder has no config.json; {_advice(folder)}")
    read_config(folder, named)
    if not weights:
        return folder
    if not any(folder.glob(WEIGHT_FILES)) and (other := _other_weights(folder)):
        raise ModelError(
            f"{named}: the folder has no {WEIGHT_FILES} (weights found: {other}); convert it to "
            "safetensors"
        )
    read_weights(folder, named)
    return folder


def _other_weights(folder: Path) -> str | None:
    """A file of weights in another format; adapters are known by `read_weights`."""
    patterns = ("*.bin", "*.safetensors", "*.gguf")
    found = [file.name for pattern in patterns for file in of_people(folder, pattern)]
    return next((name for name in found if not name.startswith("adapter")), None)


def _shown(name: str) -> str:
    """A model's name in a message, cut where it is longer than any path."""
    return repr(name if len(name) <= 200 else f"{name[:60]}…")


def _advice(folder: Path) -> str:
    if (folder / "student" / "config.json").is_file():
        return f"it looks like a run: name {folder / 'student'}"
    if (folder / "adapter_config.json").is_file():
        return (
            "it is an adapter: fuse it into its base model (peft's merge_and_unload) and name "
            "the folder of the result"
        )
    if found := of_people(folder, "*.gguf"):
        return f"name the file in it: {found[0]}"
    if found := sorted(folder.glob("*/config.json")):
        return f"a model lies one level down: {found[0].parent}"
    return "name a folder in Hugging Face layout (config.json, tokenizer.json, model.safetensors)"


def _looks_like_path(name: str) -> bool:
    first = name.split("/")[0]
    if (
        name.endswith((".gguf", ".safetensors"))
        or name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
    ):
        return True
    return "/" in name and Path(first).is_dir()


def _place(path: Path) -> str:
    return str(path.absolute().parent)


def _converted(path: Path) -> Path:
    """The cached Hugging Face folder of a `.gguf` file, written on first use (atomically: a rename
    ends it).
    """
    if path.suffix.lower() != ".gguf":
        raise ModelError(
            f"model {str(path)!r}: a {path.suffix or 'plain'} file is not a model; give its "
            "folder, or a .gguf file"
        )
    from mlx_distill.models.gguf.convert import convert

    folder = kept_for_later("gguf") / f"{path.stem}-{_gguf_key(path)}"
    if not folder.is_dir():
        convert(path, folder)
    return folder


def _gguf_key(path: Path) -> str:
    from mlx_distill.models.gguf.convert import CONVERTER_VERSION

    stat = path.stat()
    return hashlib.sha256(
        f"{CONVERTER_VERSION} {stat.st_size} {stat.st_mtime_ns} {_hash_sampled(path)}".encode()
    ).hexdigest()[:16]


def _downloaded(name: str, revision: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    patterns = [*TOKENIZER_FILES, "README.md", *([WEIGHT_FILES] if weights else [])]
    try:
        with hub_at_hand():
            kept = snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        return Path(kept)
    except (HTTPError, OSError, ValueError) as error:
        raise _explained(error, name, revision) from error


def _explained(error: Exception, name: str, revision: str) -> ModelError | NotFound:
    """The one-line error of a failed hub download; gated before unknown, because the hub's classes
    nest that way.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f"model {name!r}: no such local folder, and on the hub"
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{asked} it is gated; accept its terms on the model's page, then `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(
            f"{asked} there is no such repository, or it is private; check the name, or `hf auth "
            "login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFound(
            f"{asked} it has no revision {revision!r}; name a branch, tag or commit that exists"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return NotFound(
            f"{asked} it cannot be fetched: the hub is not reachable (or HF_HUB_OFFLINE is set) "
            f"and its files at revision {revision!r} are not all in the local cache; go online "
            "once, or give a local folder"
        )
    return ModelError(
        f"{asked} the download failed ({_first_line(error)}); try again, or give a local folder"
    )


def _hash_sampled(file: Path) -> str:
    """SHA-256 of the first megabyte (it holds the header's start) and of 64 evenly spaced ones."""
    last = max(0, file.stat().st_size - SAMPLE_BYTES)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for offset in sorted({round(last * i / SAMPLES) for i in range(SAMPLES + 1)}):
            stream.seek(offset)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300].rstrip(".") if lines else type(error).__name__
