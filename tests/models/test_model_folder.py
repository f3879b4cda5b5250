"""Which files are a model: exactly those that its index names, whole, finite, and on both backends
the same.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import left_by_a_mac, llama_config, random_weights

from mlx_distill.backends.mlx import loading as mlx_loading
from mlx_distill.backends.torch import loading as torch_loading
from mlx_distill.errors import ModelError
from mlx_distill.models.hub import model_fingerprint, model_folder
from mlx_distill.models.weights import read_weights

CONFIG = llama_config(width=16, vocabulary=40)
TENSORS = random_weights(CONFIG, seed=0)
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
TOKENS = [[1, 2, 3]]


def write_index(folder: Path, places: dict[str, str], **more) -> None:
    document = {"metadata": {"total_size": 1}, "weight_map": places} | more
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def single(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(TENSORS, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def places() -> dict[str, str]:
    return {key: SHARDS[number % 3] for number, key in enumerate(TENSORS)}


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for shard in SHARDS:
        held = {key: TENSORS[key] for key, place in places().items() if place == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    write_index(folder, places())
    return folder


def mlx_logits(folder: Path) -> np.ndarray:
    return np.array(mlx_loading.load_teacher(folder, "m", 0).model(mx.array(TOKENS)))


def torch_logits(folder: Path) -> np.ndarray:
    split = torch_loading.load_teacher(folder, "m", 0, torch.device("cpu"), None)
    with torch.no_grad():
        return split.model(torch.tensor(TOKENS)).logits.numpy()


LOADERS = [mlx_logits, torch_logits]
both = pytest.mark.parametrize("load", LOADERS, ids=["mlx", "torch"])


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> np.ndarray:
    return torch_logits(single(tmp_path_factory.mktemp("truth")))


# folders as people have them


def test_what_a_mac_leaves_in_a_folder_harms_nothing(tmp_path: Path, truth: np.ndarray):
    folder = sharded(tmp_path / "model")
    before = model_fingerprint(folder)
    left_by_a_mac(folder)
    assert len(list(folder.glob("._*"))) == 5
    assert model_fingerprint(model_folder(str(folder))) == before
    for load in LOADERS:
        np.testing.assert_allclose(load(folder), truth, atol=1e-5)


def test_a_companion_of_a_mac_is_no_model(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    left_by_a_mac(tmp_path)
    with pytest.raises(ModelError, match=r"name the file in it: .*/a\.gguf"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=r"weights found: a\.gguf"):
        model_folder(str(tmp_path))


def hub_snapshot(folder: Path) -> Path:
    """As huggingface_hub keeps it: links from a snapshot to blobs named by their digests."""
    repository = folder / "models--org--name"
    snapshot, blobs = sharded(repository / "snapshots" / "0a1b"), repository / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        blob = file.rename(blobs / f"digest-of-{file.name}")
        file.symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def beside_others(folder: Path) -> Path:
    """With what downloads and trainers leave: other formats, other folders, a left-over adapter
    config.
    """
    single(folder)
    for name in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
    ):
        (folder / name).write_bytes(b"not ours to read")
    for name in ("original", "adapters", "onnx"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"nor this")
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/other", "peft_type": "LORA"})
    )
    (folder / "generation_config.json").write_text("[]")
    return folder


def index_of_one(folder: Path) -> Path:
    """mlx-lm writes an index for a single file, too."""
    write_index(single(folder), dict.fromkeys(TENSORS, "model.safetensors"))
    return folder


def without_index(folder: Path) -> Path:
    (sharded(folder) / "model.safetensors.index.json").unlink()
    return folder


def counted_from_zero(folder: Path) -> Path:
    without_index(folder)
    for number, shard in enumerate(SHARDS):
        (folder / shard).rename(folder / f"model-{number:05}-of-00003.safetensors")
    return folder


def linked_folder(folder: Path) -> Path:
    single(folder / "real")
    (folder / "link").symlink_to(folder / "real")
    return folder / "link"


def in_brackets(folder: Path) -> Path:
    """A name that is a pattern to mlx-lm's glob."""
    return single(folder / "model [4bit]")


def index_without_metadata(folder: Path) -> Path:
    write_index(sharded(folder), places(), metadata=None)
    return folder


GOOD = [
    single,
    sharded,
    hub_snapshot,
    beside_others,
    index_of_one,
    without_index,
    counted_from_zero,
    linked_folder,
    in_brackets,
    index_without_metadata,
]


@both
@pytest.mark.parametrize("make", GOOD)
def test_good_folders_are_one_model(make: Callable[[Path], Path], load, truth, tmp_path: Path):
    folder = make(tmp_path / "m")
    assert model_folder(str(folder)) == folder
    np.testing.assert_allclose(load(folder), truth, atol=1e-5)


def test_fingerprints_are_those_of_before(tmp_path: Path):
    """The digests that the version before this one wrote for these folders: caches and runs depend
    on them.
    """
    assert model_fingerprint(single(tmp_path / "1")) == model_fingerprint(
        beside_others(tmp_path / "2")
    )
    expected = (
        hashlib_of(single(tmp_path / "1"), ["model.safetensors"]),
        hashlib_of(sharded(tmp_path / "3"), SHARDS),
    )
    assert (model_fingerprint(tmp_path / "1"), model_fingerprint(tmp_path / "3")) == expected


def hashlib_of(folder: Path, names: list[str]) -> str:
    import hashlib

    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in names:
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


# what is refused


def outside(folder: Path) -> None:
    (folder / SHARDS[1]).rename(folder.parent / "secret.safetensors")
    write_index(
        folder,
        places()
        | {key: "../secret.safetensors" for key, place in places().items() if place == SHARDS[1]},
    )


def absolute(folder: Path) -> None:
    write_index(folder, places() | {"model.norm.weight": str(folder / SHARDS[0])})


def link_outside(folder: Path) -> None:
    (folder / SHARDS[1]).rename(folder.parent / "secret.safetensors")
    (folder / SHARDS[1]).symlink_to("../secret.safetensors")


def link_to_nothing(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("nothing")


def left_over_single(folder: Path) -> None:
    save_file({key: value * 0 for key, value in TENSORS.items()}, folder / "model.safetensors")


def left_over_shards(folder: Path) -> None:
    left_over_single(folder)
    write_index(folder, dict.fromkeys(TENSORS, "model.safetensors"))


def left_over_without_index(folder: Path) -> None:
    left_over_single(folder)
    (folder / "model.safetensors.index.json").unlink()


def two_counts(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    for number in (1, 2):
        shutil.copy(folder / SHARDS[0], folder / f"model-{number:05}-of-00002.safetensors")


def shard_missing(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def shard_missing_without_index(folder: Path) -> None:
    shard_missing(folder)
    (folder / "model.safetensors.index.json").unlink()


def empty(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes(b"")


def cut_short(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes()[:-4])


def header_beyond_the_file(folder: Path) -> None:
    content = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes((2**40).to_bytes(8, "little") + content[8:])


def garbage(folder: Path) -> None:
    (folder / SHARDS[1]).write_bytes(b"<html>not found</html>")


def tensor_twice(folder: Path) -> None:
    second = load_file(folder / SHARDS[1])
    save_file(
        second | {"model.embed_tokens.weight": TENSORS["model.embed_tokens.weight"]},
        folder / SHARDS[1],
    )


def tensor_elsewhere(folder: Path) -> None:
    write_index(folder, places() | {"model.embed_tokens.weight": SHARDS[1]})


def tensor_missing(folder: Path) -> None:
    write_index(folder, places() | {"model.more.weight": SHARDS[1]})


def not_finite(folder: Path, value: float = np.nan) -> None:
    second = load_file(folder / SHARDS[1])
    key = min(second)
    second[key].flat[-1] = value
    save_file(second, folder / SHARDS[1], metadata={"format": "pt"})


def infinite(folder: Path) -> None:
    not_finite(folder, -np.inf)


def integers(folder: Path) -> None:
    second = {key: value.view(np.int32) for key, value in load_file(folder / SHARDS[1]).items()}
    save_file(second, folder / SHARDS[1], metadata={"format": "pt"})


def index_of_text(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("weights")


def index_of_nothing(folder: Path) -> None:
    write_index(folder, {})


def config_of(value: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "config.json").write_text(value)

    return spoil


def configured(**fields) -> Callable[[Path], None]:
    return config_of(json.dumps(CONFIG | fields))


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def adapter_alone(folder: Path) -> None:
    adapter_beside(folder)
    for shard in [*SHARDS, "model.safetensors.index.json"]:
        (folder / shard).unlink()


BAD = {
    "outside": (outside, r"index\.json names '\.\./secret\.safetensors', which lies not beside it"),
    "absolute": (absolute, r"which lies not beside it"),
    "link outside": (
        link_outside,
        r"00002-of-00003\.safetensors is a link out of the folder, to .*secret",
    ),
    "link to nothing": (link_to_nothing, r"00002-of-00003\.safetensors is not a file"),
    "left-over single": (
        left_over_single,
        r"names .*00001-of-00003.*00003-of-00003.*beside it lies model\.safetensors",
    ),
    "left-over shards": (
        left_over_shards,
        r"names model\.safetensors, and beside it lies .*00001-of-00003",
    ),
    "left-over, no index": (
        left_over_without_index,
        r"there is model\.safetensors, and beside it lies .*00001-of-00003",
    ),
    "two counts": (two_counts, r"there is .*00001-of-00002.*beside it lies .*00001-of-00003"),
    "shard missing": (shard_missing, r"00002-of-00003\.safetensors is missing"),
    "shard missing, no index": (
        shard_missing_without_index,
        r"00002-of-00003\.safetensors is missing",
    ),
    "empty": (
        empty,
        r"00002-of-00003\.safetensors is not a whole safetensors file \(it is empty\)",
    ),
    "cut short": (cut_short, r"00002-of-00003\.safetensors is not a whole safetensors file"),
    "header too long": (
        header_beyond_the_file,
        r"00002-of-00003\.safetensors is not a whole safetensors file",
    ),
    "garbage": (garbage, r"00002-of-00003\.safetensors is not a whole safetensors file"),
    "tensor twice": (tensor_twice, r"tensor model\.embed_tokens\.weight lies in two files"),
    "tensor elsewhere": (
        tensor_elsewhere,
        r"00002-of-00003\.safetensors lacks tensor model\.embed_tokens\.weight",
    ),
    "tensor missing": (
        tensor_missing,
        r"00002-of-00003\.safetensors lacks tensor model\.more\.weight",
    ),
    "index of text": (index_of_text, r"index\.json.*not valid JSON"),
    "index of nothing": (index_of_nothing, r"index\.json has no weight_map"),
    "config empty": (config_of(""), r"config\.json"),
    "config cut": (config_of('{"model_type": "lla'), r"config\.json"),
    "config a list": (config_of("[]"), r"config\.json is not a JSON object but list"),
    "config of no family": (config_of("{}"), r"config\.json has no model_type"),
    "config of another kind": (configured(model_type=3), r"config\.json has model_type 3"),
    "config names weights": (
        configured(transformers_weights="x.safetensors"),
        r"transformers_weights 'x\.safetensors'",
    ),
    "adapter beside": (
        adapter_beside,
        r"holds a model \(.*\) and an adapter \(adapter_model\.safetensors\)",
    ),
    "adapter alone": (
        adapter_alone,
        r"holds an adapter \(adapter_model\.safetensors\), not a model; fuse it",
    ),
}
BAD_WHEN_LOADED = {
    "NaN": (
        not_finite,
        r"tensor \S+ in \S+00002-of-00003\.safetensors holds values that are not finite",
    ),
    "infinite": (
        infinite,
        r"tensor \S+ in \S+00002-of-00003\.safetensors holds values that are not finite",
    ),
    "integers": (integers, r"tensor \S+ in \S+00002-of-00003\.safetensors is stored as I32"),
    "layers": (
        configured(num_hidden_layers=2**31),
        r"num_hidden_layers 2147483648, but its weights have 20 tensors",
    ),
    "width": (configured(hidden_size=2**40), r"hidden_size 1099511627776"),
    "family": (configured(model_type="no_such"), r"cannot load .*no_such"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_where_it_is_named(case: str, tmp_path: Path):
    spoil, expected = BAD[case]
    folder = sharded(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelError, match=expected) as caught:
        model_folder(str(folder))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(
        f"model {str(folder)!r}: "
    )


@both
@pytest.mark.parametrize("case", BAD | BAD_WHEN_LOADED)
@pytest.mark.parametrize("part", ["teacher", "student"])
def test_and_by_both_backends(case: str, part: str, load, tmp_path: Path):
    spoil, expected = (BAD | BAD_WHEN_LOADED)[case]
    folder = sharded(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelError, match=expected) as caught:
        load(folder) if part == "teacher" else load_student(load, folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("m: ")
    assert "mlx-distill-model-" not in str(caught.value)  # the folder of links is nobody's business


def load_student(load, folder: Path) -> None:
    from mlx_distill.recipe.tables import StudentTable

    if load is mlx_logits:
        mlx_loading.load_student(folder, "m", StudentTable(), 0)
    else:
        torch_loading.load_student(
            folder, "m", StudentTable(), 0, torch.device("cpu"), torch.float32
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 3, 2**20 + 7])
def test_not_finite_is_seen_in_every_format(dtype: str, value: float, size: int, tmp_path: Path):
    """At the end of a tensor that is looked at in pieces; the largest finite numbers pass."""
    largest = torch.finfo(getattr(torch, dtype)).max
    numbers = torch.full((size,), largest, dtype=getattr(torch, dtype))
    numbers[::2] *= -1
    for last, finite in ((None, True), (value, False)):
        numbers[-1] = last if last is not None else numbers[-1]
        from safetensors.torch import save_file

        save_file({"model.norm.weight": numbers}, tmp_path / "model.safetensors")
        weights = read_weights(tmp_path, "m")
        assert finite == all(map(finite_of, weights.tensors.values()))


def finite_of(tensor) -> bool:
    from mlx_distill.models.weights import is_finite

    return is_finite(tensor)


# any byte may be wrong


def damaged(folder: Path, chance: random.Random) -> None:
    """One to five bytes flipped, cut out or put in, mostly where the header is."""
    file = chance.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    header = (
        int.from_bytes(content[:8], "little") + 8 if file.suffix == ".safetensors" else len(content)
    )
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(
            min(chance.choice((8, header, header, len(content))), len(content))
        )
        match chance.randrange(4):
            case 0:
                content[place] ^= 1 << chance.randrange(8)
            case 1:
                del content[place : place + chance.choice((1, 8, 100))]
            case 2:
                content[place:place] = chance.randbytes(chance.choice((1, 8)))
            case 3:
                content[place] = chance.choice(b'0123456789[]{}":,FIU')
        if not content:
            break
    file.write_bytes(content)


def test_damaged_folders_are_refused_or_are_what_their_bytes_say(tmp_path: Path):
    """200 of them; what is accepted gives safetensors' own numbers, by name."""
    chance, whole = random.Random(9), sharded(tmp_path / "whole")
    refused = 0
    for number in range(200):
        folder = shutil.copytree(whole, tmp_path / str(number))
        damaged(folder, chance)
        try:
            weights = read_weights(model_folder(str(folder)), "m")
        except ModelError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        expected = {key: value for file in weights.files for key, value in load_file(file).items()}
        assert expected.keys() == weights.tensors.keys() >= TENSORS.keys()
        for key, tensor in weights.tensors.items():
            content = tensor.file.read_bytes()[tensor.begin : tensor.end]
            assert content == expected[key].tobytes() and tensor.shape == expected[key].shape
    assert 100 < refused < 200
