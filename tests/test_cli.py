import json
import os
import subprocess
import sys

import pytest

from modicum import recipe
from modicum.cli import main
from modicum.registry import job
from modicum.schema import fields


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["modicum", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_help_and_import_load_no_torch():
    code = (
        "import sys; sys.argv = ['modicum', '--help']\nfrom modicum.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'pydantic', 'yaml'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_listing_loads_no_torch():
    code = (
        "import sys; sys.argv = ['modicum', 'list']\nfrom modicum.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert "Clip each gradient to a multiple" in found.stdout


def test_list_prints_every_table(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "list", "--json")
    tables = json.loads(out)
    assert code == 0 and {"merge_methods", "averagers", "jobs", "recipes", "policies"} <= tables.keys()
    assert {"linear", "task_arithmetic", "ties", "tsv"} <= set(tables["merge_methods"])
    assert {"train", "merge", "average", "evaluate", "pipeline", "attack", "synthesize"} <= set(tables["jobs"])
    assert {"linear", "llama_guard3", "qwen3guard", "wild_guard", "decision", "declines"} <= set(tables["judges"])
    assert {"plain", "template", "base64", "flip", "past_tense", "persuasion"} <= set(tables["attacks"])
    assert "route" in tables["jobs"] and "routed" in tables["models"]
    assert {"quickstart", "mediator"} <= set(tables["recipes"])


def test_show_prints_the_knobs_of_a_method(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "show", "ties")
    assert code == 0 and "density" in out and "float in (0, 1]" in out and "required" in out


def test_every_recipe_says_in_one_line_what_it_does(monkeypatch, capsys):
    _, out, _ = call(monkeypatch, capsys, "list", "recipes")
    lines = out.splitlines()[1:]
    assert lines and not [line for line in lines if not line.endswith((".", "?"))]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ties", ["density", "float in (0, 1] or list[float in (0, 1]]"]),  # brackets were taken for marks of colour
        ("grid", ["stages", "list[dict[str, Any]]"]),
        ("train", ["completion_only", "learn from the assistant's words only"]),  # of a section, which nothing listed
        ("train", ["data, eval_data: Where rows come from"]),
        ("train", ["gradient", "gradient rule or nothing"]),
        ("route", ["router", "its defaults"]),
        ("route", ["router: How the router is fitted"]),
        ("hub", ["no knobs"]),
    ],
)
def test_show_tells_every_key_that_a_recipe_may_have(monkeypatch, capsys, name, told):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = call(monkeypatch, capsys, "show", name)
    assert any(all(word in line for word in told) for line in out.splitlines()), out


@pytest.mark.parametrize("words", [("list",), ("show", "adagc"), ("show", "lozo"), ("show", "route"), ("show", "hub")])
def test_marks_of_the_documentation_stay_out_of_the_terminal(monkeypatch, capsys, words):
    _, out, _ = call(monkeypatch, capsys, *words)
    assert not any(mark in out for mark in (":math:", ":func:", ".. math::", "``", "doctest:"))


@pytest.mark.parametrize(
    "words", [("show", "tise"), ("list", "merge_method"), ("run", "quickstrat"), ("check", "a.yaml")]
)
def test_a_misspelt_name_exits_with_two_and_one_line(monkeypatch, capsys, words):
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and err.startswith("modicum: There is no") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show", "TIES"], "Did you mean 'ties'?"),  # capitals hid every likeness
        (["show", "merge_methods"], "It is a kind: modicum list merge_methods"),
        (["list", "Merge Methods"], "Did you mean 'merge_methods'?"),
        (["list", "ties"], "It is one of merge_methods: modicum show ties"),
        (["rum", "quickstart"], "Did you mean 'run'? See: modicum --help"),
        (["quickstart"], "Did you mean: modicum run quickstart? See: modicum --help"),
        (["mine.yaml"], "Did you mean: modicum run mine.yaml? See: modicum --help"),
        (["ties"], "Did you mean: modicum show ties? See: modicum --help"),
        (["qqq"], "Known: check, list, report, run, show, verify. See: modicum --help"),
        (
            ["run", "quickstart", "--sett", "a=1"],
            "No such option: --sett. Did you mean '--set'? See: modicum run --help",
        ),
        (["run", "quickstart", "-s"], "modicum: Option '-s' requires an argument. See: modicum"),
        (["run", "a", "b"], "(b). See: modicum run --help"),
        (["show"], "Missing argument 'NAME'. See: modicum show --help"),
    ],
)
def test_what_was_probably_meant_is_said(monkeypatch, capsys, words, told):
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and err.startswith("modicum: ") and told in err and err.count("\n") == 1


def test_version_is_told(monkeypatch, capsys):
    import modicum

    assert call(monkeypatch, capsys, "--version") == (0, f"modicum {modicum.__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "check", "list", "show", "verify", "report"])
def test_help_gives_examples_and_loses_no_word_to_markup(monkeypatch, capsys, command):
    code, out, _ = call(monkeypatch, capsys, command, "-h")
    assert code == 0 and "For example:" in out and f"modicum {command}" in out.partition("For example:")[2]
    assert "runs/." not in out  # <recipe> was taken for a mark


def test_a_folder_that_is_no_run_is_told_from_a_missing_file(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "check", str(tmp_path))
    assert code == 2 and "is a folder, expected a YAML file" in err


def test_the_folder_of_a_run_goes_on(monkeypatch, capsys, tmp_path):
    from support import tiny_family

    tiny_family(tmp_path)
    recipe = f"job: merge\nexperts: [{tmp_path}/one, {tmp_path}/two]\nmethod: linear\n"
    (tmp_path / "merge.yaml").write_text(recipe)
    capsys.readouterr()
    code, _, err = call(monkeypatch, capsys, "run", f"{tmp_path}/merge.yaml", "--out", f"{tmp_path}/made")
    assert code == 0 and err == f"A page about it: modicum report {tmp_path}/made\n"
    code, out, err = call(monkeypatch, capsys, "run", f"{tmp_path}/made")
    assert code == 0 and "is finished already" in err and f"{tmp_path}/made/model" in out
    code, _, err = call(monkeypatch, capsys, "run", f"{tmp_path}/made", "--out", f"{tmp_path}/again", "--quiet")
    assert code == 0 and not err and (tmp_path / "again/model/model.safetensors").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_path_that_lies_beside_the_recipe_is_said_to(monkeypatch, capsys, tmp_path, command):
    (tmp_path / "here").mkdir()
    for name in ("one", "two"):
        (tmp_path / "here" / name).mkdir()
    (tmp_path / "here/merge.yaml").write_text("job: merge\nexperts: [one, two]\nmethod: linear\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = call(monkeypatch, capsys, command, "here/merge.yaml")
    assert code == 2 and "one lies beside here/merge.yaml" in err and "run it in here." in err
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = call(monkeypatch, capsys, command, "merge.yaml")  # the folders are no models
    assert code == 2 and "lies beside" not in err


@pytest.mark.parametrize(
    ("words", "offered"),
    [("modicum run quick", "quickstart"), ("modicum show tie", "ties"), ("modicum list merge", "merge_methods")],
)
def test_a_shell_completes_names(words, offered):
    shell = {"COMP_WORDS": words, "COMP_CWORD": "2", "_MODICUM_COMPLETE": "complete_bash"}
    code = "import sys; sys.argv = ['modicum']\nfrom modicum.cli import main\nmain()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **shell})
    assert offered in found.stdout.split()


def test_recipes_on_the_way_to_a_file_are_completed(monkeypatch, tmp_path):
    from modicum.names import recipes_like

    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "more").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipes_like("m")[-2:] == ["mine.yaml", "more/"] and recipes_like("./min") == ["mine.yaml"]
    assert recipes_like(f"{tmp_path}/mi") == [f"{tmp_path}/mine.yaml"] and recipes_like("nowhere/a") == []


def test_names_are_listed_in_the_order_of_the_work_and_fit_a_terminal(monkeypatch, capsys):
    _, whole, _ = call(monkeypatch, capsys, "list")
    kinds = [line for line in whole.splitlines() if not line.startswith(" ")]
    assert kinds[0] == "sources:" and kinds[-2:] == ["jobs:", "recipes:"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    _, fitted, _ = call(monkeypatch, capsys, "list")
    assert max(map(len, fitted.splitlines())) <= 70 and fitted.split() == whole.split()


def test_traceback_is_shown_on_request(monkeypatch):
    from modicum.errors import RecipeError

    monkeypatch.setattr(sys, "argv", ["modicum", "check", "nowhere.yaml", "--traceback"])
    with pytest.raises(RecipeError):
        main()


def test_an_unexpected_error_exits_with_one(monkeypatch, capsys):
    monkeypatch.setattr("modicum.recipe.read", lambda _: 1 / 0)
    code, _, err = call(monkeypatch, capsys, "check", "quickstart")
    assert code == 1 and "ZeroDivisionError" in err


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modicum.recipe.read", interrupted)
    code, _, err = call(monkeypatch, capsys, "run", "quickstart")
    assert code == 130 and err == "modicum: interrupted; run the same command again to go on.\n"


def test_check_prints_the_resolved_recipe_and_the_plan(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "check", "quickstart")
    assert code == 0 and "plan:" in out and "is valid" in err


def test_the_command_line_is_frozen():
    from typer.main import get_command

    from modicum.cli import app

    commands = get_command(app).commands
    options = {name: sorted(o for p in c.params for o in p.opts if o.startswith("--")) for name, c in commands.items()}
    assert options == {
        "run": ["--on", "--out", "--quiet", "--set", "--traceback", "--workers"],
        "check": ["--out", "--set", "--traceback"],
        "list": ["--json"],
        "show": [],
        "report": ["--out", "--traceback"],
        "verify": ["--traceback"],
    }


KEYS = {
    "an assignment": ["run", "quickstart", "--set", "hf_abcdefghijklmnop1234"],
    "an address": ["check", "https://me:pass-word@host/recipe.yaml"],
    "a name": ["show", "sk-abcdefghijklmnop1234"],
}


@pytest.mark.parametrize("words", KEYS.values(), ids=KEYS)
def test_a_key_in_an_argument_is_not_repeated_in_the_error(monkeypatch, capsys, words):
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "(hidden)" in err and "abcdefghijkl" not in err and "pass-word" not in err


def test_a_key_in_an_unforeseen_error_is_hidden(monkeypatch, capsys):
    from modicum import cli

    def fails(*_):
        raise RuntimeError("cannot reach https://me:pass-word@proxy:80")

    monkeypatch.setattr(cli, "_load", fails)
    code, _, err = call(monkeypatch, capsys, "check", "quickstart")
    assert code == 1 and "https://(hidden)@proxy" in err


@pytest.mark.parametrize("name", job)
def test_every_key_of_a_recipe_and_its_sections_says_what_it_is(name):
    schema = recipe.job_schema(name)
    silent = [
        f"{kind.__name__}.{key}"
        for kind in (schema, *recipe.sections(schema))
        for key, *_, said in fields(kind)
        if not said
    ]
    assert not silent, f"{name}: say what these are, in Field(description=…): {', '.join(silent)}"


def test_a_librarys_warning_is_one_line_without_the_place_where_it_was_written(tmp_path):
    code = "import warnings, modicum.cli as c; "
    code += "c.app = lambda **_: warnings.warn('odd \\x1b[2J\\nthings', stacklevel=1); c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "modicum: warning: odd \\x1b[2J things\n"
