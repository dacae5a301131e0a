"""The command line: light, the same options as in Python, and errors that are one sentence."""

import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tools import QUICK_OPTIONS, command, model, quantized, read_json, sentence
from transformers import BertConfig, BertModel

import quantkit
from quantkit import data
from quantkit.cli import awq, bnb, compare, convert, generate, gguf, gptq, push, rtn, verify
from quantkit.cli import eval as eval_command
from quantkit.cli import inspect as inspect_command
from quantkit.cli.main import cli
from quantkit.core.checkpoint import INDEX, ShardWriter
from quantkit.formats import TARGETS
from quantkit.formats import gguf as gguf_format
from quantkit.workflows import convert_kquants, convert_targets
from quantkit.workflows import gguf as gguf_workflow
from quantkit.workflows.quantize import quantize

# light


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["gptq", "-h"], ["verify", "-h"], ["run", "-h"]]
)
def test_help_imports_neither_torch_nor_transformers(arguments):
    program = (
        "import sys\n"
        "from quantkit.cli.main import main\n"
        "try:\n"
        f"    main({arguments})\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "print('LOADED', *sorted(m for m in sys.modules if '.' not in m))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    shown, _, loaded = result.stdout.rpartition("LOADED ")
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "rich"}
    assert not heavy & set(loaded.split())
    assert "Usage: " in shown or quantkit.__version__ in shown


def test_importing_quantkit_is_light_and_knows_its_functions():
    program = (
        "import sys, quantkit\n"
        "assert not {'torch', 'transformers', 'click', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    methods = {"quantize", *(f"quantize_{name}" for name in ("awq", "bnb", "gguf", "rtn"))}
    others = {
        "convert",
        "compare",
        "evaluate",
        "verify",
        "generate",
        "stream_generate",
        "inspect",
        "load",
        "push",
    }
    assert set(quantkit.__all__) == methods | others
    assert all(callable(getattr(quantkit, name)) for name in quantkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = quantkit.quantise


def test_every_command_is_listed_with_its_help(capsys):
    assert command("--help") == 0
    shown = capsys.readouterr().out
    context = click.Context(cli)
    for name in cli.list_commands(context):
        assert name in shown
        assert cli.get_command(context, name).help
    assert command("--version") == 0
    assert quantkit.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told", "hint"),
    [
        ("serve --port", "option '--port' requires an argument", "see 'quantkit serve --help'"),
        ("serve", "missing argument 'MODEL...'", "see 'quantkit serve --help'"),
        ("gptq demo --bits x", "'x' is not a valid integer", "see 'quantkit gptq --help'"),
        ("gptq demo --bitz 3", "no such option '--bitz'", "did you mean --bits or --quiet?"),
        (
            "bnb demo --type q",
            "'q' is not one of 'nf4', 'fp4', 'int8'",
            "see 'quantkit bnb --help'",
        ),
        ("gtpq demo", "there is no command 'gtpq'", "did you mean gptq?"),
        ("zzz", "there is no command 'zzz'", "see 'quantkit --help'"),
        ("cache wipe", "no such command 'wipe'", "see 'quantkit cache --help'"),
        ("--bitz", "no such option '--bitz'", "see 'quantkit --help'"),
        ("generate demo", "there is no prompt", "--in FILE"),
        ("generate demo --in x", "--in has no file for the answers", "add --out"),
        ("generate demo --out x", "--out is for the answers", "add --in"),
        ("generate demo hello --in x --out y", "both a prompt and --in", "leave one"),
    ],
)
def test_a_command_line_that_cannot_be_is_told_in_a_sentence(capsys, line, told, hint):
    assert command(*line.split()) == 2
    sentence_, hint_ = sentence(capsys.readouterr().err)
    assert told in sentence_ and not sentence_.endswith(".")
    assert hint in hint_


def test_without_arguments_there_is_help(capsys):
    assert command() == 2
    assert "Commands:" in capsys.readouterr().err


# options are parameters

ONLY_HERE = {"quiet", "push", "profile", "as_json", "report", "lang", "junit", "github"}
OF_FILES = {"in", "answers", "column", "batch", "encoding", "overwrite"}  # generate's: answer_file
ONLY_IN_PYTHON = {"progress", "write", "note"}


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        (gptq, quantize, ["demo"]),
        (awq, quantkit.quantize_awq, ["demo"]),
        (rtn, quantkit.quantize_rtn, ["demo"]),
        (bnb, quantkit.quantize_bnb, ["demo"]),
        (gguf, quantkit.quantize_gguf, ["demo"]),
        (convert, quantkit.convert, ["demo", "--to", "awq"]),
        (verify, quantkit.verify, ["demo"]),
        (compare, quantkit.compare, ["demo"]),
        (eval_command, quantkit.evaluate, ["demo", "--tasks", "x"]),
        (generate, quantkit.generate, ["demo", "hello"]),
        (inspect_command, quantkit.inspect, ["demo"]),
        (push, quantkit.push, ["folder", "me/model"]),
    ],
    ids=[
        "gptq",
        "awq",
        "rtn",
        "bnb",
        "gguf",
        "convert",
        "verify",
        "compare",
        "eval",
        "generate",
        "inspect",
        "push",
    ],
)
def test_options_are_parameters_with_the_same_defaults(module, function, arguments):
    parameters = inspect.signature(function).parameters
    given = module.command.make_context("quantkit", arguments).params
    only_in_python = ONLY_IN_PYTHON - given.keys()
    only_here = ONLY_HERE | OF_FILES if module is generate else ONLY_HERE
    assert given.keys() - only_here == parameters.keys() - only_in_python
    for name, parameter in parameters.items():
        if name in only_in_python or parameter.default is inspect.Parameter.empty:
            continue
        wanted = parameter.default
        # one source and a list of one are the same
        several = (wanted,) if name == "calib" and wanted else wanted or None
        assert (given[name] or None) == several, name


def test_the_formats_that_a_recipe_may_name_are_those_that_are_written():
    written = {name.replace("compressed_tensors", "compressed-tensors") for name in TARGETS}
    assert set(convert.FORMATS) == written | {"dense", "gguf"}
    plain = set(gguf_workflow.PLAIN)
    types = {*gguf_format.WRITTEN, *plain, *convert_kquants.TYPES}
    assert set(convert.FORMATS["gguf"]) == {kind.lower() for kind in types}
    assert len(convert.FORMATS["dense"]) == len(convert_targets.DENSE)


def test_options_arrive(monkeypatch, tmp_path):
    """All of them, under the right name, with a value that is not the default."""
    heard = {}

    def listen(model, **settings):
        heard.update(settings, model=model)
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.workflows.quantize.quantize", listen)
    options = (
        "gptq owner/name --out x -b 3 -g 64 --asym --rule *.o_proj:skip --target-bits 4.5 "
        "--target-size 6GB --act-order none --damp 0.05 --fast "
        "--align 0.3 --refine 1 --no-scale-search --no-bias-correction -c a.txt=3 -c self "
        "--tokens-per-input 12 "
        "--calib-rows 7 --calib-seqlen 99 --seed 5 --device cpu --dtype float32 "
        "--format gptq_v2 --max-shard-size 1GB --no-check --strict --overwrite "
        "--lm-head --low-disk --legacy-name old-4bit --dry-run --revision v1 "
        "--max-gpu-memory 6GB --max-memory 4GB -q"
    )
    assert command(*options.split()) == 130
    del heard["progress"]
    assert heard == {
        "model": "owner/name",
        "out": "x",
        "bits": 3,
        "group": 64,
        "sym": False,
        "rule": ("*.o_proj:skip",),
        "target_bits": 4.5,
        "target_size": "6GB",
        "act_order": "none",
        "damp": 0.05,
        "fast": True,
        "align": 0.3,
        "refine": 1,
        "scale_search": False,
        "bias_correction": False,
        "tokens_per_input": 12,
        "lm_head": True,
        "low_disk": True,
        "legacy_name": "old-4bit",
        "max_gpu_memory": "6GB",
        "max_memory": "4GB",
        "calib": ["a.txt=3", "self"],
        "calib_rows": 7,
        "calib_seqlen": 99,
        "seed": 5,
        "device": "cpu",
        "dtype": "float32",
        "format": "gptq_v2",
        "max_shard_size": "1GB",
        "check": False,
        "strict": True,
        "overwrite": True,
        "dry_run": True,
        "revision": "v1",
    }
    defaults = inspect.signature(quantize).parameters
    assert heard.keys() == defaults.keys() - ONLY_IN_PYTHON
    assert [name for name, value in heard.items() if value == defaults[name].default] == []


# what is printed


def test_quantizing_tells_what_it_does_and_what_comes_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("gptq", model("gpt_neox"), "-g", 32, *QUICK_OPTIONS[:-1], "--check") == 0
    out, err = capsys.readouterr()
    assert "2 blocks, 8 linears" in err
    assert "1/2 gpt_neox.layers.0" in err and "2/2 gpt_neox.layers.1" in err
    assert "on held-out text" in out and "Japanese" in out
    assert "wrote gpt_neox-gptq-4bit-32g, " in out
    assert "quantkit verify gpt_neox-gptq-4bit-32g" in out
    assert (tmp_path / "gpt_neox-gptq-4bit-32g" / "config.json").exists()


def test_quiet_says_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    options = [*QUICK_OPTIONS, "--damp", 0.1, "-q", "--out", out]
    assert command("gptq", model("gpt_neox"), "-g", 32, *options) == 0
    assert capsys.readouterr() == ("", "")
    assert out.exists()


def test_names_with_brackets_are_shown_as_they_are(tmp_path, capsys):
    source = tmp_path / "model[v2]"
    shutil.copytree(model("gpt_neox"), source)
    out = tmp_path / "out[bold]"
    assert command("gptq", source, "-g", 32, *QUICK_OPTIONS, "--out", out) == 0
    shown = capsys.readouterr()
    assert "model[v2]: 2 blocks" in shown.err
    assert f"wrote {out}, " in shown.out
    assert command("inspect", out) == 0
    shown = capsys.readouterr().out
    assert "out[bold]" in shown and "model[v2]" in shown


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("gptq", "demo", *QUICK_OPTIONS, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "28 linears" in err and "of memory at most" in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_what_a_folder_holds(capsys):
    assert command("inspect", quantized(), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"kind": "gptq", "bits": 4, "group": 128, "sym": True, "linears": 28}
    wanted |= {"convention": "v1", "act_order": False, "architecture": "LlamaForCausalLM"}
    assert {key: found[key] for key in wanted} == wanted
    assert found["bits_per_weight"] == pytest.approx(4 + 20 / 128)
    assert found["provenance"]["source"]["name"] == "demo"
    weights = load_file(data.demo() / "model.safetensors")
    dense = sum(tensor.numel() for tensor in weights.values())
    assert found["parameters"] == dense
    assert command("inspect", "demo", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["bits"], found["parameters"]) == ("dense", None, dense)
    for name, words in (
        ("demo", ["full precision"]),
        (quantized(), ["GPTQ", "groups of 128", "v1"]),
    ):
        assert command("inspect", name) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)


def test_inspect_tells_when_files_and_tensors_disagree(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(quantized(model("gpt_neox"), group=32), folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"gptq",\n    "pack', '"gptq_v2",\n    "pack'))
    assert command("inspect", folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["convention"], found["declared"]) == ("v1", "v2")
    errors = [finding for finding in found["findings"] if finding["level"] == "error"]
    assert len(errors) == 1 and "v2" in errors[0]["text"] and errors[0]["repairable"]


def test_a_run_that_is_stopped_says_how_to_go_on(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.workflows.quantize.quantize", stop)
    assert command("gptq", "demo") == 130
    assert sentence(capsys.readouterr().err.lstrip("\n")) == (
        "stopped",
        "run the same command again to go on from here",
    )
    monkeypatch.setattr("quantkit.workflows.generate.generate", stop)
    assert command("generate", "demo", "hello") == 130
    assert sentence(capsys.readouterr().err.lstrip("\n")) == ("stopped", "")


def test_a_reader_that_goes_away_is_no_error():
    """quantkit ... | head"""
    program = (
        f"from quantkit.cli.main import main; main(['inspect', {str(quantized())!r}, '--json'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 1
    assert err == ""


# errors


@pytest.fixture
def copy(tmp_path):
    """A tiny model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(model("gpt_neox"), folder)
    return folder


def refused(capsys, source: object, *options: object, code: int = 1) -> tuple[str, str]:
    """Quantizing must fail with this exit code, say one sentence, and leave nothing behind."""
    home = Path(source).parent if isinstance(source, Path) else Path.cwd()
    before = sorted(home.iterdir())
    assert (
        command("gptq", source, "-g", 32, *QUICK_OPTIONS, "--out", home / "out", *options) == code
    )
    assert sorted(home.iterdir()) == before
    return sentence(capsys.readouterr().err)


@pytest.mark.parametrize(
    "name", ["./no-such-folder", "no such/model", "モデル", "a--b", "~nobody-here/model", "x" * 300]
)
def test_no_such_model(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message, hint = refused(capsys, name)
    assert message == f"there is no folder {name}"
    assert "demo" in hint


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_no_such_model_for_the_other_commands(verb, capsys):
    assert command(verb, "./no-such-folder") == 1
    assert sentence(capsys.readouterr().err)[0] == "there is no folder ./no-such-folder"


def test_a_file_instead_of_a_folder(copy, capsys):
    message, hint = refused(capsys, copy / "config.json")
    assert "is a file" in message
    assert "folder that holds config.json" in hint


def test_a_folder_without_a_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no model weights" in refused(capsys, tmp_path / "empty")[0]
    save_file({"a": torch.ones(1)}, tmp_path / "empty" / "model.safetensors")
    assert "no config.json" in refused(capsys, tmp_path / "empty")[0]


def test_what_is_no_torch_file_is_not_opened(copy, capsys):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    message, hint = refused(capsys, copy)
    assert "pytorch_model.bin is truncated, or in the format of torch before 1.6" in message
    assert "safetensors" in hint


def test_not_a_causal_language_model(tmp_path, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "bert")
    message, _ = refused(capsys, tmp_path / "bert")
    assert message == ("bert is not a causal language model that transformers knows (BertModel)")


def test_a_model_that_needs_code_from_its_repository(copy, capsys):
    config = read_json(copy / "config.json")
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (copy / "config.json").write_text(json.dumps(config))
    assert "needs Python code from its repository" in refused(capsys, copy)[0]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_configuration_that_is_no_json_object(copy, capsys, content):
    (copy / "config.json").write_text(content)
    assert "config.json" in refused(capsys, copy)[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1000],
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: b"<html>not found</html>",
        lambda raw: raw[:8] + b"\xff" * 20 + raw[28:],
    ],
    ids=["truncated", "header-cut", "empty", "html", "header-corrupt"],
)
def test_truncated_or_corrupt_weights(copy, capsys, damage):
    file = copy / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message, hint = refused(capsys, copy)
    assert "model.safetensors is missing, truncated or not a safetensors file" in message
    assert "again" in hint


def test_a_missing_shard(tmp_path, capsys):
    folder = tiny.build("llama", tmp_path / "model", tokenizer=True, shard="2MB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    message, hint = refused(capsys, folder)
    assert f"{INDEX} names {shards[0].name}, which is not in" in message
    assert "incomplete" in hint


def test_an_index_that_leads_out_of_the_folder(tmp_path, capsys):
    folder = tiny.build("llama", tmp_path / "model", tokenizer=True, shard="2MB")
    index = read_json(folder / INDEX)
    file = next(iter(index["weight_map"].values()))
    shutil.copy(folder / file, tmp_path / "secret.safetensors")
    for name, shard in index["weight_map"].items():
        index["weight_map"][name] = "../secret.safetensors" if shard == file else shard
    (folder / INDEX).write_text(json.dumps(index))
    assert "outside of the model's folder: '../secret.safetensors'" in refused(capsys, folder)[0]


def test_tensors_that_the_model_lacks_or_has_otherwise(copy, capsys):
    tensors = load_file(copy / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    changed = {**tensors, name: tensors[name][:-8].contiguous()}
    save_file(changed, copy / "model.safetensors", {"format": "pt"})
    assert f"tensor {name} has the shape (120, 64)" in refused(capsys, copy)[0]
    save_file({k: t for k, t in tensors.items() if k != name}, copy / "model.safetensors")
    assert f"lacks the tensor {name}" in refused(capsys, copy)[0]


@pytest.mark.parametrize("name", ["gpt_neox", "llama", "gpt2"])
def test_no_tokenizer(tmp_path, capsys, name):
    """Not even one that transformers makes up for an architecture."""
    folder = tiny.build(name, tmp_path / "model")
    message, hint = refused(capsys, folder)
    assert message.startswith("model has no tokenizer")
    assert "tokenizer.json" in hint


@pytest.mark.parametrize("content", ["{broken", "{}", "[]", '{"version": "1.0", "model": {}}'])
def test_a_broken_tokenizer(copy, capsys, content):
    (copy / "tokenizer.json").write_text(content)
    assert refused(capsys, copy)[0].startswith("model has no tokenizer")


def test_a_group_that_does_not_divide_the_width(tmp_path, capsys):
    folder = tiny.build("llama", tmp_path / "model", tokenizer=True, intermediate_size=96)
    message, hint = refused(capsys, folder, "-g", 64, code=2)
    assert message.startswith("group size 64 does not divide the input widths 96 (for example")
    assert "mlp.down_proj" in message
    assert hint == "use --group 32"


def test_an_already_quantized_model(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(quantized(model("gpt_neox"), group=32), folder)
    message, hint = refused(capsys, folder)
    assert "model is already quantized" in message
    assert "full-precision original" in hint


CALIBRATION = {
    "missing.txt": (None, "missing.txt"),
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
    "sjis.txt": ("日本語".encode("cp932"), "is not UTF-8 text"),
    "sjis.jsonl": ('{"text": "日本語"}'.encode("cp932"), "is not UTF-8 text"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: text should be a string"),
    "null.jsonl": (b'{"text": null}\n', "line 1: text should be a string"),
    "other.csv": (b"question,answer\na,b\n", "neither text nor messages"),
    "ids.jsonl": (b'{"input_ids": [1, 99999]}\n', "outside of the vocabulary"),
}


@pytest.mark.parametrize("name", CALIBRATION)
def test_calibration_that_cannot_be_used(copy, capsys, name):
    content, expected = CALIBRATION[name]
    if content is not None:
        (copy.parent / name).write_bytes(content)
    message, _ = refused(capsys, copy, "-c", copy.parent / name)
    assert expected in message


def test_calibration_that_does_not_exist(copy, capsys):
    message, hint = refused(capsys, copy, "-c", "bundled:fr=3", code=2)
    assert message == "there is no bundled calibration text 'fr'"
    assert "ja" in hint
    assert "'x'" in refused(capsys, copy, "-c", "bundled:ja=x", code=2)[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bits", 5], "5 bits"),
        (["-g", 8], "group size 8"),
        (["--damp", -0.1], "damp"),
        (["--align", 2], "align 2.0"),
        (["--refine", -1], "refine"),
        (["--tokens-per-input", 0], "tokens-per-input"),
        (["--max-shard-size", "huge"], "'huge'"),
        (["--calib-rows", 0], "'--calib-rows': 0"),
        (["--calib-seqlen", 1], "'--calib-seqlen': 1"),
        (["--device", "gpu"], "'gpu'"),
        (["--device", "mps"], "'mps'"),
        (["--dtype", "int8"], "'int8'"),
        (["--out", "."], "not a name"),
        (["--out", "/"], "not a name"),
    ],
    ids=lambda value: "".join(map(str, value)) if isinstance(value, list) else "",
)
def test_options_that_cannot_work(copy, capsys, options, named, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert named in refused(capsys, copy, *options, code=2)[0]


def test_no_room_on_the_disk(copy, capsys, monkeypatch):
    usage = shutil.disk_usage(copy)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message, hint = refused(capsys, copy)
    assert "0.00 GB are free" in message
    assert "--out" in hint


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way(copy, capsys, monkeypatch, code):
    """Nothing is lost then: with room again the same command goes on."""
    calls = []
    write = ShardWriter.write

    def full(self, name, tensor):
        calls.append(name)
        if len(calls) > 30:
            raise OSError(code, "No space left on device")
        write(self, name, tensor)

    out = copy.parent / "out"
    options = ["gptq", copy, "-g", 32, *QUICK_OPTIONS, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        assert command(*options) == 1
    message, hint = sentence(capsys.readouterr().err)
    assert message == f"the disk is full while writing {out}"
    assert "same command again" in hint
    assert {path.name for path in copy.parent.iterdir()} == {"model", "out.partial"}
    assert command(*options) == 0
    assert {path.name for path in copy.parent.iterdir()} == {"model", "out"}


@pytest.mark.parametrize(
    ("code", "told", "advice"),
    [
        (errno.EFBIG, "does not take files so large", "--max-shard-size"),
        (errno.EIO, "was lost on the way", "the disk is sound"),
        (errno.ENOENT, "was lost on the way", "nobody else uses the folder"),
    ],
)
def test_a_disk_that_fails(copy, capsys, monkeypatch, code, told, advice):
    def failing(self, name, tensor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ShardWriter, "write", failing)
    assert command("gptq", copy, "-g", 32, *QUICK_OPTIONS, "--out", copy.parent / "out") == 1
    message, hint = sentence(capsys.readouterr().err)
    assert told in message and advice in hint


def test_a_place_that_cannot_be_written(copy, capsys, monkeypatch):
    (copy.parent / "file").write_text("mine")
    message, hint = refused(capsys, copy, "--out", copy.parent / "file" / "out")
    assert "out.partial cannot be written (Not a directory)" in message
    assert "--out" in hint
    (copy.parent / "taken.partial").write_text("mine")
    assert "cannot be written" in refused(capsys, copy, "--out", copy.parent / "taken")[0]
    assert "already exists" in refused(capsys, copy, "--out", copy.parent / "file", code=2)[0]

    # root may write anywhere, so what others meet is played
    def forbidden(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", forbidden)
        assert "cannot be written (Permission denied)" in refused(capsys, copy)[0]
    exists = Path.exists
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "exists", lambda self: forbidden(self) if self.name == "out" else exists(self)
        )
        assert command("gptq", copy, "--out", copy.parent / "out", *QUICK_OPTIONS) == 1
    assert "cannot be written (Permission denied)" in sentence(capsys.readouterr().err)[0]


# what would be confused, ignored or lost


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["rtn", "demo", "-o", "demo"], "bundled model"),
        (["gguf", "demo", "-o", "demo-Q4.GGUF"], "would be a folder, and is called like a file"),
        (["convert", "demo", "--to", "gptq", "-o", "a.safetensors"], "is called like a file"),
        (["rtn", "demo", "--revision", "main", "-o", "x"], "has no revisions"),
        (["rtn", "demo", "--format", "gguf:q8_0", "--bits", "4", "-o", "x"], "no codes of 4 bits"),
        (["gguf", "demo", "--type", "q5_0", "--fast", "-o", "x"], "--fast is for GPTQ"),
        (["gguf", "demo", "--calib", "none", "--fast", "-o", "x"], "--fast is for GPTQ"),
        (["bnb", "demo", "--type", "int8", "--double-quant", "-o", "x"], "no double quantization"),
        (["bnb", "demo", "--type", "int8", "--compute-dtype", "fp16", "-o", "x"], "compute dtype"),
        (["gptq", "demo", "--rule", "*: skip", "-o", "x"], "the rules skip every linear"),
        (["gptq", "demo", "--rule", "*.o_proj: skip,bits=8", "-o", "x"], "says how to quantize"),
        (["generate", "demo", "a", "--stop", ""], "empty --stop"),
        (["verify", "demo", "--against", "demo", "--text", "bundled:en=1"], "no bundled text"),
        (["gptq", "demo", "-c", "bundled:xx", "-o", "x"], "no bundled calibration"),
        (["generate", "demo", "a", "-t", "nan"], "--temperature nan"),
        (["generate", "demo", "a", "-t", "inf"], "--temperature inf"),
        (["convert", "demo", "--to", "nope"], "no format to convert to"),
        (["convert", "demo", "--to", "gguf:q9"], "no type that is written"),
        (["convert", "demo", "--to", "gguf"], "no type that is written"),
        (["convert", "demo", "--to", "awq:4"], "no format to convert to"),
    ],
)
def test_refused_in_one_sentence(arguments, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert match in sentence(capsys.readouterr().err)[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gptq", "rtn", "gguf", "bnb"])
def test_the_model_that_is_read_is_not_replaced(name, tmp_path, capsys):
    folder = tmp_path / "model"
    assert command("convert", "demo", "--to", "dense:f16", "-o", folder, "-q") == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command(name, folder, "--overwrite", "-o", folder) == 2
    assert "would be replaced" in sentence(capsys.readouterr().err)[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_recipe_is_checked_to_its_last_step(tmp_path, capsys):
    steps = 'model = "demo"\nout = "a"\n[[step]]\ncommand = "rtn"\n[[step]]\n'
    cases = {
        'command = "convert"\nto = "nope"\nout = "b"': "step 2 (convert): 'nope' is no format",
        'command = "convert"\nto = "awq"\nout = "a"': "is there already",
        'command = "convert"\nto = "awq"\nout = "b"\ndry_run = true': "cannot be a dry run",
    }
    for step, match in cases.items():
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(steps + step, "utf-8")
        assert command("run", recipe, "--dry-run") == 2
        assert match in sentence(capsys.readouterr().err)[0]


def test_a_profile_shows_where_the_time_went(tmp_path, capsys):
    assert (
        command("gptq", "demo", *QUICK_OPTIONS, "--out", tmp_path / "out", "--profile", "-q") == 0
    )
    told = capsys.readouterr().out
    assert all(phase in told for phase in ("forward", "hessian", "factor", "round"))
    shares = [
        int(line.split()[-3]) for line in told.splitlines() if line.rstrip("│ ").endswith("%")
    ]
    assert 95 <= sum(shares) <= 105
    assert "The floor is" in told and "TFLOP/s that a large product reaches here" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no such device")
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "demo", "--json"]])
def test_output_that_cannot_be_written_is_a_sentence(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "quantkit", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert sentence(result.stderr)[0] == "the output: No space left on device"
