"""Rules: other settings for some linears; what they say, and that files with several schemes are
written, read, measured and converted like any other."""

import re

import pytest
import torch
from tools import QUICK, command, model, quantized, read_json, sentence

from quantkit.core import rules
from quantkit.core.qweight import Scheme
from quantkit.core.rules import Rule
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import compressed_tensors, gptq
from quantkit.runtime.load import load_model
from quantkit.runtime.opened import open_checkpoint
from quantkit.workflows.convert import convert
from quantkit.workflows.inspect import inspect
from quantkit.workflows.quantize import quantize
from quantkit.workflows.verify import verify

INNER = ("mlp.up_proj", "mlp.down_proj", "attn.q")
NAMES = [f"model.layers.{block}.{inner}" for block in (0, 1) for inner in INNER]
BASE = Scheme(4, 32)

# what is said


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("*.mlp.*: bits=8,group=64", Rule("*.mlp.*", bits=8, group=64)),
        (" *.q :  bits = 3 , sym = False", Rule("*.q", bits=3, sym=False)),
        ("model.layers.[01].*: skip", Rule("model.layers.[01].*", skip=True)),
        ("*: skip=false", Rule("*", skip=False)),
        ("*: group=-1,method=rtn", Rule("*", group=-1, method="rtn")),
    ],
)
def test_parse(text, rule):
    assert rules.parse(text) == rule
    assert rules.parse(str(rule)) == rule
    assert rules.of({key: value for key, value in vars(rule).items() if value is not None}) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("*.mlp.*", "is not a rule"),
        (": skip", "is not a rule"),
        ("*.mlp.*:", "'' sets nothing"),
        ("*.mlp.*: bits", "'bits' sets nothing"),
        ("*.mlp.*: bit=3", "has no 'bit'"),
        ("*.mlp.*: bits=three", "bits should be a whole number, not 'three'"),
        ("*.mlp.*: bits=3.5", "bits should be a whole number"),
        ("*.mlp.*: sym=1", "sym should be true or false"),
        ("*.mlp.*: skip=maybe", "skip should be true or false"),
        ("*.mlp.*: method=awq", "method can only be rtn"),
    ],
)
def test_refused(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        rules.parse(text)


def test_a_table_has_to_match_and_to_say_something():
    with pytest.raises(UsageError, match="does not say what it matches"):
        rules.of({"bits": 3})
    with pytest.raises(UsageError, match="says nothing"):
        rules.of({"match": "*"})


def settle(*texts):
    said = [rules.parse(text) for text in texts]
    return [rules.setting(said, name, BASE) for name in NAMES]


def test_later_rules_win_in_what_they_speak_of():
    found = settle("*.mlp.*: bits=8,sym=false", "*.1.*: bits=3", "*.down_proj: group=64")
    assert [(s.scheme.bits, s.scheme.group_size, s.scheme.symmetric) for s in found] == [
        (8, 32, False),
        (8, 64, False),
        (4, 32, True),
        (3, 32, False),
        (3, 64, False),
        (3, 32, True),
    ]


def test_skipping_and_coming_back():
    assert [s.skip for s in settle("*.mlp.*: skip")] == [True, True, False] * 2
    assert [s.skip for s in settle("*: skip", "*.q: bits=8")] == [True, True, False] * 2
    assert [s.skip for s in settle("*: skip", "*.q: skip=false")] == [True, True, False] * 2
    assert [s.rtn for s in settle("*.q: method=rtn")] == [False, False, True] * 2


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("*.mlp.dwon_proj: skip", "did you mean *.mlp.down_proj"),
        ("model.layer.0.mlp.up_proj: skip", "model.layers.0.mlp.up_proj"),
        ("xyz: skip", "there are *.mlp.up_proj, *.mlp.down_proj, *.attn.q"),
    ],
)
def test_a_rule_that_matches_nothing(text, hint):
    rules.check_matches([rules.parse("*.q: skip")], NAMES)
    with pytest.raises(UsageError, match="matches no linear") as caught:
        rules.check_matches([rules.parse(text)], NAMES)
    assert hint in caught.value.hint


# what a file says

OWN = {
    "m.0.self_attn.q_proj": Scheme(8, 32),
    "m.0.self_attn.k_proj": Scheme(8, 32),
    "m.0.self_attn.v_proj": Scheme(8, 32),
    "m.0.mlp.up_proj": Scheme(3, -1, False),
    "m.0.mlp.gate_proj": BASE,
}


def dynamic(own, dense=()):
    config = gptq.configuration(BASE, list(dense), "x", own=own)["quantization_config"]
    return config.get("dynamic", {})


def test_gptq_names_what_differs_and_the_fused_layers_of_vllm():
    eight = {"bits": 8, "group_size": 32, "sym": True}
    assert dynamic(OWN, ["m.0.mlp.down_proj"]) == {
        r"-:^m\.0\.mlp\.down_proj$": {},
        r"+:^m\.0\.self_attn\.q_proj$": eight,
        r"+:^m\.0\.self_attn\.k_proj$": eight,
        r"+:^m\.0\.self_attn\.v_proj$": eight,
        r"+:^m\.0\.self_attn\.qkv_proj$": eight,
        r"+:^m\.0\.mlp\.up_proj$": {"bits": 3, "group_size": -1, "sym": False},
    }
    assert dynamic({}) == {} and dynamic({"a": BASE}) == {}
    assert r"-:^a\.gate_up_proj$" in dynamic({}, ["a.gate_proj", "a.up_proj"])


def test_compressed_tensors_names_every_linear_in_one_group():
    config = compressed_tensors.configuration(BASE, [], "x", own=OWN)["quantization_config"]
    groups = config["config_groups"].values()
    targets = [target for group in groups for target in group["targets"]]
    assert sorted(targets) == sorted(OWN)
    for group in groups:
        for target in group["targets"]:
            weights, scheme = group["weights"], OWN[target]
            assert weights["num_bits"] == scheme.bits
            assert weights["symmetric"] is scheme.symmetric
            assert weights["strategy"] == ("channel" if scheme.group_size == -1 else "group")


# from end to end

RULES = (
    "*.q_proj: bits=8",
    "*.k_proj: bits=8",
    "*.v_proj: bits=8",
    "*.mlp.down_proj: bits=3,group=64",
    "*.0.mlp.up_proj: method=rtn",
    "*.1.self_attn.o_proj: skip",
)
WANTED = {
    "q_proj": Scheme(8, 32),
    "o_proj": BASE,
    "gate_proj": BASE,
    "down_proj": Scheme(3, 64),
}


def opened(folder):
    return open_checkpoint(Source(folder.name, folder))


@pytest.fixture(scope="module", params=["gptq", "gptq_v2", "compressed-tensors"])
def mixed(request):
    return quantized(model("llama"), group=32, rule=RULES, format=request.param)


def test_every_linear_has_the_scheme_that_the_rules_give_it(mixed):
    found = opened(mixed)
    layers = read_json(mixed / "quantkit.json")["layers"]
    assert len(found.linears) == len(layers) == 3 * 7 - 1
    for prefix, packed in found.linears.items():
        wanted = WANTED.get(prefix.rpartition(".")[2])
        assert wanted in (None, packed.scheme) and found.qweight(prefix).scheme == packed.scheme
    assert "model.layers.1.self_attn.o_proj" not in found.linears
    assert "model.layers.1.self_attn.o_proj.weight" in found.dense
    rounded = {name for name, layer in layers.items() if layer["method"] == "rtn"}
    assert rounded == {"model.layers.0.mlp.up_proj"}
    record = read_json(mixed / "quantkit.json")
    assert record["settings"]["rules"] == list(RULES)
    assert record["fallbacks"] == []


def test_it_is_measured_and_runs(mixed):
    found = verify(str(mixed), against=str(model("llama")), rows=1, seqlen=32, samples=False)
    # the skipped one is listed too: its float32 is stored as float16
    assert len(found.described()["layers"]) == 21
    loaded = load_model(Source("m", mixed), torch.device("cpu"), torch.float32)
    layers = loaded.model.layers
    assert layers[0].self_attn.q_proj.scheme.bits == 8
    assert layers[0].mlp.down_proj.scheme == Scheme(3, 64)
    assert isinstance(layers[1].self_attn.o_proj, torch.nn.Linear)


def test_inspect_says_who_reads_it(mixed):
    found = inspect(str(mixed))
    loads = {target.target: target.loads for target in found.targets}
    assert loads["transformers"] is (found.kind == "compressed_tensors")
    assert not [one for one in found.findings if one.level == "error"]
    assert any("by rules of the configuration" in one.text for one in found.findings)


def test_zero_points_for_some():
    folder = quantized(model("gpt_neox"), group=32, rule=("*.dense: sym=false",))
    found = opened(folder)
    for prefix, packed in found.linears.items():
        assert packed.scheme.symmetric is not prefix.endswith("attention.dense")
        assert found.qweight(prefix).scheme == packed.scheme


@pytest.mark.parametrize("target", ["gptq_v2", "compressed-tensors", "gptq"])
def test_it_is_converted_number_by_number(mixed, target, tmp_path):
    out = tmp_path / "out"
    assert convert(str(mixed), target, out).exact
    before, after = opened(mixed), opened(out)
    assert before.linears.keys() == after.linears.keys()
    for prefix in before.linears:
        assert before.qweight(prefix).identical(after.qweight(prefix))


def test_one_scheme_for_all_is_all_that_awq_and_mlx_have(mixed, tmp_path):
    for target in ("awq", "mlx"):
        with pytest.raises(QuantkitError, match=r"one kind for all|cannot be held"):
            convert(str(mixed), target, tmp_path / "out")
    with pytest.raises(UsageError, match="format awq has one scheme for all linears") as caught:
        quantize(
            str(model("llama")),
            tmp_path / "out",
            rule=["*.q_proj: group=16"],
            group=32,
            format="awq",
            **QUICK,
        )
    assert "--format gptq or compressed-tensors" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_awq_may_skip(tmp_path):
    out = quantized(model("llama"), group=32, rule=("*.0.mlp.*: skip",), format="awq")
    found = opened(out)
    assert len(found.linears) == 3 * 7 - 3
    said = read_json(out / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.up_proj" in said


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("*.q_prj: bits=3", "matches no linear"),
        ("*.q_proj: bits=7", "7 bits are not supported"),
        ("*.q_proj: bits=5", "cannot have 5 bits in the format gptq"),
        ("*.q_proj: group=48", "group size 48 does not divide"),
        ("*: skip", "the rules skip every linear"),
    ],
)
def test_refused_before_anything_is_written(rule, message, tmp_path, capsys):
    arguments = ["-g", 32, "--rule", rule, "--out", tmp_path / "out"]
    assert command("gptq", model("llama"), *arguments) in (1, 2)
    assert message in sentence(capsys.readouterr().err)[0]
    assert not list(tmp_path.iterdir())


def test_other_rules_are_another_run(tmp_path, monkeypatch):
    from quantkit.workflows import stored

    def fail(*args):
        raise KeyboardInterrupt

    settings = {**QUICK, "group": 32}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stored, "write", fail)
        quantize(str(model("llama")), tmp_path / "out", **settings, rule=["*.q_proj: bits=3"])
    with pytest.raises(UsageError, match="rules was"):
        quantize(str(model("llama")), tmp_path / "out", **settings, rule=["*.q_proj: bits=8"])


def test_rules_in_a_recipe(tmp_path, capsys):
    file = tmp_path / "r.toml"
    file.write_text(
        'model = "demo"\n[[step]]\ncommand = "gptq"\n'
        '[[step.rule]]\nmatch = "*.mlp.*"\nbits = 8\n[[step.rule]]\nmatch = "*.0.*"\nskip = true\n'
    )
    assert command("run", file, "--dry-run") == 0
    captured = capsys.readouterr()
    assert "--rule '*.mlp.*: bits=8' --rule '*.0.*: skip' demo" in captured.out
    assert "9 linears have 8 bits" in captured.err
    assert "7 linears stay as they are" in captured.err
    file.write_text(file.read_text().replace("bits", "bit"))
    assert command("run", file, "--dry-run") == 2
    assert "has no 'bit'" in sentence(capsys.readouterr().err)[0]


def test_one_group_that_is_a_row_is_no_scheme_of_its_own(tmp_path):
    source = quantized(model("llama"), group=64)  # as wide as most of its linears
    for target in ("compressed-tensors", "gptq_v2"):
        out = tmp_path / target
        assert convert(str(source), target, out).exact
        said = read_json(out / "config.json")["quantization_config"]
        assert len(said.get("config_groups", [1])) == 1
        assert not [key for key in said.get("dynamic", {}) if key.startswith("+")]
