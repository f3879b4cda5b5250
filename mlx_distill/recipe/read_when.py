"""Under which settings a field is read, for the fields that not every recipe reads.

In: a recipe. Out: a line for each field that it sets although nothing would read it. Decided here:
one condition a field, both as a predicate and as the words that refuse it and that stand in
`recipes/reference.toml`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_distill.recipe.defaults import FOLLOWS
from mlx_distill.recipe.values import FormerDefault

if TYPE_CHECKING:
    from mlx_distill.recipe.recipe import Recipe


@dataclass(frozen=True)
class Condition:
    """When a field is read; `words` complete "it is read only with …"."""

    holds: Callable[["Recipe"], bool]
    words: str


def choice(table: str, field: str, *values: str) -> Condition:
    """The condition that another field has one of these values."""
    named = [f'"{value}"' for value in values]
    listed = " or ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    return Condition(
        lambda recipe: getattr(getattr(recipe, table), field) in values, f"{field} = {listed}"
    )


ADAPTERS = choice("student", "tuning", "lora", "dora")
MOMENTA = choice("optim", "optimizer", "adamw", "lion", "schedule_free_adamw")

WRITTEN = choice("rollouts", "by", "teacher", "student")
DRAWN = Condition(
    lambda recipe: WRITTEN.holds(recipe) and recipe.rollouts.temperature > 0,
    f"{WRITTEN.words} and a temperature above 0",
)

SELECTS = Condition(lambda recipe: recipe.selection.share < 1, "a share below 1")

MATCHES = Condition(lambda recipe: recipe.objective.hidden_weight > 0, "a hidden_weight above 0")

READ_WHEN = {
    "teacher.quantize_bits": Condition(lambda recipe: bool(recipe.teacher.model), "a teacher"),
    "teacher.compute_dtype": Condition(lambda recipe: bool(recipe.teacher.model), "a teacher"),
    "teacher.cache_folder": choice("teacher", "cache", "top_k", "sampled", "hidden"),
    "teacher.cache_top_k": choice("teacher", "cache", "top_k"),
    "teacher.cache_samples": choice("teacher", "cache", "sampled"),
    "student.quantize_aware_bits": choice("student", "tuning", "full"),
    "student.quantize_bits": ADAPTERS,
    "student.rank": ADAPTERS,
    "student.alpha": ADAPTERS,
    "student.lora_layers": ADAPTERS,
    "student.lora_targets": ADAPTERS,
    "prune.layers_by": Condition(lambda recipe: recipe.prune.layers > 0, "prune.layers above 0"),
    "prune.until": Condition(lambda recipe: recipe.prune.rounds > 0, "prune.rounds above 0"),
    "prune.examples": Condition(
        lambda recipe: recipe.prune.measures, 'layers_by = "change", channels or kv_heads'
    ),
    "data.prompt_column": choice(
        "data", "format", "auto", "columns", "response", "alpaca", "gsm8k", "prompts"
    ),
    "data.cot_column": choice("data", "format", "auto", "columns"),
    "data.answer_column": choice("data", "format", "auto", "columns", "gsm8k", "prompts"),
    "data.response_column": choice("data", "format", "auto", "response", "alpaca"),
    "data.messages_column": choice("data", "format", "auto", "messages", "conversations"),
    "rollouts.share": WRITTEN,
    "rollouts.samples": WRITTEN,
    "rollouts.temperature": WRITTEN,
    "rollouts.top_p": DRAWN,
    "rollouts.max_new_tokens": WRITTEN,
    "rollouts.batch_size": WRITTEN,
    "rollouts.keep": WRITTEN,
    "rollouts.weigh": WRITTEN,
    "rollouts.refresh_every": choice("rollouts", "by", "student"),
    "rollouts.folder": WRITTEN,
    "selection.by": SELECTS,
    "selection.redraw": Condition(
        lambda recipe: SELECTS.holds(recipe) and recipe.selection.by == "random",
        f'{SELECTS.words} and by = "random"',
    ),
    "objective.jsd_beta": choice("objective", "divergence", "jsd"),
    "objective.skew_alpha": choice("objective", "divergence", "skew_kl", "skew_reverse_kl"),
    "objective.mixed_weight": choice("objective", "divergence", "mixed_kl"),
    "objective.entropy_half": choice("objective", "divergence", "entropy_kl"),
    "objective.tvd_scale": choice("objective", "divergence", "tvd"),
    "objective.dkd_target": choice("objective", "divergence", "dkd"),
    "objective.dkd_rest": choice("objective", "divergence", "dkd"),
    "batch.shuffle": Condition(
        lambda recipe: recipe.rollouts.refresh_every == 0, "rollouts.refresh_every = 0"
    ),
    "batch.sort_window": Condition(
        lambda recipe: recipe.rollouts.refresh_every == 0, "rollouts.refresh_every = 0"
    ),
    "objective.hidden_layers": MATCHES,
    "objective.hidden_distance": MATCHES,
    "optim.decayed": Condition(
        lambda recipe: recipe.optim.weight_decay > 0, "a weight_decay above 0"
    ),
    "optim.beta1": MOMENTA,
    "optim.beta2": MOMENTA,
    "optim.eps": choice("optim", "optimizer", "adamw", "schedule_free_adamw"),
    "optim.patience": Condition(
        lambda recipe: recipe.run.validate_every > 0, "a validate_every above 0"
    ),
    "eval.top_p": Condition(lambda recipe: recipe.eval.temperature > 0, "a temperature above 0"),
}


def is_read(recipe: "Recipe", path: str) -> bool:
    """Whether the recipe's other fields have `table.field` read."""
    return path not in READ_WHEN or READ_WHEN[path].holds(recipe)


def unread(recipe: "Recipe") -> Iterator[str]:
    """A line for each field that is set, to something else than a default, and not read."""
    for path, condition in READ_WHEN.items():
        table, field = path.split(".")
        part = getattr(recipe, table)
        info = type(part).model_fields[field]
        former = [mark.value for mark in info.metadata if isinstance(mark, FormerDefault)]
        followed = [FOLLOWS[path].value(recipe)] if path in FOLLOWS else []
        defaults = (info.default, *former, *followed)
        if getattr(part, field) not in defaults and not condition.holds(recipe):
            yield (
                f"[{table}] {field} is set but nothing reads it here: "
                f"it is read only with {condition.words}"
            )
