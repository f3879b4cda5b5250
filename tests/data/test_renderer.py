"""Many examples rendered at once, and read again from disk, are what one by one they are."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.data import kept_renderings, renderer
from mlx_distill.data.examples import Example, Skip, make_example
from mlx_distill.data.kept_renderings import Rendered, rendering_key
from mlx_distill.data.renderer import rendered_all
from mlx_distill.data.sequences import TokenSequence, render

SYSTEM = (("system", "Be brief."),)
EXAMPLES = [
    *(
        make_example(f"{n}+3?", f"{n}+3 is {n + 3}. Über ½ 漢字 " * (n % 5 + 1), str(n + 3))
        for n in range(9)
    ),
    make_example("with a system turn?", "yes", "yes", SYSTEM),
    make_example("a control text <|im_end|>?", "no", "no"),
    make_example("only asked", "", "", solved=False),
    make_example("closing </think> in the answer", "so", "it says </think>"),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kept_renderings, "WORTH_KEEPING", 5)
    monkeypatch.setattr(renderer, "AT_ONCE", 4)
    return tmp_path / "mlx-distill" / "renderings"


def one_by_one(tokenizer, day: str = "") -> Iterator[tuple[Example, Rendered]]:
    for example in EXAMPLES:
        unused: Counter[str] = Counter()
        try:
            yield example, Rendered(render(example, tokenizer, day, unused), unused)
        except Skip as skip:
            yield example, Rendered(skip, unused)


def told(found: Iterator[tuple[Example, Rendered]]) -> list[tuple]:
    rows = []
    for example, (one, unused) in found:
        if isinstance(one, TokenSequence):
            assert one.tokens.dtype == np.int32 and one.allowed.all()
            ends = one.id, one.prompt_end, one.cot_end, one.closing, len(one.allowed)
            rows.append((example.id, one.tokens.tolist(), *ends, unused))
        else:
            rows.append((example.id, str(one), unused))
    return rows


@pytest.fixture(params=["qwen2_5", "deepseek_r1_distill", "qwen3_5", "tools"])
def tokenizer(request, bytes_tokenizer):
    return bytes_tokenizer(request.param)


def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments):
        raise AssertionError("rendered again")

    monkeypatch.setattr(renderer, "assemble", refused)


def test_together_and_from_disk_they_are_what_they_are_alone(tokenizer, monkeypatch, home):
    wanted = told(one_by_one(tokenizer))
    assert any(isinstance(row[1], str) for row in wanted)  # some cannot be rendered
    assert told(rendered_all(EXAMPLES, tokenizer, "")) == wanted
    assert len(list(home.glob("*/part-*"))) == 1
    no_rendering(monkeypatch)
    for kept in home.glob("*"):
        os.utime(kept, (0, 0))
    assert told(rendered_all(EXAMPLES, tokenizer, "")) == wanted
    assert all(kept.stat().st_mtime > 0 for kept in home.glob("*"))  # used, hence kept on
    assert told(rendered_all(EXAMPLES[::-1], tokenizer, "")) == wanted[::-1]


def test_what_is_new_joins_what_is_kept(bytes_tokenizer, monkeypatch, home):
    tokenizer = bytes_tokenizer("qwen2_5")
    list(rendered_all(EXAMPLES[:6], tokenizer, ""))
    list(rendered_all(EXAMPLES, tokenizer, ""))
    assert len(list(home.glob("*/part-*"))) == 2
    no_rendering(monkeypatch)
    assert told(rendered_all(EXAMPLES, tokenizer, "")) == told(one_by_one(tokenizer))


def test_few_examples_are_not_kept_and_no_more_are_rendered_than_a_group(bytes_tokenizer, home):
    tokenizer = bytes_tokenizer("qwen2_5")
    list(rendered_all(EXAMPLES[:4], tokenizer, ""))
    begun = rendered_all(EXAMPLES, tokenizer, "")
    next(begun)
    begun.close()
    assert not home.exists()


@pytest.mark.parametrize("what", ["day", "template", "token"])
def test_a_key_is_of_all_that_a_rendering_depends_on(bytes_tokenizer, what):
    tokenizer = bytes_tokenizer("qwen2_5")
    before = rendering_key(tokenizer, "2026-01-01")
    assert before == rendering_key(bytes_tokenizer("qwen2_5"), "2026-01-01")
    if what == "template":
        tokenizer.chat_template += " "
    if what == "token":
        tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert rendering_key(tokenizer, "2026-01-02" if what == "day" else "2026-01-01") != before


@pytest.mark.parametrize("file", [kept_renderings.TOKENS, kept_renderings.ROWS])
@pytest.mark.parametrize("torn", [True, False])
def test_a_damaged_part_is_made_again(bytes_tokenizer, monkeypatch, home, file, torn):
    tokenizer = bytes_tokenizer("qwen2_5")
    wanted = told(rendered_all(EXAMPLES, tokenizer, ""))
    (path,) = home.glob(f"*/part-*/{file}")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content[: len(content) // 2] if torn else content)
    assert told(rendered_all(EXAMPLES, tokenizer, "")) == wanted
    no_rendering(monkeypatch)
    assert told(rendered_all(EXAMPLES, tokenizer, "")) == wanted
