"""The tokenizer of a model folder: the one whose ids `tokenizer.json` gives.

In: a folder. Out: a fast tokenizer of transformers. Decided here: `tokenizer.json` is the truth.
transformers 5 rebuilds the tokenizers of several classes (GPT2Tokenizer, LlamaTokenizer) from
vocabulary and merges and drops the file's own pre-tokenizer, so its ids are compared with the
file's on a text of all kinds, and the file's are taken.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ModelError
from mlx_distill.files import of_people, one_line, sha256_of
from mlx_distill.readers import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
OTHER_TEMPLATES = "additional_chat_templates"  # where transformers keeps the named ones
FILE_CLASS = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it is
PROBES = (
    "In 2024, 1,234,567 of 89 x 3.14 = 10^6; 70 % and 1 000.",
    " one  two   three    four\tfive \u00a0six ",
    "first\nsecond\n\nthird\n\n\n 5\r\n\t7\n",
    "Café naïve cafe\u0301 Straße Ångström ¿qué? İstanbul ½ x² ﬁ",
    "漢字 かな カナ 한국어 中文，标点。 Привет العربية १२३ עברית ไทย",
    "🙂 👩‍👩‍👧 🇩🇪 ∑ ≤ → − “quoted” … it's I'LL we'd",
    "def f(x):\n    return x**2 + 1  # done\nif (a != b && c[0]) { d(); }",
    "<think>\nSo 12+30=42.\n</think>\n\nThe answer is $\\boxed{\\frac34}$. #### 42",
)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local model folder, without network and without running code from the
    folder. The same object as long as the files stay the same, so nobody may change it.

    Raises `ModelError` where the folder has no tokenizer that `transformers` reads as a fast (Rust)
    one, or none that gives the ids of its `tokenizer.json`.
    """
    return _loaded(folder, _content(folder))


def copy_named_templates(folder: Path, target: Path) -> None:
    """The chat templates that have names, into another model folder."""
    if templates := of_people(folder / OTHER_TEMPLATES, "*.jinja"):
        (target / OTHER_TEMPLATES).mkdir(exist_ok=True)
        for file in templates:
            shutil.copyfile(file, target / OTHER_TEMPLATES / file.name)


def _content(folder: Path) -> tuple[tuple[Path, str], ...]:
    """The files that a tokenizer is read from, with their digests: 11 ms for a vocabulary of
    150,000, where reading the tokenizer takes a second.
    """
    patterns = (*TOKENIZER_FILES, f"{OTHER_TEMPLATES}/*.jinja")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return tuple((file, _digest(file)) for file in files)


def _digest(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError:  # a folder, or a file that transformers will complain about if it needs it
        return ""


@lru_cache(maxsize=4)
def _loaded(folder: Path, content: tuple[tuple[Path, str], ...]) -> "PreTrainedTokenizerFast":
    others = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).is_file() for name in others):
        raise ModelError(
            f"tokenizer in {folder}: there is no tokenizer.json; copy it from the model it "
            "belongs to"
        )
    tokenizer = _opened(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer in {folder}: only a slow one was found; it needs tokenizer.json"
        )
    if not (folder / "tokenizer.json").is_file():
        return tokenizer
    if _first_difference(tokenizer, folder) is None:
        return tokenizer
    kept = _opened(folder, as_file=True)
    text = _first_difference(kept, folder)
    if text is not None:
        raise ModelError(
            f"tokenizer in {folder}: transformers gives other ids than tokenizer.json for "
            f"{text[:60]!r}, as {type(tokenizer).__name__} and as {FILE_CLASS}; take the files of "
            "the model that it belongs to"
        )
    if kept.get_vocab() != tokenizer.get_vocab():
        token = min(
            kept.get_vocab().items() ^ tokenizer.get_vocab().items(), key=lambda item: item[1]
        )[0]
        raise ModelError(
            f"tokenizer in {folder}: {type(tokenizer).__name__} gives other ids than "
            f"tokenizer.json, and tokenizer_config.json tells of another id of {token!r}; take the "
            "files of the model that it belongs to"
        )
    return kept


def make_open_as_file(folder: Path) -> None:
    """Let `AutoTokenizer` give the ids of `tokenizer.json`: name the class in
    `tokenizer_config.json` that takes it as it is, where the class named there does not.
    """
    config = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not config.is_file():
        return
    if _first_difference(_opened(folder), folder) is not None:
        document = read_json(config, error=ModelError) | {"tokenizer_class": FILE_CLASS}
        config.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")


def _opened(folder: Path, as_file: bool = False) -> Any:
    """The tokenizer as its class in tokenizer_config.json makes it, or with the file's own parts."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if as_file else AutoTokenizer
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _without_companions(folder) as place:
            return kind.from_pretrained(str(place), **options)
    except (
        Exception
    ) as error:  # a broken tokenizer.json surfaces as a bare Exception of the Rust library
        raise _unreadable(folder, error) from error


@contextmanager
def _without_companions(folder: Path) -> Iterator[Path]:
    """The folder; where a system put files between its templates, which transformers would take for
    templates, one of links to all others.
    """
    templates = folder / OTHER_TEMPLATES
    if not templates.is_dir() or len(of_people(templates)) == len(list(templates.iterdir())):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-distill-tokenizer-") as place:
        there = Path(place)
        (there / OTHER_TEMPLATES).mkdir()
        files = [file for file in of_people(folder) if file != templates]
        for file in (*files, *of_people(templates)):
            (there / file.relative_to(folder)).symlink_to(file.absolute())
        yield there


def _file(folder: Path) -> "Tokenizer":
    """What `tokenizer.json` says, by the library that defines it, without cutting or filling texts."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # as above
        raise _unreadable(folder, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _unreadable(folder: Path, error: Exception) -> ModelError:
    has_file = (folder / "tokenizer.json").is_file()
    remedy = (
        "take the files of the model that it belongs to" if has_file else "it needs tokenizer.json"
    )
    return ModelError(f"tokenizer in {folder}: cannot be read ({one_line(error)}); {remedy}")


def _first_difference(tokenizer: Any, folder: Path) -> str | None:
    """The first text to which a tokenizer gives other ids than the file does: the probes, then each
    added token.

    Tokens that tokenizer_config.json adds to the file's are no difference.
    """
    truth = _file(folder)
    known = {token.content for token in truth.get_added_tokens_decoder().values()}
    truth.add_tokens(
        [
            token
            for _, token in sorted(tokenizer.added_tokens_decoder.items())
            if token.content not in known
        ]
    )
    ids = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    for text in (*PROBES, *_between(truth)):
        if ids(text) != truth.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _between(truth: "Tokenizer") -> list[str]:
    """The file's added tokens, some at a time, each with text around it."""
    tokens = [token.content for token in truth.get_added_tokens_decoder().values()]
    return [
        "a " + " 1\n".join(tokens[start : start + 32]) + " b" for start in range(0, len(tokens), 32)
    ]
