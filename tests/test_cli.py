"""What a person reads who made a mistake: one line that says where, what was asked, what was found
and what to do. Exit code 2.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from endings import STUDENT

COMMANDS = ("run", "plan", "teach", "show", "eval", "chat", "report", "doctor")


@pytest.fixture(scope="module")
def world(tiny_recipe, bytes_tokenizer, tmp_path_factory) -> Path:
    """Wrong data and wrong models beside the tiny world."""
    from tiny import model_folder

    root = tmp_path_factory.mktemp("wrong")
    lines = (tiny_recipe.parent / "rows.jsonl").read_text().splitlines()
    (root / "torn.jsonl").write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    (root / "columns.jsonl").write_text(
        "".join(json.dumps({"asked": "a", "cot": "b", "answer": "c"}) + "\n" for _ in lines)
    )
    (root / "plain.jsonl").write_text(
        "".join(json.dumps(json.loads(line) | {"cot": ""}) + "\n" for line in lines)
    )
    (root / "some-lack.jsonl").write_text(
        "".join(
            json.dumps({k: v for k, v in json.loads(line).items() if n % 3 != 1 or k != "cot"})
            + "\n"
            for n, line in enumerate(lines)
        )
    )
    (root / "empty").mkdir()
    model_folder(root / "foreign", bytes_tokenizer("qwen2_5", merges=(("a", "b"),)), layers=1)
    (root / "typo.toml").write_text(
        tiny_recipe.read_text().replace("fraction = 0.5", "fracton = 0.5")
    )
    (root / "broken.toml").write_text("[data\n")
    shutil.copytree(tiny_recipe.parent / "teacher", root / "torn-model")
    (root / "torn-model" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    shutil.copytree(tiny_recipe.parent / "teacher", root / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "no-tokenizer" / name).unlink()
    return root


@pytest.fixture
def error_of(tiny_recipe, world, command_line, tmp_path, monkeypatch):
    """The one line that a command ends with; `{tiny}`, `{wrong}`, `{out}` stand for folders and
    `RECIPE` for the tiny recipe.
    """

    def error_of(*words: str) -> str:
        places = {"tiny": tiny_recipe.parent, "wrong": world, "out": tmp_path}
        filled = [str(tiny_recipe) if word == "RECIPE" else word.format(**places) for word in words]
        result = command_line(
            *filled, *(["--set", f"run.folder={tmp_path}"] if filled[0] == "run" else [])
        )
        assert "Traceback" not in result.out + result.err, result.err
        lines = result.err.strip().splitlines()
        assert (result.code, len(lines)) == (2, 1), (result.code, result.out, result.err)
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return error_of


ERRORS = {
    "missing recipe": (
        ("run", "{tiny}/tinny.toml"),
        ("no recipe at {tiny}/tinny.toml", "did you mean {tiny}/tiny.toml?"),
    ),
    "a sweep's name": (("run", "fraction"), ("fraction is a sweep: `mlx-distill sweep fraction`",)),
    "a recipe's name": (("sweep", "cot50"), ("cot50 is a recipe: `mlx-distill run cot50`",)),
    "nothing to ask": (
        ("chat", "{tiny}/teacher", "--prompt", ""),
        ("--prompt is empty: say what to ask",),
    ),
    "an option's number": (
        ("chat", "{tiny}/teacher", "--prompt", "x", "--max-new-tokens", "0"),
        ("--max-new-tokens should be from 1 to 1,048,576, found 0",),
    ),
    "a row without a column": (
        ("show", "RECIPE", "--set", "data.source={wrong}/some-lack.jsonl"),
        ("line 2: no column 'cot', found prompt, answer; add it, or delete the row",),
    ),
    "recipe typo": (
        ("run", "{wrong}/typo.toml"),
        (
            "{wrong}/typo.toml: [truncation]",
            "'fracton'",
            "did you mean 'fraction'?",
            "Choices: keep",
        ),
    ),
    "not a recipe": (("run", "{wrong}/broken.toml"), ("{wrong}/broken.toml: not valid TOML",)),
    "wrong --set": (
        ("run", "RECIPE", "--set", "optim.steps=few"),
        ("[optim] steps", "a valid integer", "found 'few'"),
    ),
    "missing data file": (
        ("run", "RECIPE", "--set", "data.source={tiny}/row.jsonl"),
        ("data.source: {tiny}/row.jsonl is not there", "rows.jsonl", "name a .jsonl"),
    ),
    "wrong column": (
        ("run", "RECIPE", "--set", "data.source={wrong}/columns.jsonl"),
        (
            "columns.jsonl, line 1",
            "no column 'prompt'",
            "found asked, cot, answer",
            "data.prompt_column",
        ),
    ),
    "unreadable row": (
        ("run", "RECIPE", "--set", "data.source={wrong}/torn.jsonl"),
        ("torn.jsonl, line 4", "not valid JSON", "correct or delete the line"),
    ),
    "no reasoning in any row": (
        ("run", "RECIPE", "--set", "data.source={wrong}/plain.jsonl"),
        ("plain.jsonl: no usable example", "24 × no reasoning", "mark it with <think>"),
    ),
    "too few rows": (
        ("run", "RECIPE", "--set", "data.validation_examples=100"),
        ("asked for 100 validation", "lower data.validation_examples"),
    ),
    "model folder not found": (
        ("run", "RECIPE", "--set", "student.model={tiny}/nobody"),
        ("model '{tiny}/nobody'", "no such file or folder", "check the path"),
    ),
    "not a model": (
        ("run", "RECIPE", "--set", "student.model={wrong}/empty"),
        ("model '{wrong}/empty'", "no config.json", "name a folder in Hugging Face layout"),
    ),
    "a model without tokenizer": (
        ("run", "RECIPE", "--set", "student.model={wrong}/no-tokenizer"),
        ("tokenizer in {wrong}/no-tokenizer", "no tokenizer.json", "copy it"),
    ),
    "a model that does not load": (
        ("run", "RECIPE", "--set", "student.model={wrong}/torn-model"),
        ("{wrong}/torn-model",),
    ),
    "hub id offline": (
        ("run", "RECIPE", "--set", "teacher.model=nobody/nothing"),
        ("model 'nobody/nothing'", "cannot be fetched", "go online once, or give a local folder"),
    ),
    "hub data offline": (
        ("run", "RECIPE", "--set", "data.source=nobody/nothing"),
        ("data.source: nobody/nothing", "could not be loaded from the hub", "name a local .jsonl"),
    ),
    "vocabulary mismatch": (
        ("run", "RECIPE", "--set", "teacher.model={wrong}/foreign"),
        (
            "{wrong}/foreign cannot teach {tiny}/student: ",
            "teacher and student do not share a vocabulary: token ",
            "in the teacher's",
            "in the student's",
            "one family",
        ),
    ),
    "vocabulary mismatch in a plan": (
        ("plan", "RECIPE", "--set", "teacher.model={wrong}/foreign"),
        ("{wrong}/foreign cannot teach {tiny}/student: ", "one family"),
    ),
    "missing task file in a plan": (
        ("plan", "RECIPE", "--set", "eval.task=jsonl:{tiny}/row.jsonl"),
        ("no task file at {tiny}/row.jsonl",),
    ),
    "unknown backend in a plan": (
        ("plan", "RECIPE", "--backend", "jax"),
        ("--backend jax", "auto, mlx"),
    ),
    "no number of an example": (
        ("show", "RECIPE", "--example", "0"),
        ("--example should be from 1 to 1,000,000,000, found 0",),
    ),
    "no number of jobs": (
        ("sweep", "RECIPE", "--jobs", "0"),
        ("--jobs should be from 1 to 1,024, found 0",),
    ),
    "an option that there is not": (
        ("plan", "RECIPE", "--sett", "a=1"),
        ("No such option: --sett", "plan --help` says"),
    ),
    "escapes in a name": (("plan", "\x1b[2J\x07.toml"), ("no recipe at \\x1b[2J\\x07.toml",)),
    "lines in a name": (("plan", "a\nb.toml"), ("no recipe at a\\nb.toml",)),
    "a folder as recipe": (("plan", "{tiny}"), ("no recipe at {tiny}, which is a folder",)),
    "a device as recipe": (
        ("plan", "/dev/zero"),
        ("/dev/zero: a device or pipe, expected a file",),
    ),
    "a report in a file": (
        ("report", "{tiny}", "--out", "{tiny}/rows.jsonl"),
        ("no run in {tiny}",),
    ),
    "unknown task": (
        ("run", "RECIPE", "--set", "eval.task=gsm9k:x.jsonl"),
        ("no task 'gsm9k:x.jsonl'", "did you mean gsm8k:PATH", "Choices"),
    ),
    "missing task file": (
        ("run", "RECIPE", "--set", "eval.task=jsonl:{tiny}/row.jsonl"),
        ("no task file at {tiny}/row.jsonl", "did you mean {tiny}/rows.jsonl?"),
    ),
    "report on a missing run": (
        ("report", "{out}/none"),
        ("no run in {out}/none", "does not exist", "name a folder that `mlx-distill run` wrote"),
    ),
    "teach without a cache": (
        ("teach", "RECIPE"),
        ('[teacher] cache = "off" keeps nothing', "--set teacher.cache=top_k"),
    ),
    "a cache where none can be": (
        (
            "teach",
            "RECIPE",
            "--set",
            "teacher.cache=hidden",
            "--set",
            "teacher.cache_folder={tiny}/rows.jsonl",
        ),
        ("{tiny}/rows.jsonl", "cannot be written", "set teacher.cache_folder"),
    ),
    "a cache that cannot serve": (
        ("run", "RECIPE", "--set", "teacher.cache=hidden", "--set", "truncation.keep=suffix"),
        ('keep = "suffix" drops the context', 'set context = "keep"'),
    ),
    "unknown backend": (("run", "RECIPE", "--backend", "jax"), ("--backend jax", "auto, mlx")),
    "eval of nothing": (
        ("eval", "{out}/none", "--task", "jsonl:{tiny}/rows.jsonl"),
        ("model '{out}/none'", "check the path"),
    ),
    "chat with nothing": (("chat", "{out}/none"), ("model '{out}/none'",)),
    "chat at a wrong temperature": (
        ("chat", "{tiny}/teacher", "--temperature", "-1"),
        ("--temperature should be from 0 to 100, found -1",),
    ),
    "eval of a model without a task": (("eval", "{tiny}/teacher"), ("name one with --task",)),
    "eval with a wrong setting": (
        ("eval", "{tiny}/teacher", "--task", "jsonl:{tiny}/rows.jsonl", "--set", "exampels=3"),
        ("did you mean 'examples'?",),
    ),
    "eval of an unknown task": (
        ("eval", "{tiny}/teacher", "--task", "embedded:none"),
        ("no embedded task 'none'", "did you mean"),
    ),
    "show beyond the last": (
        ("show", "RECIPE", "--example", "99"),
        ("no training example 99; there are 1 to 20",),
    ),
    "show of a missing recipe": (("show", "{tiny}/none.toml"), ("no recipe at",)),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_mistake_is_one_line_and_exit_code_2(case, error_of, tiny_recipe, world, tmp_path):
    words, parts = ERRORS[case]
    message = error_of(*words)
    for part in parts:
        assert part.format(tiny=tiny_recipe.parent, wrong=world, out=tmp_path) in message, message


def test_an_unfinished_run_has_no_student_to_score(error_of, tiny_recipe, command_line, tmp_path):
    words = ("run", tiny_recipe, "--set", f"run.folder={tmp_path}")
    assert command_line(*words, at=f"{STUDENT}.accumulate").code == -9
    message = error_of("eval", "{out}/tiny", "--task", "jsonl:{tiny}/rows.jsonl")
    assert f"{tmp_path}/tiny holds a run without a finished student" in message


def test_a_damaged_student_is_not_asked(error_of, whole_run, tmp_path):
    run = shutil.copytree(whole_run("full"), tmp_path / "run")
    weights = run / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 64
    weights.write_bytes(content)
    task = ("--task", "jsonl:{tiny}/rows.jsonl", "--set", "examples=2")
    for words in (
        ("eval", "{out}/run", *task),
        ("eval", "{out}/run", "--set", "seed=7"),
        ("compare", "{out}/run", "{tiny}/teacher", *task, "--out", "{out}/compared"),
        ("chat", "{out}/run", "--prompt", "x"),
        ("export", "{out}/run", "--to", "hf"),
    ):
        message = error_of(*words)
        assert f"{weights} is damaged" in message and "`mlx-distill run` its recipe" in message
    assert not (run / "evals").exists() and not (run / "exports").exists()


def test_a_plan_needs_no_folder_for_runs(tiny_recipe, command_line, tmp_path):
    (tmp_path / "file").write_text("")
    result = command_line("plan", tiny_recipe, "--set", f"run.folder={tmp_path}/file")
    assert result.code == 0, result.err


def test_a_mistake_in_a_second_run_leaves_the_finished_one(
    error_of, tiny_recipe, command_line, tmp_path
):
    assert (
        command_line(
            "run", tiny_recipe, "--set", f"run.folder={tmp_path}", "--set", "eval.task="
        ).code
        == 0
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "optim.steps: 6 → 5" in error_of(
        "run", "RECIPE", "--set", "eval.task=", "--set", "optim.steps=5"
    )
    error_of(
        "run", "RECIPE", "--set", "eval.task=", "--fresh", "--set", "student.model=nobody/nothing"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_student_and_a_run_are_scored(tiny_recipe, command_line, tmp_path):
    assert (
        command_line(
            "run", tiny_recipe, "--set", f"run.folder={tmp_path}", "--set", "eval.task="
        ).code
        == 0
    )
    words = (
        "--task",
        f"jsonl:{tiny_recipe.parent}/rows.jsonl",
        "--set",
        "examples=2",
        "--set",
        "max_new_tokens=3",
    )
    results = [
        command_line("eval", name, *words)
        for name in (tmp_path / "tiny", tmp_path / "tiny" / "student")
    ]
    assert [result.code for result in results] == [0, 0], results[0].err
    for result in results:
        assert (
            "2 problems" in result.out
            and "95 % interval" in result.out
            and "unfinished" in result.out
        )


def test_a_finished_run_is_scored_later_and_otherwise(tiny_recipe, command_line, tmp_path):
    """By `eval`, where it lies now, or by `run`; what it learned stays as it is."""
    told = ("--set", f"run.folder={tmp_path}", "--set", "eval.task=")
    assert command_line("run", tiny_recipe, *told).code == 0
    folder = tmp_path / "moved" / "mine"
    folder.parent.mkdir()
    (tmp_path / "tiny").rename(folder)
    weights = (folder / "student" / "model.safetensors").read_bytes()
    refused = command_line("eval", folder)
    assert refused.code == 2
    assert "the run's recipe has no [eval] task: name one" in refused.err

    asked = {"task": f"jsonl:{tiny_recipe.parent}/rows.jsonl", "examples": 2, "max_new_tokens": 3}
    sets = [word for item in asked.items() for word in ("--set", "{}={}".format(*item))]
    scored = command_line("eval", folder, *sets)
    assert scored.code == 0, scored.err
    assert "eval.examples: 4 → 2" in scored.out and "2 problems" in scored.out
    first = json.loads((folder / "eval.json").read_text())
    assert set(first["scores"]) == {"teacher", "base", "student"}
    assert "student before" in (folder / "report.md").read_text()
    assert "--out goes with --task" in command_line("eval", folder, "--out", tmp_path).err

    again = command_line("eval", folder)
    assert again.code == 0 and again.out.count("2 problems") == 3 and "scoring" not in again.out
    assert json.loads((folder / "eval.json").read_text()) == first
    eval_sets = [word for item in asked.items() for word in ("--set", "eval.{}={}".format(*item))]
    place = ("--set", f"run.folder={folder.parent}", "--set", "run.name=mine")
    words = ("run", tiny_recipe, *place, *eval_sets)
    same = command_line(*words)
    assert same.code == 0 and "scoring" not in same.out and same.out.count("2 problems") == 3
    longer = command_line(*words, "--set", "eval.max_new_tokens=4")
    assert longer.code == 0 and "eval.max_new_tokens: 3 → 4" in longer.out
    assert longer.out.count("scoring student 2/2") == 1
    assert (folder / "student" / "model.safetensors").read_bytes() == weights
    steps = command_line(*words, "--set", "optim.steps=5")
    assert steps.code == 2 and "optim.steps: 6 → 5" in steps.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, command_line):
    result = command_line(command, "--help")
    assert result.code == 0 and "Usage" in result.out and "--help" in result.out


def test_help_names_every_command(command_line):
    result = command_line("--help")
    assert result.code == 0 and all(command in result.out for command in COMMANDS)
    assert command_line("--version").out.strip().count(".") == 2


# how a process ends


def ended(words: str, **how) -> subprocess.CompletedProcess:
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | how
    return subprocess.run([sys.executable, "-m", "mlx_distill", *words.split()], **how)


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path):
    """The first of them sends it; without a handler from the program's first lines this is a
    traceback.
    """
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    result = ended("plan", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stderr) == (130, "stopped\n")


def test_ctrl_c_while_the_interpreter_is_taken_down_leaves_no_traceback():
    """A library that cleans up after itself takes long enough for a second Ctrl-C."""
    program = (
        "import atexit, os, signal\n"
        "from mlx_distill.terminal.ending import run_to_its_end\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "run_to_its_end(lambda: 130)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        result = ended("--version", stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (
        2,
        "error: the output cannot be written: No space left on device\n",
    )


def test_a_working_folder_that_is_gone_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    result = ended("--version", cwd=gone, preexec_fn=gone.rmdir)
    assert result.returncode == 2 and result.stderr.startswith(
        "error: the working folder cannot be used"
    )
    assert len(result.stderr.splitlines()) == 1


# what is imported when

WATCHED = """
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in FRAMEWORKS:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            ours.append((name, "mlx_distill" in frame.f_globals.get("__name__", "")))
FRAMEWORKS = ("mlx", "torch", "transformers")
ours = []
sys.meta_path.insert(0, Watch())
for words in {commands}:
    sys.argv = ["mlx-distill", *words]
    try:
        {code}
    except SystemExit as end:
        assert not end.code, words
    found = [name for name in FRAMEWORKS if name in sys.modules]
    print("IMPORTED", found, sorted({{name for name, by_us in ours if by_us}}))
"""
MAIN = "from mlx_distill.cli import main; main()"


def imported(*commands: list[str], code: str = MAIN) -> list[str]:
    """After each command: of mlx, torch and transformers those imported, those imported by a module
    of ours.
    """
    program = WATCHED.format(commands=commands, code=code)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("IMPORTED ")]
    return [line.removeprefix("IMPORTED ") for line in lines]


def test_help_and_recipes_import_no_framework(tiny_recipe):
    assert imported(["--help"]) == ["[] []"]
    code = (
        "from pathlib import Path; from mlx_distill.recipe.load import load_recipe; "
        f"load_recipe(Path({str(tiny_recipe)!r}))"
    )
    assert imported([], code=code) == ["[] []"]


def test_what_computes_nothing_imports_no_framework(tiny_recipe, tmp_path):
    """transformers reads the tokenizer, and takes torch for not installed."""
    sweep = tmp_path / "sweep.toml"
    axes = "[axes]\ntruncation.fraction = [0.5, 1.0]\n"
    sweep.write_text(f'recipe = "{tiny_recipe}"\nfolder = "{tmp_path}"\n{axes}')
    commands = (
        ["show", str(tiny_recipe)],
        ["plan", str(tiny_recipe)],
        ["sweep", str(sweep), "--dry-run"],
    )
    assert imported(*commands) == ["['transformers'] ['transformers']"] * 3
