"""A recipe: every table and field on one page, loaded strictly.

In: a TOML file and `--set table.field=value` overrides. Out: a frozen `Recipe`. Decided here:
names, types, defaults and which combinations make no sense. Unknown fields are refused with the
nearest known name; no default is None. `recipes/reference.toml` documents every field and is tested
to equal these defaults.
"""

import datetime
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_distill import readers
from mlx_distill.errors import NotFound, RecipeError


@dataclass(frozen=True)
class Range:
    """The numbers that a field can hold; `or_zero` where 0 is not one of them but has a meaning of
    its own.
    """

    low: float
    high: float
    or_zero: bool = False

    def __call__(self, value: float) -> float:
        if self.low <= value <= self.high or (self.or_zero and value == 0):
            return value
        raise PydanticCustomError("range", str(self))

    def __str__(self) -> str:
        return f"{'0, or ' if self.or_zero else ''}from {_number(self.low)} to {_number(self.high)}"


def _number(value: float) -> str:
    return f"{value:g}" if 0 < value < 1e-3 else f"{value:,}"


def within(low: float, high: float, or_zero: bool = False) -> AfterValidator:
    return AfterValidator(Range(low, high, or_zero))


Segments = Literal["prompt", "cot", "answer"]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # TOML has lists, no tuples
# Every number has both ends, so that arithmetic in float32 and int32 stays what it says and no time
# is asked for that no one has.
Fraction = Annotated[float, within(1e-6, 1.0)]
Weight = Annotated[float, within(1e-6, 1.0, or_zero=True)]
Momentum = Annotated[
    float, within(1e-6, 0.999999, or_zero=True)
]  # float32 knows no number nearer to 1 that a sum of 1 - beta survives
Rows = Annotated[int, within(1, 10**9)]
Tokens = Annotated[int, within(1, 2**24)]
Cadence = Annotated[int, within(0, 10**9)]  # every so many steps; 0 = only at the end
Seed = Annotated[
    int, within(0, 2**63 - 1)
]  # TOML's integers end there, torch's and MLX's seeds soon after
LONGEST_NAME = 200  # bytes of a run's name; the files beside its folder have longer ones


def _day(value: Any) -> Any:
    """A day as text ("2026-11-26", or "" for none); TOML's own dates are days too."""
    text = value.isoformat() if type(value) is datetime.date else value
    try:
        known = text == "" or datetime.date.fromisoformat(text).isoformat() == text
    except (TypeError, ValueError):
        known = False
    if not known:
        raise PydanticCustomError("day", "Input should be a day like 2026-11-26")
    return text


Day = Annotated[str, BeforeValidator(_day)]
# where things are kept and what a run is shown beside
OUTSIDE_DIGEST = {
    "teacher": {"cache_folder"},
    "run": {"name", "folder"},
    "eval": {"compare", "score_teacher", "score_base"},
}
NEWER = (("data", "date"), ("objective", "skew_alpha"))


class Table(BaseModel):
    """A strict, frozen TOML table: unknown fields and lossy conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class TeacherTable(Table):
    # hub id, local folder, .gguf or embedded:NAME; "" = none (needs kd_weight = 0)
    model: str = "embedded:teacher"
    revision: str = "main"  # hub branch, tag or commit
    quantize_bits: Literal[0, 4, 6, 8] = 0  # quantise on load; 0 = as stored
    cache: Literal["off", "top_k", "sampled", "hidden"] = (
        "off"  # answers kept on disk: K a token, drawn ones, hidden states
    )
    cache_folder: str = "teacher-cache"  # may serve any number of runs, at once too
    cache_top_k: Annotated[int, within(1, 2**20)] = 64  # answers kept a token
    cache_samples: Annotated[int, within(1, 65_535)] = 50  # draws a token


class StudentTable(Table):
    model: str = "embedded:student"
    revision: str = "main"
    tuning: Literal["full", "lora", "dora"] = "full"
    rank: Annotated[int, within(1, 16_384)] = 8
    alpha: Annotated[float, within(1e-3, 1e6)] = 16.0
    lora_layers: Annotated[int, within(0, 10_000)] = 0  # adapt the last n blocks; 0 = all
    lora_targets: Names = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    gradient_checkpointing: bool = False
    compute_dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # auto: float32 on a CPU, bfloat16 on a GPU
    )
    save_dtype: Literal["base", "float32", "bfloat16"] = (
        "base"  # of the exported student; base = as the base model's
    )


class DataTable(Table):
    source: str = "embedded:dial"  # file, hub dataset id, or embedded:NAME
    config: str = ""  # hub dataset configuration
    split: str = "train"
    format: Literal["columns", "response", "alpaca", "messages", "conversations", "gsm8k"] = (
        "columns"
    )
    prompt_column: str = (
        ""  # text, or a list of messages; "" = the format's usual name, here and below
    )
    cot_column: str = ""  # columns
    answer_column: str = ""  # columns, gsm8k
    response_column: str = ""  # response, alpaca: <think>reasoning</think>answer
    messages_column: str = ""  # messages, conversations
    where: dict[str, str] = {}  # keep rows whose column equals the value
    train_examples: Annotated[int, within(0, 10**9)] = 0  # 0 = all
    validation_examples: Rows = 64  # held out of the same source before training rows are taken
    longest_tokens: Tokens = 4096  # longer rendered examples are dropped and counted
    # what prompts say of a chat template that reads the clock; "" = the day on which the run began
    date: Day = ""


class TruncationTable(Table):
    keep: Literal["prefix", "suffix", "middle", "cot"] = "prefix"  # cot = everything up to </think>
    span: Literal["sequence", "cot"] = "sequence"  # what fraction is a fraction of
    fraction: Fraction = 1.0  # Lead-Span Proportion of the paper
    max_tokens: Annotated[int, within(0, 2**24)] = (
        0  # cap on the window; prompt or context that is only read comes on top; 0 = none
    )
    context: Literal["drop", "keep"] = (
        "drop"  # tokens before the window: removed, or read without loss
    )
    token_share: Fraction = 1.0  # a seeded random share of the remaining tokens carries loss


class ObjectiveTable(Table):
    segments: Annotated[tuple[Segments, ...], Field(min_length=1, strict=False)] = ("cot",)
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"] = (
        "forward_kl"
    )
    jsd_beta: Annotated[float, within(1e-3, 0.999)] = 0.5
    skew_alpha: Annotated[float, within(1e-3, 0.999)] = 0.1
    kd_weight: Weight = 0.5  # 1 - kd_weight weighs cross-entropy
    temperature: Annotated[float, within(0.01, 100.0)] = 1.0
    temperature_scaling: Literal["none", "hinton"] = (
        "hinton"  # hinton multiplies the divergence by T^2
    )
    chunk_tokens: Annotated[int, within(0, 2**20)] = (
        0  # positions whose logits exist at once; 0 = what suits backend and device
    )


class BatchTable(Table):
    micro_batch_size: Annotated[int, within(1, 65_536)] = 4
    global_batch_size: Annotated[int, within(1, 2**20)] = 8
    pad_multiple: Annotated[int, within(1, 65_536)] = (
        32  # sequences are padded to a multiple, to keep shapes few
    )


class OptimTable(Table):
    optimizer: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: Annotated[float, within(1e-10, 1000.0)] = 1e-4
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    warmup_fraction: Annotated[float, within(1e-6, 0.999999, or_zero=True)] = 0.1
    weight_decay: Annotated[float, within(1e-8, 1000.0, or_zero=True)] = 0.0
    beta1: Momentum = 0.9
    beta2: Momentum = 0.999
    eps: Annotated[float, within(1e-20, 1.0)] = 1e-8
    max_grad_norm: Annotated[float, within(1e-6, 1e9, or_zero=True)] = 1.0  # 0 = no clipping
    epochs: Annotated[int, within(1, 10_000)] = 1
    steps: Annotated[int, within(0, 10**6)] = 0  # 0 = what epochs ask for


class EvalTable(Table):
    task: str = ""  # embedded:NAME, gsm8k:PATH or jsonl:PATH; "" = no scoring
    examples: Rows = 500
    max_new_tokens: Tokens = 512
    batch_size: Annotated[int, within(1, 65_536)] = 64
    temperature: Annotated[float, within(0.01, 100.0, or_zero=True)] = 0.0  # 0 = greedy
    top_p: Fraction = 1.0
    seed: Seed = 42  # draws the problems and the samples; the same ones whatever run.seed is
    samples: Annotated[int, within(1, 65_536)] = 1  # generations a problem; accuracy is their mean
    score_teacher: bool = True
    score_base: bool = True
    compare: Names = ()  # kept run folders that the report sets beside this run


class RunTable(Table):
    name: str = ""  # "" = the recipe file's name
    folder: str = "runs"
    seed: Seed = 42
    checkpoint_every: Cadence = 100  # steps; 0 = only at the end
    validate_every: Cadence = 100  # steps; 0 = only at the end
    keep_checkpoints: Literal["last_and_best", "last", "all"] = "last_and_best"
    export: Literal["best", "last"] = (
        "best"  # which checkpoint becomes the student; best = lowest validation loss
    )


class Recipe(Table):
    teacher: TeacherTable = TeacherTable()
    student: StudentTable = StudentTable()
    data: DataTable = DataTable()
    truncation: TruncationTable = TruncationTable()
    objective: ObjectiveTable = ObjectiveTable()
    batch: BatchTable = BatchTable()
    optim: OptimTable = OptimTable()
    eval: EvalTable = EvalTable()
    run: RunTable = RunTable()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "Recipe":
        for found, advice in _contradictions(self):
            if found:
                raise ValueError(advice)
        for table, used, fields in _conditional_fields(self):
            for field in fields if not used else ():
                part = getattr(self, table)
                if getattr(part, field) != type(part).model_fields[field].default:
                    raise ValueError(
                        f"[{table}] {field} is set but nothing reads it here: "
                        f"{_WHEN_READ[table, field]}"
                    )
        return self

    def digest(self) -> str:
        """16 hex digits over every field that shapes the result: all but where it is kept and what
        it is shown beside.
        """
        content = self.model_dump(mode="json", exclude=OUTSIDE_DIGEST)
        for (
            table,
            field,
        ) in NEWER:  # runs and checkpoints from before a field was there keep their digest
            if content[table][field] == Recipe.model_fields[table].default.model_dump()[field]:
                del content[table][field]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def toml(self) -> str:
        """The resolved recipe as TOML: every field, defaults included; loading it gives an equal
        recipe.
        """
        return tomli_w.dumps(self.model_dump(mode="json"))

    def differences(self, other: "Recipe") -> list[str]:
        """`table.field: ours → theirs`, for every field in the digest that differs."""
        ours, theirs = (
            recipe.model_dump(mode="json", exclude=OUTSIDE_DIGEST) for recipe in (self, other)
        )
        return [
            f"{table}.{field}: {value!r} → {theirs[table][field]!r}"
            for table, fields in ours.items()
            for field, value in fields.items()
            if value != theirs[table][field]
        ]


def _contradictions(recipe: Recipe) -> list[tuple[bool, str]]:
    teacher, objective, truncation = recipe.teacher, recipe.objective, recipe.truncation
    return [
        (
            not recipe.student.model,
            "[student] model is empty: name a hub id, a folder, a .gguf or embedded:student",
        ),
        *((True, wrong) for wrong in _wrong_paths(recipe)),
        (
            not recipe.data.source,
            "[data] source is empty: name a file, a hub dataset or embedded:dial",
        ),
        (
            not teacher.model and objective.kd_weight > 0,
            f"[teacher] model is empty but [objective] kd_weight is {objective.kd_weight}: name a "
            "teacher or set kd_weight = 0",
        ),
        *_cache_contradictions(recipe),
        (
            truncation.keep == "cot" and truncation.fraction != 1,
            '[truncation] keep = "cot" cuts after </think> and takes no fraction, found '
            f"{truncation.fraction}: set fraction = 1.0",
        ),
        (
            recipe.batch.micro_batch_size > recipe.batch.global_batch_size,
            f"[batch] micro_batch_size {recipe.batch.micro_batch_size} exceeds global_batch_size "
            f"{recipe.batch.global_batch_size}: lower the first or raise the second",
        ),
        (
            recipe.run.export == "best" and recipe.run.keep_checkpoints == "last",
            '[run] export = "best" needs the best checkpoint, but keep_checkpoints = "last" drops '
            "it: "
            'set export = "last" or keep_checkpoints = "last_and_best"',
        ),
        (
            recipe.eval.samples > 1 and recipe.eval.temperature == 0,
            f"[eval] samples = {recipe.eval.samples} at temperature 0 would repeat one greedy "
            "answer: raise temperature",
        ),
    ]


def _wrong_paths(recipe: Recipe) -> Iterator[str]:
    """What no file can be called, before anything is looked for."""
    paths = {
        "[teacher] model": recipe.teacher.model,
        "[teacher] cache_folder": recipe.teacher.cache_folder,
        "[student] model": recipe.student.model,
        "[data] source": recipe.data.source,
        "[run] folder": recipe.run.folder,
        "[eval] task": recipe.eval.task.partition(":")[2],
    }
    named = [*paths.items(), *(("[eval] compare", name) for name in recipe.eval.compare)]
    for field, text in named:
        try:
            readers.path_of(text, field)
        except RecipeError as error:
            yield str(error)
    if wrong := _wrong_name(recipe.run.name):
        yield wrong


def _wrong_name(name: str) -> str:
    """Why a run cannot be called so; "" where it can."""
    if name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return (
            f"[run] name {name[:60]!r} is not the plain name of a folder; run.folder says "
            "where it lies"
        )
    size = len(name.encode())
    return (
        f"[run] name has {size} bytes ({name[:20]}…), a run's can have {LONGEST_NAME}"
        if size > LONGEST_NAME
        else ""
    )


def _cache_contradictions(recipe: Recipe) -> list[tuple[bool, str]]:
    """What answers for whole sequences, at temperature 1, cannot serve."""
    kind, objective, truncation = recipe.teacher.cache, recipe.objective, recipe.truncation
    asked = f'[teacher] cache = "{kind}"'
    cuts = truncation.fraction < 1 or truncation.max_tokens > 0
    moves = truncation.keep in ("suffix", "middle") and truncation.context == "drop" and cuts
    cached, sparse = kind != "off", kind in ("top_k", "sampled")
    return [
        (
            cached and not recipe.teacher.cache_folder,
            f"{asked} needs a place, but cache_folder is empty: name a folder",
        ),
        (
            cached and objective.kd_weight == 0,
            f"{asked} keeps a teacher's answers, but [objective] kd_weight = 0 uses none: set "
            'cache = "off"',
        ),
        (
            cached and moves,
            f"{asked} holds answers to whole sequences, but [truncation] keep = "
            f'"{truncation.keep}" drops the context and asks others: '
            'set context = "keep", keep = "prefix", or cache = "off"',
        ),
        (
            sparse and objective.temperature != 1,
            f"{asked} holds answers at temperature 1, but [objective] temperature is "
            f'{objective.temperature}: set 1.0, or cache = "hidden"',
        ),
        (
            kind == "sampled" and objective.divergence != "forward_kl",
            f"{asked} is unbiased for forward_kl alone, but [objective] divergence is "
            f'"{objective.divergence}": set forward_kl, '
            'or cache = "top_k"',
        ),
    ]


def cache_serves(recipe: Recipe, kind: str) -> bool:
    """Whether a teacher's kept answers of this kind can train a recipe that now asks the teacher
    itself.
    """
    return not any(
        found for found, _ in _cache_contradictions(with_values(recipe, teacher={"cache": kind}))
    )


_WHEN_READ = {
    ("objective", "jsd_beta"): 'only divergence = "jsd" does',
    ("objective", "skew_alpha"): 'only divergence = "skew_kl" or "skew_reverse_kl" does',
    ("student", "rank"): 'only tuning = "lora" or "dora" does',
    ("student", "alpha"): 'only tuning = "lora" or "dora" does',
    ("student", "lora_layers"): 'only tuning = "lora" or "dora" does',
    ("student", "lora_targets"): 'only tuning = "lora" or "dora" does',
    ("optim", "beta1"): 'only optimizer = "adamw" or "lion" does',
    ("optim", "beta2"): 'only optimizer = "adamw" or "lion" does',
    ("optim", "eps"): 'only optimizer = "adamw" does',
    ("eval", "top_p"): "only a temperature above 0 does",
    ("data", "prompt_column"): 'only format = "columns", "response", "alpaca" or "gsm8k" does',
    ("data", "cot_column"): 'only format = "columns" does',
    ("data", "answer_column"): 'only format = "columns" or "gsm8k" does',
    ("data", "response_column"): 'only format = "response" or "alpaca" does',
    ("data", "messages_column"): 'only format = "messages" or "conversations" does',
    ("teacher", "quantize_bits"): "there is no teacher",
    ("teacher", "cache_folder"): 'only a cache other than "off" does',
    ("teacher", "cache_top_k"): 'only cache = "top_k" does',
    ("teacher", "cache_samples"): 'only cache = "sampled" does',
}


def _conditional_fields(recipe: Recipe) -> list[tuple[str, bool, tuple[str, ...]]]:
    return [
        ("objective", recipe.objective.divergence == "jsd", ("jsd_beta",)),
        (
            "objective",
            recipe.objective.divergence in ("skew_kl", "skew_reverse_kl"),
            ("skew_alpha",),
        ),
        (
            "student",
            recipe.student.tuning != "full",
            ("rank", "alpha", "lora_layers", "lora_targets"),
        ),
        ("optim", recipe.optim.optimizer != "adafactor", ("beta1", "beta2")),
        ("optim", recipe.optim.optimizer == "adamw", ("eps",)),
        ("eval", recipe.eval.temperature > 0, ("top_p",)),
        (
            "data",
            recipe.data.format in ("columns", "response", "alpaca", "gsm8k"),
            ("prompt_column",),
        ),
        ("data", recipe.data.format == "columns", ("cot_column",)),
        ("data", recipe.data.format in ("columns", "gsm8k"), ("answer_column",)),
        ("data", recipe.data.format in ("response", "alpaca"), ("response_column",)),
        ("data", recipe.data.format in ("messages", "conversations"), ("messages_column",)),
        ("teacher", bool(recipe.teacher.model), ("quantize_bits",)),
        ("teacher", recipe.teacher.cache != "off", ("cache_folder",)),
        ("teacher", recipe.teacher.cache == "top_k", ("cache_top_k",)),
        ("teacher", recipe.teacher.cache == "sampled", ("cache_samples",)),
    ]


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe and apply `table.field=value` overrides through the same checks.

    Raises `NotFound` (no such file) or `RecipeError` (file, table, field, what was found and the
    choices), one line each.
    """
    tables = read_toml(path)
    for override in overrides:
        apply_override(tables, override)
    return build_recipe(tables, path)


def build_recipe(tables: dict[str, Any], path: Path) -> Recipe:
    """The recipe of these tables; `path` is where they come from, for errors and for a run's name.
    Raises `RecipeError`.
    """
    refuse_unknown(tables, path)
    try:
        recipe = Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe(error)}") from None
    if not recipe.run.name:
        if wrong := _wrong_name(path.stem):
            raise RecipeError(f"{path}: {wrong}: set run.name, which is else the file's")
        recipe = with_values(recipe, run={"name": path.stem})
    return recipe


def with_values(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """The recipe with some fields of some tables replaced, unchecked."""
    return recipe.model_copy(
        update={
            name: getattr(recipe, name).model_copy(update=values) for name, values in tables.items()
        }
    )


def read_toml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """A file's content; raises `NotFound` with the nearest name there is, or `RecipeError`."""
    try:
        return readers.read_toml(path)
    except NotFound:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else "; recipes/ has examples"
    raise NotFound(f"no {what} at {path}{', which is a folder' if path.is_dir() else ''}{hint}")


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Set what `table.field=value` says, the value read as TOML, or as a bare word; raises
    `RecipeError`.
    """
    name, equals, text = override.partition("=")
    table, dot, field = name.strip().partition(".")
    if not (equals and dot and field):
        raise RecipeError(
            f"--set {short(override)}: expected table.field=value, for example --set "
            "truncation.fraction=0.25"
        )
    if not isinstance(tables.setdefault(table, {}), dict):
        raise RecipeError(f"--set {short(override)}: {table} is not a table of the recipe")
    tables[table][field.strip()] = readers.toml_value(text, f"--set {short(name.strip())}")


def refuse_unknown(tables: dict[str, Any], path: Path) -> None:
    """Raise `RecipeError` for a table or field that no recipe has, with the nearest one that it
    has.
    """
    for table, fields in tables.items():
        if table not in Recipe.model_fields:
            raise RecipeError(
                f"{path}: no table [{short(table)}] in a recipe{near(table, Recipe.model_fields)}"
            )
        if not isinstance(fields, dict):
            raise RecipeError(f"{path}: [{table}] must be a table, found {found_as(fields)}")
        known = Recipe.model_fields[table].annotation.model_fields
        for field in fields:
            if field not in known:
                raise RecipeError(
                    f"{path}: [{table}] has no field {found_as(field)}{near(field, known)}"
                )
            if not readers.is_text(fields[field]):
                raise RecipeError(
                    f"{path}: [{table}] {field} is not text in UTF-8, found "
                    f"{found_as(fields[field])}"
                )


def near(name: str, known: Iterable[str]) -> str:
    """For an error's end: the nearest known name, and all of them."""
    found = difflib.get_close_matches(name[:60], list(known), 1)
    return (f"; did you mean {found[0]!r}?" if found else ";") + f" Choices: {', '.join(known)}"


def describe(error: ValidationError) -> str:
    """Pydantic's first complaint in a line: table and field, what it should be, what was found."""
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    table, field, *rest = (*first["loc"], "")
    where = (f"[{table}] {field}" if field != "" else table) + "".join(
        f"[{part}]" for part in rest if part != ""
    )
    found = first.get("input")
    expected = first["msg"].removeprefix("Input ").removeprefix("should be ")
    expected = expected.replace("a valid tuple", "a list").replace("a valid dictionary", "a table")
    if first["type"] == "too_short":
        expected = f"a list of at least {first['ctx']['min_length']}"
    choices = first.get("ctx", {}).get("expected", "")
    near = difflib.get_close_matches(
        str(found)[:60], choices.replace("'", "").replace(" or ", ", ").split(", "), 1
    )
    return f"{where} should be {expected}, found {found_as(found)}" + (
        f"; did you mean {near[0]!r}?" if near and near[0] else ""
    )


def found_as(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    return short(repr(value))


def short(text: str) -> str:
    """The beginning and the end of a text that is too long for an error."""
    return text if len(text) <= 100 else f"{text[:60]}…{text[-20:]}"


def eval_table(settings: tuple[str, ...]) -> EvalTable:
    """The `[eval]` table with `field=value` settings, checked as in a recipe."""
    tables: dict = {}
    for setting in settings:
        apply_override(tables, f"eval.{setting}")
    refuse_unknown(tables, Path("--set"))
    try:
        return Recipe.model_validate(tables | {"data": {"source": "none"}}).eval
    except ValidationError as error:
        raise RecipeError(f"--set: {describe(error)}") from None
