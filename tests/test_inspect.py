"""The doctor: what is wrong with a folder is found, and the copy that --repair writes is clean."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tools import command, model, quantized, read_json, sentence

from quantkit import data, formats
from quantkit.core import ledger, provenance
from quantkit.core.checkpoint import INDEX
from quantkit.core.qweight import QWeight, Scheme
from quantkit.core.source import Source
from quantkit.errors import QuantkitError, UsageError
from quantkit.formats import awq, gptq
from quantkit.formats.older_names import with_older_names
from quantkit.runtime.load import load_model
from quantkit.workflows import inspect_files
from quantkit.workflows import repair as repairing
from quantkit.workflows.convert import convert
from quantkit.workflows.inspect import inspect
from quantkit.workflows.targets import TARGETS, Subject, verdicts
from quantkit.workflows.verify import verify

TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
WEIGHTS = "model.safetensors"
CONFIG, LEGACY = "config.json", "quantize_config.json"
SECTION = "quantization_config"

# checkpoints of every format: random codes in the linears of a tiny model


def random_weight(out, width, scheme, kind, seed, ordered=False):
    """kind: symmetric, zero or minimum"""
    g = torch.Generator().manual_seed(seed)
    groups = scheme.groups(width)
    codes = torch.randint(0, scheme.max_code + 1, (out, width), generator=g).to(torch.uint8)
    scale = (torch.rand(out, groups, generator=g) * 0.01 + 0.01).half()
    zero = minimum = order = None
    if kind == "zero":
        zero = torch.randint(1, scheme.max_code + 1, (out, groups), generator=g).to(torch.uint8)
    if kind == "minimum":
        minimum = -scale
    if kind == "nf4":
        scale = scale.float()
    if ordered:
        order = (torch.randperm(width, generator=g) // scheme.width(width)).int()
    return QWeight(scheme, codes, scale, zero, order, minimum)


def write(folder, name, kind="symmetric", group=32, bits=4, ordered=False, source="llama"):
    """A folder in the format ``name``."""
    shutil.copytree(model(source, **TOKENS), folder)
    writer = formats.by_name(name)
    scheme = (
        Scheme(4, 64, True, "nf4") if kind == "nf4" else Scheme(bits, group, kind == "symmetric")
    )
    tensors = {}
    outputs = {}
    for seed, (key, tensor) in enumerate(sorted(load_file(folder / WEIGHTS).items())):
        prefix, _, last = key.rpartition(".")
        if ".layers." in key and last == "weight" and tensor.dim() == 2:
            q = random_weight(*tensor.shape, scheme, kind, seed, ordered)
            tensors |= {f"{prefix}.{s}": t for s, t in writer.pack(q).items()}
            outputs[prefix] = tensor.shape[0]
        else:
            tensors[key] = tensor.half()
    config = with_older_names(read_json(folder / CONFIG))
    if name == "awq":
        for key, spec in awq.activation_scales(config["model_type"], outputs).items():
            tensors[key] = torch.ones(spec.shape, dtype=spec.dtype)
    save(tensors, folder)
    head = ["embed_out"] if source == "gpt_neox" else []
    config |= writer.configuration(scheme, head, "quantkit:0")
    if ordered:
        config[SECTION]["desc_act"] = True
    write_json(folder / CONFIG, config)
    for file, content in writer.beside(config, "tiny").items():
        write_json(folder / file, content)
    return folder


def save(tensors, folder, file=WEIGHTS, metadata={"format": "pt"}):  # noqa: B006
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / file, metadata)


def write_json(path, content):
    path.write_text(json.dumps(content), "utf-8")


def edit(path, *keys, **values):
    """Change a JSON file, below ``keys``; None takes a key out."""
    content = at = read_json(path)
    for key in keys:
        at = at[key]
    for key, value in values.items():
        at[key] = value
        if value is None:
            del at[key]
    write_json(path, content)


@pytest.fixture
def folder(tmp_path):
    """A clean symmetric GPTQ checkpoint that a test may damage."""
    return write(tmp_path / "model", "gptq")


def found(folder):
    """(level, code) of everything but notes."""
    return [(f.level, f.code) for f in inspect(str(folder)).findings if f.level != "note"]


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def repaired(folder):
    """Repair, check that the original is as it was and that the copy has nothing to repair."""
    before = digests(folder)
    out = folder.with_name("repaired")
    changes = inspect(str(folder), repair=out).repaired
    assert digests(folder) == before
    assert not out.with_name("repaired.partial").exists()
    assert not (out / ledger.FILE).exists()
    after = inspect(str(out))
    assert [f for f in after.findings if f.changes or f.level != "note"] == []
    assert changes
    return out


# what a folder holds


EVERY = [
    ("gptq", "symmetric", {}),
    ("gptq", "zero", {}),
    ("gptq", "symmetric", {"bits": 3, "group": -1}),
    ("gptq", "symmetric", {"ordered": True}),
    ("gptq_v2", "symmetric", {}),
    ("awq", "zero", {}),
    ("compressed_tensors", "symmetric", {}),
    ("compressed_tensors", "zero", {"group": -1}),
    ("mlx", "minimum", {}),
    ("bnb", "nf4", {"group": 64}),
]


@pytest.mark.parametrize("source", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("name", "kind", "options"), EVERY, ids=str)
def test_a_sound_checkpoint_has_nothing_but_notes(tmp_path, name, kind, options, source):
    result = inspect(str(write(tmp_path / "model", name, kind, source=source, **options)))
    assert [f for f in result.findings if f.level != "note" or f.changes] == []
    assert result.kind == name.removesuffix("_v2")
    assert result.bits == options.get("bits", 4)
    assert result.group == options.get("group", 32)
    assert result.sym == (kind in ("symmetric", "nf4"))
    assert result.act_order == options.get("ordered", False)
    assert result.dense_linears == []
    assert result.head == "own"
    assert result.tokenizer and not result.chat_template
    assert result.linears == {"llama": 21, "gpt_neox": 8}[source]
    if result.kind == "gptq":
        assert result.convention == result.declared == ("v2" if name == "gptq_v2" else "v1")


def test_the_demo_and_what_quantkit_writes_are_sound():
    for name in ("demo", str(quantized())):
        result = inspect(name)
        assert result.findings == []
        assert result.head == "tied" and result.tokenizer and result.chat_template
    assert (result.made_from, result.made_by) == ("demo", f"quantkit {_version(result)}")


def _version(result):
    return result.provenance["versions"]["quantkit"]


def test_linears_as_narrow_as_a_group_are_no_exception(tmp_path):
    """Width 64 in groups of 64 is one group, which other linears have two of."""
    result = inspect(str(write(tmp_path / "model", "gptq", group=64)))
    assert result.group == 64
    assert result.findings == []


def test_a_size_that_no_row_exceeds_is_one_group_a_row(tmp_path):
    folder = write(tmp_path / "model", "gptq", group=-1)
    section(group_size=tiny.INNER)(folder)
    assert found(folder) == []
    section(group_size=tiny.WIDTH)(folder)
    assert found(folder) == [("error", "config")]


def test_origin_without_quantkit(folder):
    edit(folder / CONFIG, SECTION, meta={"quantizer": ["optimum:2.3", "gptqmodel:7.6"]})
    (folder / "README.md").write_text("---\nbase_model: owner/name\n---\n")
    result = inspect(str(folder))
    assert result.made_from == "owner/name"
    assert result.made_by == "optimum:2.3, gptqmodel:7.6"


def test_a_gguf_file(tmp_path):
    convert(str(quantized()), "gguf:q4_0", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.gguf")
    for name in (file, file.parent):
        result = inspect(str(name))
        assert (result.kind, result.bits, result.types) == ("gguf", 4, {"Q4_0": 28})
        assert result.tokenizer and result.chat_template and result.head == "tied"
        assert result.findings == []
        loads = {v.target for v in result.targets if v.loads}
        assert loads == {"transformers", "vLLM", "llama.cpp"}
        assert result.made_from.endswith("from demo")
        assert (result.method, result.made_by) == ("gptq", f"quantkit {_version(result)}")
    with pytest.raises(QuantkitError, match="nothing that could be repaired"):
        inspect(str(file), repair=tmp_path / "copy")


def test_what_was_converted_remembers_its_origin(tmp_path):
    convert(str(quantized()), "awq", tmp_path / "out")
    result = inspect(str(tmp_path / "out"))
    assert (result.kind, result.method, result.findings) == ("awq", "gptq", [])
    assert result.made_from == "quantized, from demo"


def test_one_of_several_files(folder):
    """``model_basename``, and the usual name where nothing is said."""
    tensors = load_file(folder / WEIGHTS)
    save({k: t for k, t in tensors.items() if "layers.2" not in k}, folder, "other.safetensors")
    assert inspect(str(folder)).findings == []
    codes = [f.code for f in inspect(str(folder), model_basename="other").findings]
    assert "missing" in codes and "file-name" in codes


# what is wrong, and what --repair makes of it


def section(**values):
    return lambda folder: edit(folder / CONFIG, SECTION, **values)


def beside(**values):
    return lambda folder: edit(folder / LEGACY, **values)


def top(**values):
    return lambda folder: edit(folder / CONFIG, **values)


def legacy_name(folder):
    (folder / WEIGHTS).rename(folder / "gptq_model-4bit-32g.safetensors")
    edit(folder / LEGACY, model_file_base_name="gptq_model-4bit-32g")


def no_header(folder):
    save(load_file(folder / WEIGHTS), folder, metadata=None)


def no_declaration(folder):
    edit(folder / CONFIG, **{SECTION: None})
    (folder / LEGACY).unlink()


def sharded(folder):
    """Two shards and no index."""
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    save(dict(tensors[::2]), folder, "model-00001-of-00002.safetensors")
    save(dict(tensors[1::2]), folder, "model-00002-of-00002.safetensors")


def tokenizer_path(folder):
    edit(folder / "tokenizer_config.json", tokenizer_file="/root/.cache/tokenizer.json")


LEAKED = {"offload_to_disk_path": "/tmp/gptqmodel/x", "quantizer": ["gptqmodel:7"]}
TEXTS = {"dataset": ["The quick brown fox."]}
REPAIRABLE = [
    (section(checkpoint_format="gptq_v2"), "error", "convention"),
    (section(checkpoint_format=None, format="gptq_v2"), "error", "convention"),
    (beside(checkpoint_format="gptq_v2"), "error", "convention"),
    (section(bits=8), "error", "config"),
    (section(bits="4"), "error", "config"),
    (section(group_size=128), "error", "config"),
    (beside(group_size=-1), "error", "config"),
    (beside(bits=None, w_bit=3), "error", "config"),
    (section(sym=False), "warning", "config"),
    (section(sym=None), "warning", "unsaid"),
    (section(quant_method="awq"), "error", "method"),
    (section(quant_method=None), "error", "method"),
    (beside(quant_method="awq"), "error", "method"),
    (top(**{SECTION: None}), "error", "undeclared"),
    (no_declaration, "error", "undeclared"),
    (legacy_name, "warning", "file-name"),
    (no_header, "warning", "header"),
    (sharded, "error", "no-index"),
    (top(_name_or_path="/home/me/models/x"), "warning", "leak"),
    (top(_name_or_path="C:\\models\\x"), "warning", "leak"),
    (section(meta=LEAKED), "warning", "leak"),
    (section(**TEXTS), "warning", "leak"),
    (beside(dataset="long " * 99), "warning", "leak"),
    (tokenizer_path, "warning", "leak"),
]


@pytest.mark.parametrize(("damage", "level", "code"), REPAIRABLE)
def test_what_can_be_repaired(folder, damage, level, code):
    damage(folder)
    assert found(folder) == [(level, code)]
    before = inspect(str(folder))
    out = repaired(folder)
    after = inspect(str(out))
    assert (after.bits, after.group, after.sym) == (before.bits, before.group, before.sym)
    assert after.tensors == before.tensors and after.convention == before.convention
    assert all(v.loads for v in after.targets if v.target in ("transformers", "vLLM"))
    if code != "no-index":
        assert load_file(out / WEIGHTS).keys() == load_file(next(folder.glob("*.saf*"))).keys()


def test_what_is_repaired_is_what_was_there(folder):
    """A leak is cut out, its neighbours stay; numbers of the method survive a new section."""
    edit(folder / CONFIG, SECTION, meta=LEAKED)
    out = repaired(folder)
    assert read_json(out / CONFIG)[SECTION]["meta"] == {"quantizer": ["gptqmodel:7"]}
    shutil.rmtree(out)
    edit(folder / CONFIG, **{SECTION: None})
    edit(folder / LEGACY, damp_percent=0.05, bits=8, **TEXTS)
    new = read_json(repaired(folder) / CONFIG)[SECTION]
    assert (new["damp_percent"], new["bits"], new["group_size"]) == (0.05, 4, 32)
    assert "dataset" not in new


def test_what_verify_found_is_not_said_of_a_repaired_copy(tmp_path):
    """Neither in quantkit.json nor on its card."""
    folder = shutil.copytree(quantized(), tmp_path / "model")
    verify(str(folder), rows=1, seqlen=16, samples=False)
    record = read_json(folder / "quantkit.json")
    assert record["verified"] and "on 1 rows of 16 tokens" in (folder / "README.md").read_text()
    edit(folder / CONFIG, _name_or_path="/home/me/x")
    changes = inspect(str(folder), repair=tmp_path / "out").repaired
    assert any("what verify had found was removed" in change for change in changes)
    del record["verified"]
    assert read_json(tmp_path / "out" / "quantkit.json") == record
    assert "Quality was not measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_new_header_keeps_tensors_aligned(folder):
    no_header(folder)
    edited = (repaired(folder) / WEIGHTS).read_bytes()
    assert int.from_bytes(edited[:8], "little") % 8 == 0
    old, new = (load_file(f / WEIGHTS) for f in (folder, folder.with_name("repaired")))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_everything_at_once(folder):
    damages = [section(checkpoint_format="gptq_v2", bits=2, **TEXTS), beside(group_size=64)]
    damages += [no_header, legacy_name, tokenizer_path, top(_name_or_path="/home/me/x")]
    for damage in damages:
        damage(folder)
    codes = [code for _, code in found(folder)]
    assert sorted(codes) == ["config", "config", "convention", "file-name", "header"] + ["leak"] * 3
    out = repaired(folder)
    assert not (out / "gptq_model-4bit-32g.safetensors").exists()
    old = load_file(folder / "gptq_model-4bit-32g.safetensors")
    new = load_file(out / WEIGHTS)
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


def test_a_true_order_that_the_configuration_denies(tmp_path):
    folder = write(tmp_path / "model", "gptq", ordered=True)
    for change in (section, beside):
        change(desc_act=False)(folder)
    assert found(folder) == [("error", "config")] * 2
    assert read_json(repaired(folder) / CONFIG)[SECTION]["desc_act"] is True


def test_an_order_that_is_declared_and_not_there_is_a_note(folder):
    section(desc_act=True)(folder)
    (finding,) = inspect(str(folder)).findings
    assert (finding.level, finding.code) == ("note", "config")
    repaired(folder)


def test_asymmetric_weights_that_are_declared_symmetric(tmp_path):
    folder = write(tmp_path / "model", "gptq", "zero")
    section(sym=True)(folder)
    assert found(folder) == [("error", "config")]
    assert read_json(repaired(folder) / CONFIG)[SECTION]["sym"] is False


def test_v2_zero_points_under_a_v1_name(tmp_path):
    """The trap seen in the wild; neither file tells the truth."""
    folder = write(tmp_path / "model", "gptq_v2")
    section(checkpoint_format="gptq")(folder)
    beside(checkpoint_format=None)(folder)
    result = inspect(str(folder))
    assert (result.convention, result.declared) == ("v2", "v1")
    assert found(folder) == [("error", "convention")] * 2
    out = repaired(folder)
    assert read_json(out / LEGACY)["checkpoint_format"] == "gptq_v2"


def test_auto_rounds_name_is_as_good_as_gptq(folder):
    section(quant_method="auto-round")(folder)
    beside(quant_method="auto-round")(folder)
    assert found(folder) == []


@pytest.mark.parametrize("name", ["awq", "compressed_tensors", "bnb"])
def test_the_configuration_of_other_formats(tmp_path, name):
    kind = "nf4" if name == "bnb" else "zero"
    folder = write(tmp_path / "model", name, kind)
    content = read_json(folder / CONFIG)
    good = content[SECTION]
    if name == "compressed_tensors":
        good["config_groups"]["group_0"]["weights"]["group_size"] = 128
    elif name == "bnb":
        good["bnb_4bit_quant_type"] = "fp4"
    else:
        good["group_size"] = 128
    write_json(folder / CONFIG, content)
    assert set(found(folder)) == {("error", "config")}
    repaired(folder)


def test_the_head_of_gpt_neox_under_another_name(tmp_path):
    folder = write(tmp_path / "model", "gptq", source="gpt_neox")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save(tensors, folder)
    assert found(folder) == [("error", "head")]
    out = repaired(folder)
    new = load_file(out / WEIGHTS)
    assert torch.equal(new.pop("embed_out.weight"), tensors.pop("lm_head.weight"))
    assert new.keys() == tensors.keys()
    ids = torch.arange(9)[None]
    logits = [
        load_model(Source("x", f), torch.device("cpu"), torch.float32)(ids).logits
        for f in (folder, out)
    ]
    assert torch.equal(*logits)


def test_the_head_in_a_shard(tmp_path):
    folder = write(tmp_path / "model", "gptq", source="gpt_neox")
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save(tensors, folder)
    sharded(folder)
    where = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": where})
    assert found(folder) == [("error", "head")]
    index = read_json(repaired(folder) / INDEX)["weight_map"]
    assert "lm_head.weight" not in index
    assert index["embed_out.weight"] == where["lm_head.weight"]


def test_a_missing_file_beside_the_configuration_is_a_note(folder):
    (folder / LEGACY).unlink()
    (finding,) = inspect(str(folder)).findings
    assert (finding.level, finding.code) == ("note", "no-beside")
    assert read_json(repaired(folder) / LEGACY)["bits"] == 4


# what cannot be repaired


def test_mlx_needs_its_configuration(tmp_path):
    """Its tensors only show the product of bits and group size."""
    folder = write(tmp_path / "model", "mlx", "minimum")
    content = read_json(folder / CONFIG)
    content["quantization"]["group_size"] = content[SECTION]["group_size"] = 128
    write_json(folder / CONFIG, content)
    assert found(folder) == [("error", "unreadable")]


def change_tensor(change, suffix, times=1):
    """``change`` tensors of the first linears in place."""

    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        for name in sorted(n for n in tensors if n.endswith(suffix))[:times]:
            change(tensors, name)
        save(tensors, folder)

    return damage


def fill(value):
    return lambda tensors, name: tensors[name][0, :3].fill_(value)


def remove(tensors, name):
    del tensors[name]


def cut(tensors, name):
    tensors[name] = tensors[name][:-1]


def add(tensors, name):
    tensors["model.something.weight"] = torch.ones(2)


FIRST = "model.layers.0.mlp.down_proj"
HOPELESS = [
    (change_tensor(fill(float("nan")), ".scales"), "error", "nan", f"3 scales.*{FIRST}"),
    (change_tensor(fill(float("inf")), ".scales", 2), "error", "infinite", f"6 scales.*{FIRST}"),
    (change_tensor(fill(0), ".scales"), "warning", "zero-scale", f"3 scales.*{FIRST}"),
    (change_tensor(remove, ".scales"), "error", "unreadable", f"{FIRST}.*no tensor scales"),
    (change_tensor(cut, ".qweight", 2), "error", "unreadable", f"2 quantized.*{FIRST}"),
    (change_tensor(remove, "norm.weight"), "error", "missing", "layers.0.input_layernorm"),
    (change_tensor(remove, "lm_head.weight"), "error", "missing", "lm_head.weight"),
    (change_tensor(add, "lm_head.weight"), "warning", "unexpected", "something.weight"),
    (top(num_hidden_layers=10**9), "warning", "structure", "1000000000 blocks"),
    (top(model_type="no-such-model"), "warning", "structure", "not a causal"),
]


@pytest.mark.parametrize(("damage", "level", "code", "text"), HOPELESS)
def test_what_cannot_be_repaired(folder, tmp_path, damage, level, code, text):
    damage(folder)
    result = inspect(str(folder))
    (finding,) = [f for f in result.findings if f.level != "note"]
    assert (finding.level, finding.code) == (level, code)
    assert re.search(text, finding.text)
    assert not finding.changes
    if level == "error":
        assert not any(verdict.loads for verdict in result.targets)
    with pytest.raises(QuantkitError, match="nothing that could be repaired"):
        inspect(str(folder), repair=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_generation_settings(folder):
    both = (CONFIG, "generation_config.json")
    for file in both:
        edit(folder / file, eos_token_id=None, pad_token_id=None)
    texts = [f.text for f in inspect(str(folder)).findings if f.code == "generation"]
    assert len(texts) == 2 and "eos_token_id" in texts[0] and "pad_token_id" in texts[1]
    for file in both:
        edit(folder / file, eos_token_id=[0, 99999], pad_token_id=1)
    assert found(folder) == [("error", "generation")]


def test_a_folder_without_tokenizer_or_configuration(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    assert found(folder) == [("warning", "tokenizer")]
    (folder / CONFIG).unlink()
    assert ("error", "no-config") in found(folder)


def test_conventions_that_asymmetric_tensors_do_not_show(tmp_path):
    folder = write(tmp_path / "model", "gptq", "zero")
    beside(checkpoint_format="gptq_v2")(folder)
    (finding,) = inspect(str(folder)).findings
    assert (finding.level, finding.code, finding.changes) == ("error", "convention", ())
    no_declaration(folder)
    (finding,) = inspect(str(folder)).findings
    assert (finding.level, finding.code, finding.changes) == ("error", "undeclared", ())


def test_zero_points_that_wrap_around(tmp_path):
    folder = write(tmp_path / "model", "gptq", "zero")
    change_tensor(lambda tensors, name: tensors[name].fill_(-1), ".qzeros")(folder)
    assert found(folder) == [("warning", "wrapped-zero")]


def test_linears_of_several_kinds(folder):
    tensors = load_file(folder / WEIGHTS)
    out, width = tensors[f"{FIRST}.qweight"].shape[1], tiny.INNER
    packed = gptq.pack(random_weight(out, width, Scheme(8, 32), "symmetric", 0))
    save(tensors | {f"{FIRST}.{suffix}": t for suffix, t in packed.items()}, folder)
    assert found(folder) == [("warning", "mixed")]
    section(dynamic={f"+:{FIRST}": {"bits": 8}})(folder)
    assert found(folder) == []


def test_dense_linears_inside_blocks_are_told(folder):
    tensors = load_file(folder / WEIGHTS)
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{FIRST}.{suffix}"]
    tensors[f"{FIRST}.weight"] = torch.ones(tiny.WIDTH, tiny.INNER).half()
    save(tensors, folder)
    result = inspect(str(folder))
    assert result.dense_linears == [FIRST]
    assert [(f.level, f.code) for f in result.findings] == [("note", "dense")]


@pytest.mark.parametrize(("same", "level"), [(True, "note"), (False, "error")])
def test_a_tied_head_that_is_stored(folder, same, level):
    top(tie_word_embeddings=True)(folder)
    tensors = load_file(folder / WEIGHTS)
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save(tensors, folder)
    (finding,) = [f for f in inspect(str(folder)).findings if f.code == "head"]
    assert finding.level == level


def test_awq_of_gpt_neox_without_scales_of_its_activations(tmp_path):
    folder = write(tmp_path / "model", "awq", "zero", source="gpt_neox")
    change_tensor(remove, "act.scales", 9)(folder)
    assert found(folder) == [("error", "act-scales")]
    loads = {v.target: v.loads for v in inspect(str(folder)).targets}
    assert not loads["transformers"] and loads["vLLM"]


def test_awq_of_gpt_neox_as_transformers_wants_it(tmp_path):
    folder = write(tmp_path / "model", "awq", "zero", source="gpt_neox")
    verdicts = {v.target: v for v in inspect(str(folder)).targets}
    assert verdicts["transformers"].loads and not verdicts["vLLM"].loads
    assert "act.scales" in verdicts["vLLM"].reasons[0]


def test_rotary_positions_that_only_transformers_5_finds(tmp_path):
    folder = write(tmp_path / "model", "mlx", "minimum", source="gpt_neox")
    edit(folder / CONFIG, rotary_pct=None, rotary_emb_base=None)
    result = inspect(str(folder), repair=tmp_path / "repaired")
    assert [(f.level, f.code) for f in result.findings if f.changes] == [("note", "rotary")]
    assert "rope_parameters" not in str(result.repaired) and len(result.repaired) == 2
    (before,) = (v for v in result.targets if v.target == "mlx")
    (after,) = (v for v in inspect(str(tmp_path / "repaired")).targets if v.target == "mlx")
    assert not before.loads and "rotary" in before.reasons[0] and after.loads


def test_old_buffers_are_a_note(tmp_path):
    folder = write(tmp_path / "model", "gptq", source="gpt_neox")
    tensors = load_file(folder / WEIGHTS)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save(tensors, folder)
    assert ("note", "buffers") in [(f.level, f.code) for f in inspect(str(folder)).findings]
    assert found(folder) == []


HOSTILE = [[], 7, "text", {"meta": 7, "config_groups": 7, "dynamic": 7, "quant_method": []}]


@pytest.mark.parametrize("content", HOSTILE, ids=str)
def test_configurations_of_the_wrong_shape(folder, content):
    edit(folder / CONFIG, **{SECTION: content}, architectures={"a": 1}, vocab_size="many")
    write_json(folder / provenance.FILE, {"source": 7, "versions": [], "measured": {"kl": "low"}})
    try:
        inspect(str(folder)).described()
    except QuantkitError as error:
        assert error.message


def test_files_that_are_nested_deeply(folder, capsys):
    deep = "{" + '"made_from": {' * 400 + "}" * 401
    (folder / provenance.FILE).write_text(deep)
    (folder / "tokenizer_config.json").write_text(deep)
    assert command("inspect", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["provenance"] is None
    assert command("inspect", folder) == 0
    deep = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert list(inspect_files._private(deep)) == []


# unfinished folders, and where the copy goes


@pytest.fixture
def unfinished(folder):
    partial = folder.with_name("model.partial")
    folder.rename(partial)
    content = {"fingerprint": {}, "done": {"block 0": {}, "block 1": {}}}
    write_json(partial / ledger.FILE, content)
    return partial


def test_an_unfinished_folder(unfinished, tmp_path):
    result = inspect(str(unfinished))
    (finding,) = result.findings
    assert (finding.level, finding.code) == ("error", "unfinished")
    assert "2 parts" in finding.text
    assert result.bits == 4 and result.targets == []
    for out in ("model", "other"):
        with pytest.raises(UsageError, match="unfinished"):
            inspect(str(unfinished), repair=tmp_path / out)
    assert list(tmp_path.iterdir()) == [unfinished]


def test_the_folder_that_an_unfinished_one_will_become(unfinished):
    with pytest.raises(QuantkitError, match=r"is unfinished: there is only .*model\.partial"):
        inspect(str(unfinished.with_name("model")))


def test_a_folder_that_exists_is_not_overwritten(folder, tmp_path):
    section(bits=8)(folder)
    for taken in (folder, data.demo()):
        before = digests(taken)
        with pytest.raises(UsageError, match="already exists"):
            inspect(str(folder), repair=taken)
        assert digests(taken) == before


def test_an_unfinished_folder_of_another_command_is_not_touched(folder, tmp_path):
    section(bits=8)(folder)
    other = tmp_path / "out.partial"
    other.mkdir()
    for content in ({"fingerprint": {"bits": 4}, "done": {}}, {}):
        write_json(other / ledger.FILE, content)
        with pytest.raises(UsageError, match="holds something else"):
            inspect(str(folder), repair=tmp_path / "out")
        assert len(list(other.iterdir())) == 1


def test_an_interrupted_repair_begins_anew(folder, tmp_path, monkeypatch):
    section(bits=8)(folder)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(repairing, "_edit", stop)
        inspect(str(folder), repair=tmp_path / "repaired")
    assert (tmp_path / "repaired.partial" / WEIGHTS).exists()
    (tmp_path / "repaired.partial" / "old").touch()
    assert not (repaired(folder) / "old").exists()


def test_weights_are_links_and_the_rest_is_copied(folder):
    section(bits=8)(folder)
    (folder / "notes").mkdir()
    out = folder.with_name("repaired")
    result = inspect(str(folder), repair=out)
    assert "the folder notes was left out" in result.repaired
    links = {path.name for path in out.iterdir() if path.stat().st_nlink > 1}
    assert links == {WEIGHTS}


def test_disks_without_links(folder, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    section(bits=8)(folder)
    assert (repaired(folder) / WEIGHTS).stat().st_nlink == 1


# which programs load it


def loads(**subject):
    return {v.target: v for v in verdicts(Subject(**subject))}


GPTQ = {
    "format": "gptq",
    "bits": frozenset({4}),
    "groups": frozenset({128}),
    "shapes": frozenset({(64, 128)}),
    "stored_order": True,
}


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [
        ({}, {"llama.cpp", "mlx"}),
        ({"symmetric": False}, {"vLLM", "llama.cpp", "mlx"}),
        ({"bits": frozenset({3})}, {"vLLM", "exllamav2", "llama.cpp", "mlx"}),
        ({"bits": frozenset({8})}, {"exllamav2", "llama.cpp", "mlx"}),
        ({"groups": frozenset({16})}, {"vLLM", "llama.cpp", "mlx"}),
        ({"shapes": frozenset({(64, 48)})}, {"exllamav2", "llama.cpp", "mlx"}),
        ({"model_type": "gpt_neox"}, {"exllamav2", "llama.cpp", "mlx"}),
        ({"declared": False}, {"transformers", "vLLM", "llama.cpp", "mlx"}),
        ({"standard_files": False}, {"transformers", "llama.cpp", "mlx"}),
        ({"broken": True}, set(TARGETS)),
        ({"format": "awq"}, {"exllamav2", "llama.cpp", "mlx"}),
        ({"format": "awq", "groups": frozenset({64})}, {"exllamav2", "llama.cpp"}),
        ({"format": "mlx", "groups": frozenset({64})}, set(TARGETS) - {"mlx"}),
        ({"format": "compressed_tensors"}, {"exllamav2", "llama.cpp", "mlx"}),
        ({"format": "bnb"}, {"exllamav2", "llama.cpp", "mlx"}),
        ({"format": "dense"}, {"llama.cpp"}),
    ],
)
def test_verdicts(changes, refusing):
    if changes.get("format") == "awq" and "groups" not in changes:
        changes = changes | {"groups": frozenset({-1})}
    result = loads(**(GPTQ | changes))
    assert {name for name, verdict in result.items() if not verdict.loads} == refusing
    for verdict in result.values():
        assert verdict.loads != bool(verdict.reasons)
        assert not verdict.loads or verdict.hardware


def test_what_must_be_installed_and_what_it_runs_on():
    verdict = loads(**GPTQ)["transformers"]
    assert verdict.needs == "optimum, gptqmodel"
    assert any("7.5" in text for text in verdict.hardware)
    slow = loads(**(GPTQ | {"bits": frozenset({2})}))["transformers"]
    assert any("no fast kernel" in text for text in slow.hardware)
    wide = loads(**(GPTQ | {"bfloat16": True}))["vLLM"]
    assert any("bfloat16 from 8.0" in text for text in wide.hardware)


# the command


def test_the_command_exits_with_1_for_errors_only(folder, capsys):
    assert command("inspect", folder) == 0
    edit(folder / CONFIG, _name_or_path="/home/me/x")
    assert command("inspect", folder) == 0
    assert "warning: config.json holds a path" in capsys.readouterr().out
    section(bits=8)(folder)
    assert command("inspect", folder) == 1
    shown = capsys.readouterr().out
    assert "error: config.json says bits is 8, the tensors say 4 (--repair)" in shown
    assert command("inspect", folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["findings"][0] == {
        "level": "error",
        "code": "config",
        "text": "config.json says bits is 8, the tensors say 4",
        "repairable": True,
    }
    assert [verdict["target"] for verdict in found["targets"]] == list(TARGETS)


def test_the_command_repairs_and_says_what(folder, capsys):
    section(bits=8)(folder)
    out = folder.with_name("out[1]")
    assert command("inspect", folder, "--repair", out) == 0
    shown = capsys.readouterr().out
    assert "repaired: config.json: quantization_config.bits is now 4, was 8" in shown
    assert f"wrote {out}" in shown
    assert command("inspect", out) == 0
    assert command("inspect", out, "--repair", folder.with_name("again")) == 1
    assert "nothing that could be repaired" in sentence(capsys.readouterr().err)[0]


def test_errors_that_stay_are_not_forgotten(folder):
    section(bits=8)(folder)
    change_tensor(fill(float("nan")), ".scales")(folder)
    out = folder.with_name("out")
    assert command("inspect", folder, "--repair", out) == 1
    assert found(out) == [("error", "nan")]


def test_nothing_is_wider_than_80_columns(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    section(bits=8)(folder)
    assert command("inspect", folder) == 1
    tables = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┌│└"]
    assert tables and max(map(len, tables)) <= 80


def test_the_copys_folder_may_be_a_path(folder):
    """``--repair`` takes a Path in Python and a text on the command line."""
    section(bits=8)(folder)
    assert inspect(str(folder), repair=Path(folder.with_name("a"))).repaired


# what a stranger found


def test_a_copy_is_never_written_into_the_original(tmp_path):
    """The dense original lies beside the GPTQ file, and has the name that the copy gives to it."""
    folder = write(tmp_path / "model", "gptq")
    (folder / WEIGHTS).rename(folder / "gptq_model-4bit-128g.safetensors")
    shutil.copyfile(data.demo() / WEIGHTS, folder / WEIGHTS)
    before = digests(folder)
    out = tmp_path / "repaired"
    told = inspect(str(folder), model_basename="gptq_model-4bit-128g", repair=out).repaired
    assert digests(folder) == before
    assert digests(out)[WEIGHTS] == before["gptq_model-4bit-128g.safetensors"]
    assert f"{WEIGHTS} was left out: another file has its name now" in told


def test_hints_of_a_repair_name_its_own_option(folder, tmp_path):
    edit(folder / CONFIG, SECTION, bits=3)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UsageError) as caught:
        inspect(str(folder), repair=tmp_path / "there")
    assert "--repair" in caught.value.hint and "--out" not in caught.value.hint
    told = inspect(str(folder), repair=folder / "inside").repaired
    assert not any("partial" in text for text in told)


def cut(tensors):
    name = "model.embed_tokens.weight"
    return tensors | {name: tensors[name][:-100].clone()}


def whole_numbers(tensors):
    name = "model.layers.0.self_attn.q_proj.weight"
    return tensors | {name: tensors[name].char()}


@pytest.mark.parametrize("damage", [cut, whole_numbers])
def test_tensors_that_are_no_parameters_of_the_model(tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(model("llama", **TOKENS), folder)
    save(damage(load_file(folder / WEIGHTS)), folder)
    assert ("error", "shape") in found(folder)
    with pytest.raises(QuantkitError, match="nothing can load"):
        convert(str(folder), "dense:f32", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"num_hidden_layers": "two"}, {"num_attention_heads": 3}])
def test_a_configuration_that_transformers_refuses_is_a_warning(folder, tmp_path, wrong):
    edit(folder / CONFIG, **wrong)
    assert ("warning", "structure") in found(folder)
    convert(str(folder), "gptq_v2", out=tmp_path / "out")


def test_the_original_may_be_named_in_a_list(folder):
    (folder / "README.md").write_text("---\nbase_model:\n- owner/name\ntags:\n- x\n---\n")
    assert inspect(str(folder)).made_from == "owner/name"
    (folder / "README.md").write_text("---\nbase_model: owner/other\n---\n")
    assert inspect(str(folder)).made_from == "owner/other"


@pytest.mark.parametrize("name", ["~nobodyx/y", "x" * 300])
@pytest.mark.parametrize("verb", [["inspect"], ["push"], ["convert", "--to", "gptq"]])
def test_names_that_no_disk_takes(name, verb, capsys):
    more = ["owner/name"] if verb == ["push"] else []
    assert command(*verb, name, *more) in (1, 2)
    assert sentence(capsys.readouterr().err)
