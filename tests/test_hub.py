"""Names of models become folders; what cannot becomes one line. No network: the hub's answers are
played.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

import mlx_distill
from mlx_distill.errors import ModelError, NotFound
from mlx_distill.models import hub


def write_model(folder: Path, scale: float = 1.0) -> Path:
    """A folder that has everything but sense: config, one tensor, a two-word tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": np.full((2, 2), scale, np.float32)}, folder / "model.safetensors")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def play_hub(monkeypatch: pytest.MonkeyPatch, answer: Exception | Path) -> dict[str, object]:
    """Replace the hub's download by one answer; returns what it was asked."""
    asked: dict[str, object] = {}

    def snapshot_download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def hub_error(kind: str) -> Exception:
    import huggingface_hub.errors as errors

    error = getattr(errors, kind)
    return error.__new__(error, "several\nlines")


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert hub.model_folder(str(folder)) == folder


def test_weights_may_be_absent_only_when_not_asked_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert hub.model_folder(str(folder), weights=False) == folder
    with pytest.raises(ModelError) as error:
        hub.model_folder(str(folder))
    one_line(error, "model*.safetensors", "pytorch_model.bin", "convert")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        hub.model_folder(str(tmp_path))
    one_line(error, str(tmp_path), "no config.json", "Hugging Face layout")


def test_folder_of_a_run_names_its_student(tmp_path: Path) -> None:
    write_model(tmp_path / "student")
    with pytest.raises(ModelError) as error:
        hub.model_folder(str(tmp_path))
    one_line(error, str(tmp_path / "student"))


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "no.gguf", "mlx_distill/nothing"]
)
def test_path_that_does_not_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(mlx_distill.__file__).parents[1])
    play_hub(monkeypatch, AssertionError("the hub was asked for a path"))
    with pytest.raises(NotFound) as error:
        hub.model_folder(name)
    one_line(error, name, "no such file or folder", "check the path")


@pytest.mark.parametrize("name", ["", "gpt2", "what is/this", "embedded:nobody"])
def test_name_of_no_kind(name: str) -> None:
    with pytest.raises(NotFound) as error:
        hub.model_folder(name)
    one_line(error, repr(name))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("~nobody-here/x", "no home folder '~nobody-here'"),
        ("y" * 300, "a name in a path can have 255 bytes"),
        ("x/" + "é" * 200, "a name in a path can have 255 bytes"),
        ("/" + "a/" * 3000, "a path can have 4,096 bytes"),
        ("a\0b", "cannot hold a NUL character"),
        ("\ud800/x", "not a hub id"),
        ("a\nb/c", "not a hub id"),
        ("embedded:" + "z" * 1000, "no such embedded model"),
        ("/dev/zero", "/dev/zero"),
        ("Qwen/Qwen3-0.6B@main", "not a hub id"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_names_that_cannot_be_paths(
    name: str, part: str, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_hub(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises((ModelError, NotFound)) as error:
        hub.model_folder(name, weights=weights)
    one_line(error, part)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED_WEIGHTS", tmp_path)
    with pytest.raises(NotFound) as error:
        hub.model_folder("embedded:teacher")
    one_line(error, "not installed", "make_embedded")
    folder = write_model(tmp_path / "teacher")
    assert hub.model_folder("embedded:teacher") == folder


@pytest.mark.parametrize("weights", [True, False])
def test_hub_id_asks_for_its_revision_and_only_the_files_needed(
    weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "snapshot")
    asked = play_hub(monkeypatch, folder)
    assert hub.model_folder("org/name", revision="abc", weights=weights) == folder
    assert (asked["name"], asked["revision"]) == ("org/name", "abc")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and {"*.json", "*.jinja"} <= set(patterns)
    assert ("model*.safetensors" in patterns) == weights
    assert asked["ignore_patterns"] == ["*/*"]


@pytest.mark.parametrize(
    ("kind", "raised", "part"),
    [
        ("GatedRepoError", ModelError, "gated; accept its terms"),
        ("RepositoryNotFoundError", NotFound, "no such repository, or it is private"),
        ("RevisionNotFoundError", NotFound, "no revision 'v9'"),
        ("LocalEntryNotFoundError", NotFound, "hub is not reachable"),
        ("IncompleteSnapshotError", NotFound, "not all in the local cache"),
        ("OfflineModeIsEnabled", ModelError, "download failed"),
        ("HfHubHTTPError", ModelError, "download failed"),
    ],
)
def test_hub_failures(
    kind: str, raised: type[Exception], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_hub(monkeypatch, hub_error(kind))
    with pytest.raises(raised) as error:
        hub.model_folder("org/name", revision="v9")
    one_line(error, "org/name", part)


def test_offline_fails_at_once_with_the_real_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFound) as error:
        hub.model_folder("org/name")
    one_line(error, "hub is not reachable (or HF_HUB_OFFLINE is set)")


@pytest.mark.parametrize("proxies", [{}, {"https": "http://proxy.invalid"}])
def test_where_the_hubs_name_is_unknown_its_client_is_offline_unless_a_proxy_knows_it(
    proxies: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("mlx_distill.models.reach.socket.getaddrinfo", unknown)
    monkeypatch.setattr("mlx_distill.models.reach.getproxies", lambda: proxies)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    seen = []

    def download(*_: object, **__: object) -> str:
        seen.append(constants.is_offline_mode())
        return str(write_model(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.model_folder("org/name") == tmp_path / "snapshot"
    assert seen == [not proxies] and not constants.is_offline_mode()


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"x")
    with pytest.raises(ModelError) as error:
        hub.model_folder(str(file))
    one_line(error, ".bin file is not a model")


def test_gguf_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    calls: list[Path] = []

    def convert(path: Path, folder: Path) -> None:
        calls.append(path)
        write_model(folder)

    monkeypatch.setattr("mlx_distill.models.gguf.convert.convert", convert)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"one")
    first = hub.model_folder(str(file))
    assert first == hub.model_folder(str(file)) and calls == [file]
    assert first.is_relative_to(tmp_path / "cache") and first.name.startswith("tiny-")
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hub.model_folder(str(file)) != first and calls == [file, file]


def test_load_tokenizer(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    assert hub.load_tokenizer(folder).get_vocab() == {"a": 0, "b": 1}


def test_load_tokenizer_errors_are_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError) as error:
        hub.load_tokenizer(folder)
    one_line(error, str(folder), "cannot be read")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError) as error:
        hub.load_tokenizer(folder)
    one_line(error, "no tokenizer.json")


@pytest.mark.parametrize("whole_hash_bytes", [hub.WHOLE_HASH_BYTES, 0])
def test_fingerprint_follows_config_and_weights_only(
    whole_hash_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "WHOLE_HASH_BYTES", whole_hash_bytes)
    one, two, other = (
        write_model(tmp_path / "1"),
        write_model(tmp_path / "2"),
        write_model(tmp_path / "3", scale=2.0),
    )
    fingerprint = hub.model_fingerprint(one)
    assert hub.model_fingerprint(two) == fingerprint != hub.model_fingerprint(other)
    (two / "tokenizer_config.json").write_text("{}")
    assert hub.model_fingerprint(two) == fingerprint
    (two / "config.json").write_text("{}")
    assert hub.model_fingerprint(two) != fingerprint
