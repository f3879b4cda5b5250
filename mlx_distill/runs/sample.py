"""A run's `sample.json`: one training example, token by token, for whoever looks at the run later."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import RootModel

from mlx_distill.data.counts import token_runs
from mlx_distill.data.prepare import Prepared
from mlx_distill.recipe.recipe import Recipe
from mlx_distill.runs.record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SampleToken(Record):
    """kept: whether the cut leaves it in; supervised: whether it carries loss."""

    text: str
    segment: Literal["prompt", "cot", "answer"]
    kept: bool
    supervised: bool


class Sample(RootModel[list[SampleToken]]):
    """The tokens of one example, in order."""

    FILE: ClassVar[str] = "sample.json"
    SEALED: ClassVar[bool] = False

    root: list[SampleToken] = []

    def content(self) -> list[dict]:
        return self.model_dump()


def make_sample(
    prepared: Prepared, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", example: int = 0
) -> Sample:
    """A training example as a run learns it."""
    return Sample(
        [
            SampleToken.model_validate(
                {
                    "text": tokenizer.decode([int(token)], skip_special_tokens=False),
                    "segment": run.segment.name.lower(),
                    "kept": run.kept,
                    "supervised": bool(learned),
                }
            )
            for run in token_runs(prepared.train_whole[example], recipe)
            for token, learned in zip(run.tokens, run.learned, strict=True)
        ]
    )
