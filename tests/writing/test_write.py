"""Writing: what is asked, what is kept through kills and damage, what is learned, what it weighs."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.backends.draws import draws_of
from mlx_distill.data.examples import make_example
from mlx_distill.data.sequences import stop_ids
from mlx_distill.errors import RunError
from mlx_distill.recipe.tables import RolloutsTable
from mlx_distill.runs.manifest import Written
from mlx_distill.words import percent
from mlx_distill.writing.folder import held_texts, text_folder
from mlx_distill.writing.texts import Asked, Text, TextFile, account, describe
from mlx_distill.writing.write import Writing, chosen_examples, pass_rate_weights

EXAMPLES = [
    make_example(f"{'long ' * (n % 3)}question {n}?", "c", str(n), solved=False) for n in range(7)
]


class Killed(BaseException):
    """As SIGKILL would: nothing of ours catches it."""


class Writer:
    """A model whose every text is a function of prompt and sample; it dies after some batches."""

    def __init__(self, tokenizer, batches: int = 1000):
        self.tokenizer, self.left, self.asked = tokenizer, batches, 0

    def generate(self, prompts, sampling) -> Iterator[tuple[int, list[int]]]:
        if not self.left:
            raise Killed
        self.left -= 1
        for place in reversed(range(len(prompts))):
            self.asked += 1
            prompt, sample = list(prompts[place]), sampling.samples[place]
            number = self.tokenizer.decode(prompt).split("question ")[1].split("?")[0]
            said = number if (int(number) + sample) % 2 else "wrong"
            text = f"so {sample}.</think>\n\n{said}<|im_end|>"
            if int(number) == 3:
                text = "I never stop"
            yield place, self.tokenizer(text, add_special_tokens=False)["input_ids"]


def no_progress(what: str, total: int):
    return lambda done: None


@pytest.fixture
def writing(bytes_tokenizer):
    def made(**table) -> Writing:
        tokenizer = bytes_tokenizer("qwen2_5", think_tokens=False)
        settings = RolloutsTable(**{"by": "teacher", "samples": 2, "batch_size": 4} | table)
        return Writing(EXAMPLES, tokenizer, settings, 1, stop_ids(tokenizer))

    return made


def all_texts(writing: Writing, path: Path, writer: Writer, say=lambda line: None):
    return writing.texts(TextFile(path, say), writing.asked(), lambda: writer, no_progress)


def test_every_example_is_asked_samples_times(writing, tmp_path):
    one = writing()
    texts = all_texts(one, tmp_path / "t", Writer(one.tokenizer))
    assert [text.asked for text in texts] == one.asked()
    assert one.asked() == [Asked(example.id, n) for example in EXAMPLES for n in (0, 1)]
    by_asked = {text.asked: text for text in texts}
    for number, example in enumerate(EXAMPLES):
        for sample in (0, 1):
            text = by_asked[example.id, sample]
            assert text.finished == (number != 3)
            assert text.right == (number != 3 and bool((number + sample) % 2))


def test_a_writing_that_was_killed_goes_on_and_ends_alike(writing, tmp_path):
    one = writing()
    whole = all_texts(one, tmp_path / "whole", Writer(one.tokenizer))
    for batches in range(4):
        with pytest.raises(Killed):
            all_texts(one, tmp_path / "cut", Writer(one.tokenizer, batches))
        said: list[str] = []
        writer = Writer(one.tokenizer)
        again = all_texts(one, tmp_path / "cut", writer, said.append)
        assert [text.tokens for text in again] == [text.tokens for text in whole]
        assert writer.asked == len(whole) - 4 * batches
        assert any(f"{4 * batches} of 14 texts are kept" in line for line in said) == (batches > 0)
        (tmp_path / "cut").unlink()


def test_each_step_of_each_seed_draws_numbers_of_its_own(writing, tmp_path):
    class Drawing(Writer):
        def generate(self, prompts, sampling):
            drawn.add(tuple(next(row) for row in draws_of(sampling, prompts)))
            yield from super().generate(prompts, sampling)

    drawn, one = set(), writing(samples=1, batch_size=len(EXAMPLES))
    for seed in range(4):
        one.seed = seed
        for step in range(4):
            file = TextFile(tmp_path / f"{seed}-{step}", print)
            one.texts(file, one.asked(), lambda: Drawing(one.tokenizer), no_progress, step)
    assert len(drawn) == 16


def test_torn_and_changed_lines_are_written_again(writing, tmp_path):
    one, path = writing(), tmp_path / "t"
    whole = all_texts(one, path, Writer(one.tokenizer))
    lines = path.read_bytes().splitlines(keepends=True)
    damages = (
        b"".join(lines)[:-9],
        b"".join([lines[0].replace(b'"finished": true', b'"finished": false'), *lines[1:]]),
        b"".join([*lines[:5], b"{}\n", b"[1]\n", b"\xff\n", *lines[6:]]),
        b"",
    )
    for damaged in damages:
        path.write_bytes(damaged)
        said: list[str] = []
        again = all_texts(one, path, Writer(one.tokenizer), said.append)
        assert [text.tokens for text in again] == [text.tokens for text in whole]
        assert bool(said) == bool(damaged)
        assert not any("damaged" in line for line in _read_again(one, path))


def _read_again(one: Writing, path: Path) -> list[str]:
    said: list[str] = []
    writer = Writer(one.tokenizer)
    all_texts(one, path, writer, said.append)
    assert not writer.asked
    return said


def test_what_is_learned(writing, tmp_path):
    one = writing(keep="right")
    texts = all_texts(one, tmp_path / "t", Writer(one.tokenizer))
    learned = one.sequences(texts)
    assert set(learned) == {example.id for example in EXAMPLES}
    for number, example in enumerate(EXAMPLES):
        names = [sequence.id for sequence in learned[example.id]]
        right = [sample for sample in (0, 1) if number != 3 and (number + sample) % 2]
        assert names == [f"{example.id}-teacher-0-{sample}" for sample in right]
    everything = writing().sequences(texts)[EXAMPLES[3].id]
    assert [sequence.cot_end for sequence in everything] == [len(one_) for one_ in everything]
    found = account(texts, "teacher")
    assert (found.texts, found.finished, found.judged, found.right) == (14, 12, 14, 6)


def test_an_example_without_an_answer_is_not_judged(bytes_tokenizer, tmp_path):
    tokenizer = bytes_tokenizer("qwen2_5")
    asked = [make_example("question 1?", "", "", solved=False)]
    one = Writing(asked, tokenizer, RolloutsTable(by="student"), 1, stop_ids(tokenizer))
    (text,) = all_texts(one, tmp_path / "t", Writer(tokenizer))
    assert text.right is None and text.finished
    assert account([text], "student").judged == 0


def test_the_share_of_right_texts_says_of_how_many():
    said = [
        describe(Written(by="teacher", texts=8, finished=8, judged=judged, right=2))
        for judged in (8, 4, 0)
    ]
    assert f"{percent(0.25)} right," in said[0] and "right" not in said[2]
    assert f"{percent(0.5)} right of 4 to prompts whose answer is known" in said[1]


def test_weights_are_p_times_one_minus_p(writing, tmp_path):
    one = writing(samples=4, weigh="pass_rate", keep="all")
    texts = all_texts(one, tmp_path / "t", Writer(one.tokenizer))
    weights = pass_rate_weights(texts)
    assert weights[EXAMPLES[3].id] == 0.0  # never right
    others = {weight for name, weight in weights.items() if name != EXAMPLES[3].id}
    assert len(others) == 1  # all are right half of the time
    learned = one.sequences(texts)
    assert not learned[EXAMPLES[3].id]
    mean = sum(weights[text.example] for text in texts) / len(texts)
    assert mean == pytest.approx(1.0)
    assert set(pass_rate_weights([t for t in texts if t.example == EXAMPLES[3].id]).values()) == {1}


def test_a_problem_without_an_answer_weighs_as_one_of_the_mean():
    def text(example, sample, right):
        return Text(
            example=example.id,
            sample=sample,
            step=0,
            tokens=[5],
            finished=True,
            right=right,
            seconds=0.0,
        )

    judged = [text(EXAMPLES[0], n, n == 0) for n in range(2)]
    unjudged = text(EXAMPLES[1], 0, None)
    weights = pass_rate_weights([*judged, unjudged])
    assert weights == {EXAMPLES[0].id: pytest.approx(1.0)}
    assert pass_rate_weights([unjudged]) == {}


def test_the_share_is_a_function_of_seed_and_id():
    many = [make_example(f"q{n}", "c", "a") for n in range(2000)]
    half = chosen_examples(many, 0.5, 1)
    assert 900 < len(half) < 1100
    assert chosen_examples(list(reversed(many)), 0.5, 1) == list(reversed(half))
    assert set(map(id, chosen_examples(many, 0.25, 1))) < set(map(id, half))
    assert chosen_examples(many, 0.5, 2) != half
    assert chosen_examples(many, 1.0, 1) == many


def test_a_folder_is_of_its_fields_alone(writing, tmp_path):
    one = writing()
    fields = one.fields({"fingerprint": "f"})
    others = [
        writing(temperature=0.5).fields({"fingerprint": "f"}),
        writing(max_new_tokens=9).fields({"fingerprint": "f"}),
        one.fields({"fingerprint": "g"}),
    ]
    paths = {text_folder(tmp_path, found) for found in (fields, *others)}
    assert len(paths) == 4
    with held_texts(tmp_path, fields, lambda line: None) as file:
        one.texts(file, one.asked(), lambda: Writer(one.tokenizer), no_progress)
    manifest = text_folder(tmp_path, fields) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seed": 7}))
    with (
        pytest.raises(RunError, match=r"seed 1 asked, 7 found: .*name another rollouts\.folder"),
        held_texts(tmp_path, fields, lambda line: None),
    ):
        pass


def test_one_step_of_a_file_is_not_another(writing, tmp_path):
    one, path = writing(), tmp_path / "t"
    file = TextFile(path, lambda line: None)
    asked = one.asked()[:4]
    first = one.texts(file, asked, lambda: Writer(one.tokenizer), no_progress, step=0)
    writer = Writer(one.tokenizer)
    later = one.texts(file, asked, lambda: writer, no_progress, step=10)
    assert writer.asked == 4 and [text.step for text in later] == [10] * 4
    assert one.texts(file, asked, lambda: writer, no_progress, step=0) == first
    np.testing.assert_array_equal(one.sequence(first[0]).tokens, one.sequence(later[0]).tokens)
    assert one.sequence(first[0]).id != one.sequence(later[0]).id
