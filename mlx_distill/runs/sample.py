"""A run's `sample.json`: one training example, token by token, for whoever looks at the run later."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

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


class Sample(Record):
    """The tokens of one example, in order; the file is a list of them."""

    FILE: ClassVar[str] = "sample.json"

    tokens: list[SampleToken] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, content: Any) -> Any:
        return {"tokens": content} if isinstance(content, list) else content

    def content(self) -> list[dict[str, Any]]:
        return [token.content() for token in self.tokens]


def make_sample(
    prepared: Prepared, recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", example: int = 0
) -> Sample:
    """A training example as a run learns it."""
    return Sample(
        tokens=[
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
