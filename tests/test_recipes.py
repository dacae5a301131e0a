"""Recipes: what a file means, what is refused, and that every recipe that comes with quantkit runs
from its first step to its last, on a small model of the same architecture and layout."""

import shlex
import subprocess
import sys
import tomllib

import click
import pytest
from tools import command, model, read_json, sentence

from quantkit import data
from quantkit.cli.main import cli
from quantkit.cli.run import vocabulary
from quantkit.core import recipe
from quantkit.core.recipe import Key, Step
from quantkit.errors import UsageError

OPTIONS = {
    "cook": {
        "model": Key("str"),
        "out": Key("str"),
        "bits": Key("int"),
        "damp": Key("float"),
        "fast": Key("bool"),
        "order": Key("str", choices=("none", "static")),
        "calib": Key("str", several=True),
    },
    "taste": {"model": Key("str"), "against": Key("str"), "rows": Key("int")},
    "pack": {"model": Key("str"), "out": Key("str"), "to": Key("str")},
    "rank": {"models": Key("str", several=True)},
}


def assemble(text, **settings):
    return recipe.assemble(tomllib.loads(text), OPTIONS, "r.toml", **settings).steps


def refused(text, **settings):
    with pytest.raises(UsageError) as caught:
        assemble(text, **settings)
    return f"{caught.value.message} | {caught.value.hint}"


CHAIN = """
about = "a chain"
model = "owner/name"
out = "name-small"
[[step]]
command = "cook"
bits = 3
[[step]]
command = "taste"
against = "$model"
[[step]]
command = "pack"
to = "box"
out = "$out-box"
[[step]]
command = "taste"
"""

# what a file means


def test_every_step_works_on_what_the_one_before_wrote():
    assert assemble(CHAIN) == [
        Step("cook", {"bits": 3, "model": "owner/name", "out": "name-small"}),
        Step("taste", {"against": "owner/name", "model": "name-small"}),
        Step("pack", {"to": "box", "out": "name-small-box", "model": "name-small"}),
        Step("taste", {"model": "name-small-box"}),
    ]


def test_another_model_and_folder():
    steps = assemble(CHAIN, model="here", out="there")
    assert [step.options["model"] for step in steps] == ["here", "there", "there", "there-box"]
    assert steps[1].options["against"] == "here"


def test_another_model_and_folder_than_the_first_step_says_itself():
    text = '[[step]]\ncommand = "cook"\nmodel = "a"\nout = "x"\n[[step]]\ncommand = "taste"\n'
    first, second = assemble(text, model="here", out="there")
    assert first.options == {"model": "here", "out": "there"}
    assert second.options == {"model": "there"}
    text = '[[step]]\ncommand = "rank"\nmodels = ["a", "b"]'
    assert assemble(text, model="here")[0].options == {"models": ["here"]}


def test_several_models_are_what_was_written_before():
    text = CHAIN + '[[step]]\ncommand = "rank"\n'
    assert assemble(text)[-1].options == {"models": ["name-small-box"]}


def test_a_single_command_needs_no_step():
    assert assemble('command = "cook"\nmodel = "m"\nbits = 4\ndamp = 1') == [
        Step("cook", {"bits": 4, "damp": 1, "model": "m"})
    ]


def test_a_step_may_have_a_model_of_its_own():
    text = '[[step]]\ncommand = "taste"\nmodel = "a"\n[[step]]\ncommand = "taste"\nmodel = "b"'
    assert [step.options["model"] for step in assemble(text)] == ["a", "b"]


def test_one_value_of_several_may_stand_alone():
    assert assemble('command = "cook"\nmodel = "m"\ncalib = "a"')[0].options["calib"] == ["a"]


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("bits=2", "bits", 2),
        ("cook.bits = 2", "bits", 2),
        ("damp=1", "damp", 1.0),
        ("fast=true", "fast", True),
        ("fast=False", "fast", False),
        ("order=none", "order", "none"),
        ("cook.out=3", "out", "3"),
        ("calib=a.csv:x=3", "calib", ["a.csv:x=3"]),
        ('calib=["a", "b"]', "calib", ["a", "b"]),
    ],
)
def test_set(change, key, value):
    found = assemble(CHAIN, changes=[change])[0].options[key]
    assert found == value and type(found) is type(value)


def test_set_takes_names_as_they_are_typed_at_the_command():
    vocabulary = {"cook": {"model": Key("str"), "out": Key("str"), "at_once": Key("int")}}
    text = 'model = "a/b"\n[[step]]\ncommand = "cook"\nat_once = 1'
    (step,) = recipe.assemble(tomllib.loads(text), vocabulary, "r", changes=["at-once=2"]).steps
    assert step.options["at_once"] == 2


def test_set_reaches_every_step_that_has_the_option_or_the_named_ones():
    steps = assemble(CHAIN, changes=["rows=2"])
    assert [step.options.get("rows") for step in steps] == [None, 2, None, 2]
    steps = assemble(CHAIN, changes=["pack.out=x"])
    assert [step.options.get("out") for step in steps] == ["name-small", None, "x", None]


# what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"', "a step has no command | one of cook, taste, pack"),
        ('command = "coook"', "no command 'coook' | did you mean 'cook'?"),
        ('command = "cook"\nbit = 3', "cook has no option 'bit' | did you mean 'bits'?"),
        ('command = "cook"\nbits = "3"', "bits should be a whole number, not '3'"),
        ('command = "cook"\nbits = true', "bits should be a whole number, not True"),
        ('command = "cook"\nbits = 3.0', "bits should be a whole number, not 3.0"),
        ('command = "cook"\ndamp = "a"', "damp should be a number, not 'a'"),
        ('command = "cook"\nfast = 1', "fast should be true or false, not 1"),
        ('command = "cook"\nout = 3', "r.toml: out should be text, not 3"),
        ('command = "cook"\norder = "x"', "order cannot be 'x' | use none, static"),
        ('command = "cook"\ncalib = ["a", 2]', "calib should be text, not 2"),
        ('command = "cook"', "step 1 (cook) does not say which model"),
        ('command = "taste"\nagainst = "$model"', "speaks of $model"),
        ('abot = "x"\n[[step]]\ncommand = "cook"', "outside of a [[step]] | did you mean 'about"),
        ("step = 3", "steps are written as [[step]]"),
        ("step = []", "steps are written as [[step]]"),
        (CHAIN.replace('out = "$out-box"', ""), "step 3 (pack) does not say where to write"),
        (CHAIN.replace('out = "name-small"', ""), "speaks of $out"),
        (CHAIN.replace("$out-box", "./$out/../name-small"), "is there already: step 1 writes it"),
        ('command = ["cook"]', "command should be text, not ['cook']"),
    ],
)
def test_refusals(text, message):
    assert message in refused(text)


def test_what_would_change_nothing_is_refused():
    taste = 'command = "taste"\nmodel = "m"'
    assert "--out changes nothing, as taste has no out" in refused(taste, out="x")
    assemble(taste + '\nagainst = "$out"', out="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bits", "'bits' sets nothing"),
        ("bit=3", "no option 'bit' | did you mean 'bits'?"),
        ("taste.bits=3", "no option 'bits' | there are model, against, rows"),
        ("tast.rows=3", "no step 'tast' | did you mean 'taste'?"),
        ("bits=many", "bits should be a whole number, not 'many'"),
        ("bits=3.0", "bits should be a whole number"),
        ("fast=1", "fast should be true or false"),
        ("order=x", "order cannot be 'x'"),
        ("calib=[a", "no TOML"),
        ("calib=[1]", "calib should be text, not 1"),
    ],
)
def test_refused_changes(change, message):
    if message == "no TOML":  # it is the name of a file, then
        assert assemble(CHAIN, changes=[change])[0].options["calib"] == ["[a"]
    else:
        assert message in refused(CHAIN, changes=[change])


def test_files(tmp_path):
    def find(name):
        with pytest.raises(UsageError) as caught:
            recipe.read(recipe.find(name))
        return f"{caught.value.message} | {caught.value.hint}"

    assert recipe.find("demo") == data.recipes() / "demo.toml"
    assert "no recipe 'dem' | did you mean 'demo'?" in find("dem")
    assert "there is no recipe nowhere/demo" in find("nowhere/demo")
    assert "there is no recipe none.toml" in find("none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    assert "bad.toml is not TOML" in find(str(tmp_path / "bad.toml"))
    (tmp_path / "bad.toml").write_bytes(b"a = '\xff'")
    assert "bad.toml is not TOML" in find(str(tmp_path / "bad.toml"))


# the command


def shown(out):
    """The steps that ``--dry-run`` prints, as words."""
    return [shlex.split(line)[4:] for line in out.splitlines() if line.startswith("step ")]


def write(path, text):
    path.write_text(text, "utf-8")
    return path


TWO = """
[[step]]
command = "generate"
model = "demo"
prompt = "- of the city"
chat = false
max_new_tokens = 3
stop = ["a", "b"]
[[step]]
command = "verify"
model = "%s"
"""


def test_steps_are_shown_as_they_would_be_typed(tmp_path, capsys):
    file = write(tmp_path / "r.toml", TWO % "x")
    assert command("run", file, "--dry-run", "--set", "samples=false") == 0
    assert [" ".join(words) for words in shown(capsys.readouterr().out)] == [
        "quantkit generate --stop a --stop b --max-new-tokens 3 --raw -- demo - of the city",
        "quantkit verify --no-samples x",
    ]


def test_json_is_a_key_like_others(tmp_path, capsys):
    text = '[[step]]\ncommand = "bench"\nmodel = "demo"\njson = "b.json"\n'
    text += '[[step]]\ncommand = "verify"\nmodel = "x"\njson = true'
    assert command("run", write(tmp_path / "r.toml", text), "--dry-run") == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one.endswith("quantkit bench --json b.json demo")
    assert two.endswith("quantkit verify --json x")


def test_a_step_is_shown_on_one_line(tmp_path, capsys):
    text = (TWO % "x").replace('"- of the city"', '"""a\n\'b\' \\\\ c"""')
    assert command("run", write(tmp_path / "r.toml", text), "--dry-run") == 0
    assert " $'a\\n\\'b\\' \\\\ c'\n" in capsys.readouterr().out


def test_all_steps_are_checked_before_the_first_one_runs(tmp_path, capsys):
    file = write(tmp_path / "r.toml", TWO.replace("prompt", "#") % "x")
    assert command("run", file) == 2
    message, _ = sentence(capsys.readouterr().err)
    assert message == "step 1 (generate): there is no prompt"
    file = write(tmp_path / "r.toml", (TWO % "x") + 'rows = "1"\n')
    assert command("run", file) == 2
    captured = capsys.readouterr()
    assert "rows should be a whole number" in sentence(captured.err)[0]
    assert not captured.out
    for limit in ('"many"', "nan", '"en=-1"'):
        text = '[[step]]\ncommand = "verify"\nmodel = "demo"\nmax_kl = ' + limit
        assert command("run", write(tmp_path / "r.toml", (TWO % "x") + text)) == 2
        captured = capsys.readouterr()
        assert "step 3 (verify): --max-kl takes a number" in sentence(captured.err)[0]
        assert not captured.out
    text = '[[step]]\ncommand = "verify"\nmodel = "demo"\nrows = 0'
    assert command("run", write(tmp_path / "r.toml", (TWO % "x") + text)) == 2
    captured = capsys.readouterr()
    assert "'--rows': 0 is not in the range" in sentence(captured.err)[0]
    assert not captured.out
    assert command("run", write(tmp_path / "r.toml", 'command = "cache"')) == 2
    assert "no command 'cache'" in sentence(capsys.readouterr().err)[0]


def test_from_begins_later_and_a_failing_step_ends_the_chain(tmp_path, capsys):
    file = write(
        tmp_path / "r.toml",
        (TWO + '[[step]]\ncommand = "inspect"\nmodel = "demo"\n') % "no/where/x",
    )
    assert command("run", file, "--from", "2") == 1
    captured = capsys.readouterr()
    assert "step 2 of 3" in captured.err and "step 3" not in captured.err
    assert "there is no folder no/where/x" in captured.err
    assert not captured.out
    assert command("run", file, "--from", "4") == 2
    assert "has 3 steps, and no step 4" in capsys.readouterr().err


def test_checking_a_recipe_is_light(tmp_path):
    file = write(tmp_path / "r.toml", 'command = "gptq"\nmodel = "demo"\nbit = 3')
    program = (
        "import sys\n"
        "from quantkit.cli.main import main\n"
        "try:\n"
        f"    main(['run', {str(file)!r}])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "did you mean 'bits'?" in result.stderr


def test_list(capsys):
    assert command("run", "--list") == 0
    out = capsys.readouterr().out
    for file in recipe.bundled().values():
        assert file.stem in out
        assert len(recipe.read(file)["about"]) > 20


# those that come with quantkit

WIDE = {"hidden_size": 128, "intermediate_size": 256}
HEADS = {"head_dim": 32}
STAND_INS = {
    "weblab-10b-gptq": ("gpt_neox", {**WIDE, "shard": "600KB"}),
    "llama2-13b-gptq-actorder": ("llama", {**WIDE, **HEADS, "shard": "600KB"}),
    "deepseek-67b-awq": ("llama", {**WIDE, **HEADS, "shard": "600KB"}),
    "synthia-7b-nf4": ("mistral", {**WIDE, **HEADS, "sliding_window": None}),
    "mistral-7b-gguf": ("mistral", {**WIDE, **HEADS, "sliding_window": None}),
    "demo": ("llama_tied", {**WIDE, **HEADS}),
}
# what keeps a test short, where a step has such an option
SHORT = {
    "calib": '["bundled:en=2"]',
    "calib_seqlen": "48",
    "seqlen": "32",
    "rows": "1",
    "max_new_tokens": "4",
    "samples": "false",
    "check": "false",
    "max_kl": "9",
    "device": "cpu",
}


def commands():
    context = click.Context(cli)
    names = [name for name in cli.list_commands(context) if name != "run"]
    return vocabulary({name: cli.get_command(context, name) for name in names})


def bundled():
    """Every recipe."""
    return [pytest.param(file, id=file.stem) for file in recipe.bundled().values()]


def short(file):
    """Arguments that keep the recipe's run short."""
    known = commands()
    keys = {key for step in recipe.read(file)["step"] for key in known.get(step["command"], ())}
    return [word for key in SHORT if key in keys for word in ("--set", f"{key}={SHORT[key]}")]


def stand_in(file):
    name, changes = STAND_INS[file.stem]
    return model(name, **changes)


def test_every_recipe_has_its_stand_in():
    assert {file.stem for file in recipe.bundled().values()} == STAND_INS.keys()


@pytest.mark.parametrize("file", bundled())
def test_recipe_dry_runs(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", stand_in(file), "--dry-run", *short(file)]
    assert command("run", file.stem, *arguments) == 0, capsys.readouterr().err
    steps = shown(capsys.readouterr().out)
    assert len(steps) == len(recipe.read(file)["step"])
    assert steps[0][-1] == str(stand_in(file))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", bundled())
def test_recipe_runs_from_end_to_end(file, tmp_path, capsys):
    out = tmp_path / "small"
    arguments = ["--model", stand_in(file), "--out", out, *short(file)]
    assert command("run", file.stem, *arguments) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    steps = recipe.read(file)["step"]
    assert [step["command"] for step in steps][1:] == ["verify", "convert", "generate"]
    assert f"step {len(steps)} of {len(steps)}" in captured.err
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 2 and folders[0] == "small", folders
    converted = read_json(tmp_path / folders[1] / "quantkit.json")["conversion"]
    assert converted["exact"] is (steps[2]["to"] != "dense:bf16"), converted
