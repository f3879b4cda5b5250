"""Recipes are loaded strictly: what cannot be run as written is refused in one line that says where
and what to do.
"""

import json
import re
import tomllib
from pathlib import Path

import pytest

from mlx_distill.errors import NotFound, RecipeError
from mlx_distill.recipe.defaults import FOLLOWS
from mlx_distill.recipe.load import build_recipe, eval_table, load_kept_recipe, load_recipe
from mlx_distill.recipe.read_when import READ_WHEN
from mlx_distill.recipe.recipe import CAME_LATER, OUTSIDE_DIGEST, TABLES, Recipe
from mlx_distill.recipe.reference import range_of, reference

RECIPES = Path(__file__).parents[1] / "recipes"
FIELDS = [(table, field) for table, part in TABLES.items() for field in part.model_fields]
MINIMAL = '[data]\nsource = "rows.jsonl"\n'
MODELS = ("teacher.model=a/teacher", "student.model=a/student")
NAMED = (*MODELS, "data.source=rows.jsonl")


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def load(write, text: str = "", *overrides: str) -> Recipe:
    return load_recipe(write(MINIMAL + text), (*MODELS, *overrides))


def refused(write, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(write, text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


# unknown names


def test_an_unknown_field_is_refused_with_table_field_nearest_name_and_choices(write):
    message = refused(write, "[truncation]\nfracton = 0.5\n")
    assert message.startswith(
        f"{write('x').parent / 'mine.toml'}: [truncation] has no field 'fracton'; did you mean "
        "'fraction'? "
    )
    assert message.endswith("context, token_share, whole_share, ending")


def test_an_unknown_table_is_refused_likewise(write):
    message = refused(write, "[optimizer]\nsteps = 5\n")
    assert (
        "no table [optimizer] in a recipe; did you mean 'optim'? Choices: teacher, student, prune, data,"
        in message
    )
    assert "no table [steps]" in refused(write, "", "steps.x=1")


def test_a_name_unlike_any_gets_the_choices_alone(write):
    assert "has no field 'zzzz'; Choices: name, folder" in refused(write, "[run]\nzzzz = 1\n")


def test_a_field_outside_of_its_table_is_refused(write, tmp_path):
    (tmp_path / "mine.toml").write_text("teacher = 3\n" + MINIMAL)
    with pytest.raises(RecipeError, match=r"\[teacher\] must be a table, found 3"):
        load_recipe(tmp_path / "mine.toml")


# values


@pytest.mark.parametrize(
    ("text", "where", "expected", "found"),
    [
        ("[optim]\nsteps = 6.5\n", "[optim] steps", "a valid integer", "6.5"),
        ("[optim]\nsteps = 6.0\n", "[optim] steps", "a valid integer", "6.0"),
        ('[optim]\nsteps = "6"\n', "[optim] steps", "a valid integer", "'6'"),
        ("[optim]\nsteps = true\n", "[optim] steps", "a valid integer", "True"),
        ('[optim]\nlearning_rate = "1e-3"\n', "[optim] learning_rate", "a valid number", "'1e-3'"),
        (
            "[student]\ngradient_checkpointing = 1\n",
            "[student] gradient_checkpointing",
            "a valid boolean",
            "1",
        ),
        ('[eval]\nscore_base = "no"\n', "[eval] score_base", "a valid boolean", "'no'"),
        ("[run]\nname = 3\n", "[run] name", "a valid string", "3"),
        ('[objective]\nsegments = "cot"\n', "[objective] segments", "a list", "'cot'"),
        ("[objective]\nsegments = []\n", "[objective] segments", "a list of at least 1", "[]"),
        (
            '[objective]\nsegments = ["cot", "cot"]\n',
            "[objective] segments",
            "a list that names nothing twice",
            "['cot', 'cot']",
        ),
        (
            "[objective]\nhidden_layers = [1, 1]\n",
            "[objective] hidden_layers",
            "a list that names nothing twice",
            "[1, 1]",
        ),
        (
            "[student]\ntuning='lora'\nlora_targets = [1]\n",
            "[student] lora_targets[0]",
            "a valid string",
            "1",
        ),
        (
            "where = {level = {a = 3}}\n",
            "[data] where[level]",
            "a text, a number, true, false or a list of these",
            "{'a': 3}",
        ),
        ("[truncation]\nfraction = 0.0\n", "[truncation] fraction", "from 1e-06 to 1.0", "0.0"),
        ("[truncation]\nfraction = 1.01\n", "[truncation] fraction", "from 1e-06 to 1.0", "1.01"),
        ("[batch]\nmicro_batch_size = 0\n", "[batch] micro_batch_size", "from 1 to 65,536", "0"),
        ("[optim]\nlearning_rate = nan\n", "[optim] learning_rate", "a finite number", "nan"),
        (
            "[objective]\nkd_weight = -0.1\n",
            "[objective] kd_weight",
            "0, or from 1e-06 to 1.0",
            "-0.1",
        ),
        ("[teacher]\nquantize_bits = 5\n", "[teacher] quantize_bits", "0, 4, 6, 8 or 'nf4'", "5"),
        (
            '[optim]\noptimizer = "sgd"\n',
            "[optim] optimizer",
            "'adamw', 'adafactor', 'lion' or 'schedule_free_adamw'",
            "'sgd'",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_was_expected(
    write, text, where, expected, found
):
    assert f"mine.toml: {where} should be {expected}" in refused(write, text)
    assert f", found {found}" in refused(write, text)


def test_a_wrong_choice_gets_the_nearest(write):
    assert refused(write, '[objective]\ndivergence = "foward_kl"\n').endswith(
        "; did you mean 'forward_kl'?"
    )
    assert (
        "[objective] segments[1] should be 'prompt', 'cot' or 'answer', found 'answr'; did you "
        "mean 'answer'?" in refused(write, '[objective]\nsegments = ["cot", "answr"]\n')
    )


def test_a_whole_number_is_a_number(write):
    assert load(write, "[objective]\ntemperature = 2\n").objective.temperature == 2.0


# contradictions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('format = "prompts"\n', 'set [rollouts] by = "teacher" or "student"'),
        (
            'format = "prompts"\n[rollouts]\nby = "teacher"\nshare = 0.5\n',
            "and share = 1.0",
        ),
        ('[rollouts]\nby = "teacher"\nfolder = ""\n', "needs a place for its texts"),
        (
            '[rollouts]\nby = "teacher"\nsamples = 2\ntemperature = 0.0\n',
            "would repeat one greedy text",
        ),
        (
            '[eval]\ntask = "aime24"\nalso = ["aime25", "aime24"]\n',
            "task and also name 'aime24' twice, which would be scored twice: drop one",
        ),
        ('[rollouts]\nby = "teacher"\nweigh = "pass_rate"\n', "compares several texts a prompt"),
        (
            '[rollouts]\nby = "teacher"\nsamples = 2\nweigh = "pass_rate"\nshare = 0.5\n',
            "set share = 1.0",
        ),
        (
            '[teacher]\ncache = "hidden"\n[rollouts]\nby = "student"\nrefresh_every = 5\n',
            "writes texts that no teacher cache holds",
        ),
        ('[truncation]\nkeep = "cot"\nfraction = 0.5\n', "set fraction = 1.0"),
        ("[batch]\nmicro_batch_size = 16\n", "micro_batch_size 16 exceeds global_batch_size 8"),
        (
            '[run]\nkeep_checkpoints = "last"\n',
            'set export = "last" or keep_checkpoints = "last_and_best"',
        ),
        ("[eval]\nsamples = 4\n", "raise temperature"),
        ('[teacher]\ncache = "hidden"\ncache_folder = ""\n', "name a folder"),
        (
            '[teacher]\ncache = "hidden"\n[objective]\nkd_weight = 0.0\n',
            'kd_weight = 0 uses none: set cache = "off"',
        ),
        (
            '[teacher]\ncache = "hidden"\n[truncation]\nkeep = "suffix"\nfraction = 0.5\n',
            'set context = "keep", keep = "prefix", or cache = "off"',
        ),
        (
            '[teacher]\ncache = "top_k"\n[truncation]\nkeep = "middle"\nmax_tokens = 9\n',
            'keep = "middle" drops the context',
        ),
        (
            '[teacher]\ncache = "top_k"\n[objective]\ntemperature = 2.0\n',
            "temperature is 2.0: set 1.0",
        ),
        ('[teacher]\ncache = "sampled"\n[objective]\ntemperature = 0.5\n', 'or cache = "hidden"'),
        (
            '[teacher]\ncache = "sampled"\n[objective]\ndivergence = "jsd"\n',
            'divergence is "jsd": set forward_kl',
        ),
        (
            '[teacher]\ncache = "top_k"\n[objective]\ndivergence = "tvd"\ntvd_scale = "log"\n',
            'counts every id of the vocabulary the same: set tvd_scale = "linear"',
        ),
        (
            '[objective]\ndivergence = "dkd"\ndkd_target = 0.0\ndkd_rest = 0.0\n',
            "teaches nothing",
        ),
        (
            '[selection]\nshare = 0.5\nby = "divergence"\n[objective]\nkd_weight = 0.0\n',
            "asks the teacher, but [objective] kd_weight = 0 asks none",
        ),
        (
            '[optim]\noptimizer = "schedule_free_adamw"\nschedule = "cosine"\n',
            'averages instead of letting the rate fall, but schedule = "cosine": set "constant"',
        ),
        (
            "[objective]\nhidden_weight = 0.5\nkd_weight = 0.0\n",
            "hidden_weight = 0.5 asks the teacher, but kd_weight = 0 asks none",
        ),
        (
            '[teacher]\ncache = "hidden"\n[objective]\nhidden_weight = 0.5\n',
            'which no cache holds any: set [teacher] cache = "off" (found "hidden")',
        ),
        (
            '[optim]\noptimizer = "schedule_free_adamw"\nbeta1 = 0.0\n',
            "trains at a mean that beta1 weighs, but beta1 is 0",
        ),
        (
            '[selection]\nshare = 0.5\nby = "position"\n',
            'set "rising" for the last ones or "falling" for the first',
        ),
    ],
)
def test_contradictions_are_refused_with_advice(write, text, said):
    message = refused(write, text)
    assert "mine.toml: [" in message and said in message


@pytest.mark.parametrize(
    ("missing", "lines"),
    [
        ("student", 'add the two lines [student] and model = "NAME"'),
        ("teacher", 'add the two lines [teacher] and model = "NAME"'),
        ("data", 'add the two lines [data] and source = "NAME"'),
    ],
)
@pytest.mark.parametrize("empty", [False, True])
def test_a_recipe_names_its_models_and_its_data(missing, lines, empty):
    """Nothing takes their place: the toy models are asked for by their names."""
    field = "source" if missing == "data" else "model"
    tables = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"source": "r"}}
    tables[missing] = {field: ""} if empty else {}
    with pytest.raises(RecipeError, match=rf"^mine.toml: \[{missing}\] {field} is empty") as error:
        build_recipe(tables, Path("mine.toml"))
    assert lines in str(error.value)
    alone = build_recipe({**tables, missing: {field: "x"}}, Path("mine.toml"))
    assert getattr(getattr(alone, missing), field) == "x"


def test_plain_fine_tuning_needs_no_teacher():
    tables = {"student": {"model": "s"}, "data": {"source": "r"}, "objective": {"kd_weight": 0.0}}
    assert build_recipe(tables, Path("mine.toml")).teacher.model == ""


def test_a_teacher_who_writes_is_named(write):
    text = '[objective]\nkd_weight = 0.0\n[rollouts]\nby = "teacher"\n'
    assert "[teacher] model is empty: name a teacher" in refused(write, text, "teacher.model=")


# defaults that follow other fields


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("student.tuning=full", (2e-5, 64.0, 0.999)),
        ("student.tuning=lora", (2e-4, 64.0, 0.999)),
        ("student.tuning=dora", (2e-4, 64.0, 0.999)),
        ('student={tuning="lora", rank=16}', (2e-4, 32.0, 0.999)),
        ("optim.optimizer=lion", (2e-5, 64.0, 0.99)),
        ("optim.optimizer=adafactor", (2e-5, 64.0, 0.999)),
    ],
)
def test_a_default_follows_other_fields(write, override, expected):
    def found(recipe: Recipe) -> tuple[float, ...]:
        return recipe.optim.learning_rate, recipe.student.alpha, recipe.optim.beta2

    table, _, value = override.partition("={")
    text = ""
    if value:
        text, override = f"[{table}]\n" + value.rstrip("}").replace(", ", "\n") + "\n", ""
    recipe = load(write, text, *filter(None, [override]))
    assert found(recipe) == expected
    kept = load_recipe(write(recipe.toml(), "kept.toml"))
    assert kept == recipe and kept.digest() == recipe.digest()


def test_schedule_free_has_a_constant_rate_unless_told(write):
    assert load(write, "", "optim.optimizer=schedule_free_adamw").optim.schedule == "constant"
    assert load(write, "").optim.schedule == "one_cycle"


@pytest.mark.parametrize(("by", "weight"), [("data", 0.5), ("teacher", 0.5), ("student", 1.0)])
def test_what_the_student_writes_is_learned_from_the_teacher_alone(write, by, weight):
    assert load(write, "", f"rollouts.by={by}").objective.kd_weight == weight
    both = load(write, "", f"rollouts.by={by}", "objective.kd_weight=0.7")
    assert both.objective.kd_weight == 0.7


@pytest.mark.parametrize("chosen", ["keep=right", "weigh=pass_rate"])
def test_texts_that_are_written_again_are_not_chosen_among(write, chosen):
    settings = ("by=student", "samples=2", "temperature=1.0", "refresh_every=2", chosen)
    text = refused(write, "", *(f"rollouts.{one}" for one in settings))
    field = chosen.partition("=")[0]
    assert f"[rollouts] {field} = " in text and "or refresh_every = 0" in text
    load(write, "", *(f"rollouts.{one}" for one in (*settings, "refresh_every=0")))


def test_what_is_set_is_kept(write):
    rates = ("optim.learning_rate=2e-5", "student.alpha=8.0", "optim.beta2=0.999")
    recipe = load(write, "", "student.tuning=lora", "optim.optimizer=lion", *rates)
    assert recipe.optim.learning_rate == 2e-5
    assert (recipe.student.alpha, recipe.optim.beta2) == (8.0, 0.999)


@pytest.mark.parametrize(
    ("overrides", "window"),
    [
        ((), 8),
        (("batch.micro_batch_size=2",), 8),
        (("batch.micro_batch_size=8",), 1),  # a step would hold one range of lengths
        (("batch.micro_batch_size=5",), 1),
        (("batch.micro_batch_size=1",), 1),  # nothing is padded
        (("batch.shuffle=false",), 1),
        (('rollouts.by="student"', "rollouts.refresh_every=10"), 1),
        (("batch.micro_batch_size=8", "batch.sort_window=4"), 4),
    ],
)
def test_steps_are_sorted_where_that_saves_something(write, overrides, window):
    recipe = load(write, "", *overrides)
    assert recipe.batch.sort_window == window
    assert load_recipe(write(recipe.toml(), "kept.toml")) == recipe


def test_the_tables_hold_what_follows_from_the_other_defaults():
    for path, rule in FOLLOWS.items():
        table, field = path.split(".")
        assert TABLES[table].model_fields[field].default == rule.value(Recipe.model_construct())


# runs of earlier versions


def test_a_run_of_an_earlier_version_keeps_its_digest_and_what_it_did():
    """Its recipe.toml has fields that nothing reads, at defaults of then, and lacks newer ones."""
    folder = RECIPES.parent / "benchmarks" / "cot50-ce"
    kept = load_kept_recipe(folder / "recipe.toml")
    assert (kept.student.rank, kept.student.alpha, kept.optim.weight_decay) == (8, 16.0, 0.01)
    assert kept.optim.decayed == "all"
    assert kept.digest() == json.loads((folder / "manifest.json").read_text())["recipe_digest"]
    # as a person would write it today, without what nothing reads
    tables = tomllib.loads((folder / "recipe.toml").read_text())
    for field in ("rank", "alpha", "lora_layers", "lora_targets"):
        del tables["student"][field]
    tables["optim"]["decayed"] = "all"
    again = build_recipe(tables, folder / "recipe.toml")
    assert again.student.rank == 32
    assert again.digest() == kept.digest() and kept.differences(again) == []
    del tables["optim"]["decayed"]
    changed = build_recipe(tables, folder / "recipe.toml")
    assert kept.differences(changed) == ["optim.decayed: 'all' → 'matrices'"]
    assert changed.digest() != kept.digest()


@pytest.mark.parametrize(
    "text",
    [
        '[teacher]\ncache = "hidden"\n[objective]\ntemperature = 2.0\ndivergence = "jsd"\n',
        '[teacher]\ncache = "top_k"\n[objective]\ndivergence = "reverse_kl"\n',
        '[teacher]\ncache = "top_k"\n[objective]\ndivergence = "dkd"\n',
        '[teacher]\ncache = "hidden"\n[objective]\ndivergence = "tvd"\ntvd_scale = "log"\n',
        '[teacher]\ncache = "sampled"\n[truncation]\nkeep = "suffix"\nfraction = 0.5\ncontext = '
        '"keep"\n',
        '[teacher]\ncache = "top_k"\n[truncation]\nkeep = "suffix"\n',
        '[teacher]\ncache = "top_k"\n[truncation]\nkeep = "cot"\n',
    ],
)
def test_what_a_cache_can_serve_is_accepted(write, text):
    assert load(write, text).teacher.cache != "off"


UNREAD = {
    ("teacher", "cache_folder", '"elsewhere"'): 'cache="hidden"',
    ("teacher", "cache_top_k", "8"): 'cache="top_k"',
    ("teacher", "cache_samples", "8"): 'cache="sampled"',
    ("objective", "jsd_beta", "0.3"): 'divergence="jsd"',
    ("objective", "skew_alpha", "0.3"): 'divergence="skew_kl"',
    ("objective", "mixed_weight", "0.3"): 'divergence="mixed_kl"',
    ("objective", "entropy_half", "0.3"): 'divergence="entropy_kl"',
    ("objective", "tvd_scale", '"log"'): 'divergence="tvd"',
    ("objective", "dkd_target", "2.0"): 'divergence="dkd"',
    ("objective", "dkd_rest", "8.0"): 'divergence="dkd"',
    ("objective", "hidden_layers", "[1]"): "hidden_weight=0.5",
    ("objective", "hidden_distance", '"cosine"'): "hidden_weight=0.5",
    ("selection", "by", '"divergence"'): "share=0.5",
    ("selection", "redraw", '"once"'): "share=0.5",
    ("student", "rank", "4"): 'tuning="lora"',
    ("student", "alpha", "8.0"): 'tuning="dora"',
    ("student", "lora_layers", "1"): 'tuning="lora"',
    ("student", "lora_targets", '["q_proj"]'): 'tuning="lora"',
    ("optim", "beta1", "0.8"): 'optimizer="lion"',
    ("optim", "beta2", "0.99"): 'optimizer="adamw"',
    ("optim", "eps", "1e-6"): 'optimizer="adamw"',
    ("optim", "decayed", '"all"'): "weight_decay=0.1",
    ("optim", "patience", "2"): "steps=7; run.validate_every=5",
    ("eval", "top_p", "0.9"): "temperature=0.7",
    ("data", "prompt_column", '"q"'): 'format="gsm8k"',
    ("data", "cot_column", '"c"'): 'format="columns"',
    ("data", "answer_column", '"a"'): 'format="columns"',
    ("data", "response_column", '"r"'): 'format="response"',
    ("data", "messages_column", '"m"'): 'format="conversations"',
    ("teacher", "quantize_bits", "4"): 'model="some"',
    ("teacher", "compute_dtype", '"float32"'): 'model="some"',
    ("student", "quantize_aware_bits", "4"): 'tuning="full"',
    ("student", "quantize_bits", "4"): 'tuning="dora"',
    ("prune", "layers_by", '"change"'): "layers=2",
    ("prune", "examples", "8"): "channels=16",
    ("prune", "until", "0.3"): "rounds=4; prune.channels=16",
    ("batch", "shuffle", "false"): "global_batch_size=16",
    ("batch", "sort_window", "4"): "global_batch_size=16",
    ("rollouts", "share", "0.5"): 'by="teacher"',
    ("rollouts", "samples", "4"): 'by="student"',
    ("rollouts", "temperature", "0.7"): 'by="teacher"',
    ("rollouts", "top_p", "0.9"): 'by="student"',
    ("rollouts", "max_new_tokens", "64"): 'by="teacher"',
    ("rollouts", "batch_size", "8"): 'by="teacher"',
    ("rollouts", "keep", '"right"'): 'by="teacher"',
    ("rollouts", "weigh", '"pass_rate"'): 'by="teacher"; rollouts.samples=4',
    ("rollouts", "refresh_every", "10"): 'by="student"',
    ("rollouts", "folder", '"elsewhere"'): 'by="teacher"',
}
UNREAD_WITH = {
    "objective": 'objective.divergence="reverse_kl"',
    "selection": "selection.share=1.0",
    "student": 'student.tuning="full"',
    "optim": 'optim.optimizer="adafactor"',
    "eval": "eval.temperature=0.0",
    "rollouts": 'rollouts.by="data"',
    "prune": "prune.channels=0",
    "batch": 'rollouts.by="student"; rollouts.refresh_every=5',
}


@pytest.mark.parametrize(("table", "field", "value"), UNREAD)
def test_a_field_that_nothing_would_read_is_refused(write, table, field, value):
    readers = f"{table}.{UNREAD[table, field, value]}".split("; ")
    other = {
        "prompt_column": 'data.format="messages"',
        "cot_column": 'data.format="gsm8k"',
        "answer_column": 'data.format="response"',
        "response_column": 'data.format="columns"',
        "messages_column": 'data.format="columns"',
        "teacher.quantize_bits": "teacher.model=",
        "compute_dtype": "teacher.model=",
        "quantize_aware_bits": 'student.tuning="lora"',
        "decayed": "optim.weight_decay=0.0",
        "patience": "run.validate_every=0",
        "cache_folder": "teacher.cache=off",
        "cache_top_k": "teacher.cache=off",
        "cache_samples": "teacher.cache=off",
    }
    without = other.get(field) or other.get(f"{table}.{field}") or UNREAD_WITH[table]
    deaf = (*without.split("; "), "objective.kd_weight=0.0")
    read = load(write, "", *readers, f"{table}.{field}={value}").model_dump(mode="json")
    assert read[table][field] == tomllib.loads(f"x={value}")["x"]
    message = refused(write, "", *deaf, f"{table}.{field}={value}")
    assert f"[{table}] {field} is set but nothing reads it here: " in message
    assert load(write, "", *deaf)


# --set


@pytest.mark.parametrize(
    ("override", "table", "field", "value"),
    [
        ("optim.steps=7", "optim", "steps", 7),
        ("optim.learning_rate = 5e-4", "optim", "learning_rate", 5e-4),
        ("run.name=first-try", "run", "name", "first-try"),
        ('run.name="quoted"', "run", "name", "quoted"),
        ("run.name=a=b", "run", "name", "a=b"),
        ("data.source=models/a b.jsonl", "data", "source", "models/a b.jsonl"),
        ("eval.score_base=false", "eval", "score_base", False),
        ('objective.segments=["cot","answer"]', "objective", "segments", ("cot", "answer")),
        ('data.where={level="hard"}', "data", "where", {"level": "hard"}),
        ("eval.task=", "eval", "task", ""),
    ],
)
def test_set_overrides_one_field(write, override, table, field, value):
    assert getattr(getattr(load(write, '[run]\nname = "one"\n', override), table), field) == value


def test_the_last_set_wins_and_passes_the_same_checks(write):
    assert load(write, "[optim]\nsteps = 1\n", "optim.steps=2", "optim.steps=3").optim.steps == 3
    assert "[optim] steps should be a valid integer, found 'many'" in refused(
        write, "", "optim.steps=many"
    )
    assert "did you mean 'fraction'" in refused(write, "", "truncation.fractoin=0.5")
    assert "micro_batch_size 9 exceeds" in refused(write, "", "batch.micro_batch_size=9")


@pytest.mark.parametrize("override", ["steps=3", "optim.steps", "optim.=3", "=3", "optim", ""])
def test_a_set_of_another_form_is_refused_with_an_example(write, override):
    assert (
        refused(write, "", override)
        == f"--set {override}: expected table.field=value, for example --set "
        "truncation.fraction=0.25"
    )


def test_settings_of_eval_pass_the_same_checks():
    assert eval_table(("examples=7", "temperature=0.5")).examples == 7
    for settings, said in (
        (("exampels=7",), "did you mean 'examples'"),
        (("examples=0",), "should be from 1 to 1,000,000,000, found 0"),
        (("samples=3",), "raise temperature"),
        (("7",), "expected"),
    ):
        with pytest.raises(RecipeError, match=said):
            eval_table(settings)


# files


def test_a_missing_file_names_its_neighbour(write, tmp_path):
    write(MINIMAL, "cot50.toml")
    with pytest.raises(NotFound) as error:
        load_recipe(tmp_path / "cot5.toml")
    assert (
        str(error.value)
        == f"no recipe at {tmp_path / 'cot5.toml'}; did you mean {tmp_path / 'cot50.toml'}?"
    )
    with pytest.raises(NotFound, match="`mlx-distill run NAME` knows cot50"):
        load_recipe(tmp_path / "nothing" / "like-it.toml")
    with pytest.raises(NotFound):
        load_recipe(tmp_path)


@pytest.mark.parametrize("text", [b"[data\n", b"[data]\nsource = rows\n", b"[data]\n[data]\n"])
def test_a_file_that_is_not_toml_is_refused_with_the_place(tmp_path, text):
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(RecipeError, match=r"bad\.toml: not valid TOML: "):
        load_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "UTF-16"),
        (b"[data]\nsource = '\xff'", ", line 2: byte 0xff is not UTF-8"),
        (
            b"run.seed = " + b"9" * 5000,
            ", line 1: not valid TOML: a number of more than 4,300 digits",
        ),
        (b"run.seed = " + b"[" * 5000, ", line 1: nested more than 100 levels deep"),
    ],
)
def test_a_file_that_no_one_can_read_is_one_line(tmp_path, content, said):
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(RecipeError) as error:
        load_recipe(tmp_path / "bad.toml")
    assert str(error.value).startswith(f"{tmp_path}/bad.toml") and said in str(error.value)


def test_a_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbf[optim]\r\nsteps = 3\r\n")
    assert load_recipe(tmp_path / "windows.toml", NAMED).optim.steps == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.seed=" + "[" * 2000, "--set run.seed, line 1: nested more than 100 levels deep"),
        ("run.seed=" + "9" * 5000, "a number of more than 4,300 digits"),
        ("run.seed=" + "9" * 4000, "an integer of more than 1,024 bits"),
        ("run.seed=" + "9" * 300, "…99999"),
        ("run.seed=07:32:00", "a valid integer, found datetime.time(7, 32)"),
        ("run.name=07:32:00", "a valid string, found datetime.time(7, 32)"),
        ("optim.eps=1e-999", "the number 1e-999 is out of a float's range"),
        ("run.seed", "expected table.field=value"),
        ("=", "expected table.field=value"),
        ("data.source=half \udcff", "is not text in UTF-8"),
        ("data.where={a = '\ud83d'}", "is not text in UTF-8"),
        ("run.name=" + "y" * 300, "[run] name has 300 bytes"),
        ('run.name="a\\u001b[2J"', "is not the plain name of a folder"),
        ('run.name="a\\u0000"', "is not the plain name of a folder"),
        ("teacher.model=~nobody-here/x", "[teacher] model: there is no home folder '~nobody-here'"),
        ("student.model=" + "y" * 300, "[student] model: a name in a path can have 255 bytes"),
        ("data.source=~nobody-here/x.jsonl", "[data] source: there is no home folder"),
        ("run.folder=~nobody-here/x", "[run] folder: there is no home folder"),
        (
            "run.folder=a/" + "y" * 256,
            "[run] folder: a name in a path can have 255 bytes, found one of 256",
        ),
        ('run.folder="a\\u0000b"', "[run] folder: a path cannot hold a NUL character"),
        (
            "teacher.cache_folder=" + "y/" * 3000,
            "[teacher] cache_folder: a path can have 4,096 bytes",
        ),
        ("eval.task=jsonl:~nobody-here/x", "[eval] task: there is no home folder"),
        (
            'eval.compare=["' + "y" * 300 + '"]',
            "[eval] compare: a name in a path can have 255 bytes",
        ),
    ],
)
def test_an_override_that_cannot_be_is_one_short_line(write, override, said):
    message = refused(write, '[teacher]\ncache = "hidden"\n', override)
    assert said in message and len(message) < 800


def test_an_override_is_one_value_and_never_a_second_line_of_toml(write):
    assert load(write, "", "data.source=a\nb = 2").data.source == "a\nb = 2"
    assert load(write, "", 'data.source="a" # b').data.source == "a"
    assert load(write, "", "data.source=a # b").data.source == "a # b"


def test_a_file_whose_name_no_run_can_have_is_refused_and_may_name_its_run(write):
    path = write(MINIMAL, "two\nlines.toml")
    with pytest.raises(RecipeError, match=r"set run\.name, which is else the file's"):
        load_recipe(path, NAMED)
    assert load_recipe(path, (*NAMED, "run.name=plain")).run.name == "plain"


# ranges

NUMBERS = [
    (table, field, info)
    for table, part in TABLES.items()
    for field, info in part.model_fields.items()
    if info.annotation in (int, float)
]


@pytest.mark.parametrize(
    ("table", "field", "info"), NUMBERS, ids=[f"{table}.{field}" for table, field, _ in NUMBERS]
)
def test_every_number_has_a_range_that_ends_where_it_says(table, field, info):
    """Of the table alone, so that no other field of a recipe has a say."""
    part, bounds, kind = TABLES[table], range_of(info), info.annotation
    assert bounds.low <= info.default <= bounds.high or (bounds.or_zero and info.default == 0)
    assert 0 <= bounds.low < bounds.high < 2**63
    for good in (bounds.low, bounds.high, *([0] if bounds.or_zero else [])):
        assert getattr(part.model_validate({field: kind(good)}), field) == good
    below, above = (
        (bounds.low - 1, bounds.high + 1)
        if kind is int
        else (bounds.low * 0.999, bounds.high * 1.001)
    )
    for bad in (
        below,
        above,
        -1,
        2**63,
        2**64,
        10**400,
        *([5e-324, 1e300, -1e-30] if kind is float else []),
    ):
        with pytest.raises(RecipeError) as error:
            build_recipe({table: {field: bad}}, Path("mine.toml"))
        line = str(error.value)
        assert (
            line.startswith(f"mine.toml: [{table}] {field} should be ")
            and ", found " in line
            and len(line) < 800
        )
        assert str(bounds) in line or "a valid number" in line  # 10**400 is no float at all


@pytest.mark.parametrize(
    "override",
    [
        "objective.temperature=1e-30",
        "objective.temperature=1e300",
        "optim.eps=1e300",
        "optim.learning_rate=5e-324",
        "optim.max_grad_norm=1e-30",
        "objective.chunk_tokens=2147483648",
        "batch.pad_multiple=18446744073709551616",
        "run.seed=9223372036854775808",
        "eval.seed=18446744073709551616",
        "optim.beta2=0.9999999999999999",
    ],
)
def test_numbers_that_made_nonsense_in_silence_are_refused_with_their_range(write, override):
    table, field = override.partition("=")[0].split(".")
    assert re.search(
        rf"\[{table}\] {field} should be (0, or )?from .* to .*, found ",
        refused(write, "", override),
    )


def test_a_recipe_without_a_name_is_called_after_its_file(write):
    unnamed = write("", "cot50.toml")
    assert load_recipe(unnamed, NAMED).run.name == "cot50"
    assert load_recipe(unnamed, (*NAMED, "run.name=other")).run.name == "other"


# digest and text


def test_the_digest_is_of_everything_but_where_a_run_lies_and_what_it_is_beside(write):
    recipe = load(write)
    for same in (
        "run.name=x",
        "run.folder=elsewhere",
        'eval.compare=["a"]',
        "optim.steps=0",
        "teacher.cache=off",
    ):
        assert load(write, "", same).digest() == recipe.digest()
    for other in (
        "run.seed=1",
        "optim.steps=1",
        "eval.examples=1",
        "teacher.revision=x",
        'data.where={a="b"}',
    ):
        assert load(write, "", other).digest() != recipe.digest()
    assert re.fullmatch("[0-9a-f]{16}", recipe.digest())
    cached = load(write, "", "teacher.cache=top_k")
    assert (
        cached.digest()
        == load(write, "", "teacher.cache=top_k", "teacher.cache_folder=elsewhere").digest()
        != recipe.digest()
    )
    outside = {
        "teacher": {"cache_folder"},
        "rollouts": {"folder"},
        "prune": {"folder"},
        "run": {"name", "folder", "track"},
        "eval": {"also", "compare", "score_teacher", "score_base"},
    }
    assert outside == OUTSIDE_DIGEST
    newer = {
        "data": {"date", "stream_rows", "compat"},
        "optim": {"decayed", "patience"},
        "batch": {"shuffle", "sort_window"},
    }
    newer["objective"] = {"skew_alpha", "mixed_weight", "entropy_half", "tvd_scale"}
    newer["objective"] |= {"dkd_target", "dkd_rest"}
    newer["objective"] |= {"hidden_weight", "hidden_layers", "hidden_distance"}
    newer["selection"] = set(TABLES["selection"].model_fields)
    newer["rollouts"] = set(TABLES["rollouts"].model_fields) - {"folder"}
    newer["prune"] = set(TABLES["prune"].model_fields) - {"folder"}
    newer["student"] = {"from_teacher", "quantize_aware_bits", "quantize_bits"}
    newer["truncation"] = {"whole_share", "ending", "spread"}
    newer["teacher"] = {"compute_dtype", "keep_answers"}
    newer["eval"] = {"prompt", "answer"}
    assert {(table, field) for table, fields in newer.items() for field in fields} == set(
        CAME_LATER
    )


def test_the_resolved_text_loads_as_an_equal_recipe(write, tmp_path):
    text = '[objective]\nsegments = ["prompt", "answer"]\n'
    recipe = load(
        write,
        text,
        'data.where={"odd key"="ü\\"\\n"}',
        "optim.eps=1e-12",
        "run.name=a b",
        'eval.compare=["runs/one"]',
    )
    assert load_recipe(write(recipe.toml(), "again.toml")) == recipe
    assert set(tomllib.loads(recipe.toml())) == set(Recipe.model_fields)


def test_differences_name_each_field_of_the_digest_once(write):
    recipe = load(write)
    other = load(
        write, "", "optim.steps=3", 'objective.segments=["cot","answer"]', "run.folder=elsewhere"
    )
    assert recipe.differences(other) == [
        "objective.segments: ['cot'] → ['cot', 'answer']",
        "optim.steps: 0 → 3",
    ]
    assert recipe.differences(recipe) == []


# the recipes that come with the program


def test_the_reference_is_what_the_tables_say():
    path = RECIPES / "reference.toml"
    written = path.read_text()
    assert written == reference(), (
        "python -m mlx_distill.recipe.reference > recipes/reference.toml writes it again"
    )
    named = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"source": "r"}}
    tables = tomllib.loads(written)
    for table, fields in named.items():
        tables[table] |= fields
    assert Recipe.model_validate(tables) == Recipe.model_validate(named)
    assert 'read only with divergence = "skew_kl" or "skew_reverse_kl"' in written
    assert "0, or from 1e-06 to 0.999999" in written


def test_no_default_is_none():
    assert all(TABLES[table].model_fields[field].default is not None for table, field in FIELDS)


def test_every_line_of_read_when_is_about_a_field_and_tried_above():
    assert {f"{table}.{field}" for table, field, _ in UNREAD} == set(READ_WHEN)


WHOLE = [path for path in sorted(RECIPES.glob("*.toml")) if path.stem != "reference"]


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert load_recipe(path).data.source


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../other"])
def test_a_run_name_is_a_plain_name(name, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(MINIMAL)
    with pytest.raises(RecipeError, match="is not the plain name of a folder"):
        load_recipe(path, (*MODELS, f"run.name='{name}'"))


@pytest.mark.parametrize("field, kind", [("data.where", "a table"), ("eval.compare", "a list")])
def test_an_empty_value_is_not_proposed_again(field, kind):
    with pytest.raises(RecipeError, match=f"should be {kind}, found ''$"):
        load_recipe(Path(__file__).parents[1] / "recipes" / "cot50.toml", (f"{field}=",))
